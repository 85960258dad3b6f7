"""Errors that a user can act on; the command line prints them as one sentence."""

from __future__ import annotations


class UsageError(ValueError):
    """An argument has a value that can't be used. Exit status 2."""


class RunError(RuntimeError):
    """A run can't start or go on for a reason outside its arguments. Exit status 1."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; ``status`` is the shell's for that signal."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def must_be(condition: bool, argument: str, given: object, accepted: str) -> None:
    """Raise :class:`UsageError` naming ``argument``, the values that are ``accepted`` and the one ``given``."""
    if not condition:
        raise UsageError(f"{argument} must be {accepted}, but is {given!r}")


def require(condition: bool, argument: str, given: object, reason: str) -> None:
    """Raise :class:`UsageError` naming ``argument``, what was ``given``, and the ``reason`` why it can't be used."""
    if not condition:
        raise UsageError(f"{argument}={given!r} can't be used: {reason}")
