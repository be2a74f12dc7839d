"""Time limits that can all be ended at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class OutOfTime(Exception):
    """A limit ran out, or was ended; not a TimeoutError of what is inside."""


class Bounds:
    """The limits under way; used on one loop."""

    def __init__(self) -> None:
        self._running: set[asyncio.Timeout] = set()

    @contextlib.asynccontextmanager
    async def limit(self, seconds: float | None) -> AsyncIterator[None]:
        """Around something that takes so long at most; None: as long as nobody ends it.

        Raises:
            OutOfTime: it took longer, or `end_all` was called.
        """
        bound = asyncio.timeout(seconds)
        try:
            async with bound:
                self._running.add(bound)
                try:
                    yield
                finally:
                    self._running.discard(bound)
        except TimeoutError as error:
            if not bound.expired():
                raise
            raise OutOfTime from error

    def end_all(self) -> None:
        """Whatever is under way is out of time."""
        for bound in self._running:
            if not bound.expired():
                bound.reschedule(asyncio.get_running_loop().time())
