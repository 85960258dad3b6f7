"""Errors that a user can act on; the command line prints them as one sentence."""

from __future__ import annotations

from typing import Literal, get_args, get_origin, get_type_hints

# Characters of a text that are shown.
LONGEST = 2000


class UsageError(ValueError):
    """An argument has a value that can't be used. Exit status 2."""


class RunError(RuntimeError):
    """A run can't start or go on for a reason outside its arguments. Exit status 1."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; ``status`` is the shell's for that signal."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def ending(error: BaseException) -> tuple[int, str]:
    """The status and the sentence with which ``error`` ends a command."""
    if isinstance(error, Interrupted):
        return error.status, one_line(str(error))
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped by SIGINT"
    status = 2 if isinstance(error, UsageError) else 1
    if isinstance(error, (UsageError, RunError, OSError, ValueError)):
        return status, one_line(str(error))
    return status, one_line(f"{type(error).__name__}: {error}")


def one_line(text: str) -> str:
    """``text`` in one line, without its middle if what it quotes is very long."""
    return without_middle(" ".join(text[: 4 * LONGEST].split() + text[4 * LONGEST :][-LONGEST:].split()))


def without_middle(text: str) -> str:
    """``text``, or its beginning and its end if it is very long."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def must_be(condition: bool, argument: str, given: object, accepted: str) -> None:
    """Raise :class:`UsageError` naming ``argument``, the values that are ``accepted`` and the one ``given``."""
    if not condition:
        raise UsageError(f"{argument} must be {accepted}, but is {given!r}")


def must_be_choices(options: object) -> None:
    """Raise :class:`UsageError` unless each field of a dataclass that is a Literal has one of its values."""
    for name, hint in get_type_hints(type(options)).items():
        if get_origin(hint) is Literal:
            given, accepted = getattr(options, name), get_args(hint)
            must_be(given in accepted, name, given, f"one of {accepted}")


def require(condition: bool, argument: str, given: object, reason: str) -> None:
    """Raise :class:`UsageError` naming ``argument``, what was ``given``, and the ``reason`` why it can't be used."""
    if not condition:
        raise UsageError(f"{argument}={given!r} can't be used: {reason}")
