"""The server's log: what happened and where, never what anybody wrote.

Exception messages may quote what they choke on (a template its conversation, a parser its text), so traces are written
without them: types, files and lines say where to look.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType

from lopa_server.engine.base import EngineError

LEVELS = ("debug", "info", "warning", "error")
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class ContentFreeFormatter(logging.Formatter):
    """Writes the traces of exceptions without their messages."""

    def __init__(self) -> None:
        super().__init__(FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        """Another handler's formatter may have left its own text of the trace in the record: ours is made anew."""
        others, record.exc_text = record.exc_text, None
        try:
            return super().format(record)
        finally:
            record.exc_text = others

    def formatException(self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]) -> str:
        return trace_of(ei[1]) if ei[1] is not None else ""


def trace_of(error: BaseException) -> str:
    """Its trace and those of its causes, without their messages."""
    return "\n".join(_lines(error))


def _lines(error: BaseException) -> Iterator[str]:
    """A trace, the causes first, as Python orders it."""
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        yield from _lines(before)
        yield "which led to:"
    if isinstance(error, EngineError) and error.trace:
        yield error.trace
        yield "which, in the server's process, led to:"
    yield "Traceback (most recent call last):"
    yield "".join(traceback.format_tb(error.__traceback__)).rstrip("\n")
    yield f"{type(error).__module__}.{type(error).__qualname__} (its message may hold what a client sent, and is left out)"


def open_standard_streams() -> None:
    """Give those of descriptors 0 to 2 that are closed to the null device: the next thing to be opened would get their numbers, and
    whoever writes to them, or closes them, would hit that."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


def log_to_stderr(level: str) -> list[str]:
    """Set up this process's log at one of LEVELS. What is wrong with the level, one sentence, or nothing."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ContentFreeFormatter())
    known = level.lower() in LEVELS
    logging.basicConfig(level=level.upper() if known else "INFO", handlers=[handler])
    return [] if known else [f"log_level is {level!r}; it must be one of {', '.join(LEVELS)}"]
