"""Where the package's sentences and bars go: nowhere, until a command or a caller asks for them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

_bars = False  # whether they are drawn


class Printer(logging.Handler):
    """Prints records on standard output, above the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        tqdm.write(self.format(record))


@contextmanager
def console(*, sentences: bool, bars: bool) -> Iterator[None]:
    """Whether, within this, what the package logs is printed and bars are drawn, whatever is said around it.

    Other libraries are kept quiet in any case.
    """
    global _bars
    import transformers.utils.logging as others

    logger = logging.getLogger("dopsd")
    outer = [handler for handler in logger.handlers if isinstance(handler, Printer)]
    inner = [Printer()] if sentences else []
    before = _bars, logger.level, others.get_verbosity(), others.is_progress_bar_enabled()
    _bars = bars
    if sentences:
        logger.setLevel(logging.INFO)
    replace(logger, outer, inner)
    others.set_verbosity_error()
    others.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        replace(logger, inner, outer)
        _bars, level, verbosity, enabled = before
        logger.setLevel(level)
        others.set_verbosity(verbosity)
        if enabled:
            others.enable_progress_bar()


def replace(logger: logging.Logger, old: Iterable[logging.Handler], new: Iterable[logging.Handler]) -> None:
    """Handlers of ``logger`` by others."""
    for handler in old:
        logger.removeHandler(handler)
    for handler in new:
        logger.addHandler(handler)


def draws_bars() -> bool:
    """Whether bars are drawn now."""
    return _bars
