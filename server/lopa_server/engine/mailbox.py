"""Where a request's answers arrive on the asyncio side."""

from __future__ import annotations

import asyncio
from typing import Protocol, TypeAlias, TypeVar

from lopa_server.engine.base import Delta, EngineFailed, PairResult

Event: TypeAlias = Delta | list[PairResult] | Exception
Kind = TypeVar("Kind", Delta, list[PairResult])


class Receiver(Protocol):
    """Who gets the events of one request or call."""

    def put(self, event: Event) -> None: ...


class Mailbox:
    """Keeps a request's events until they are asked for. Used on one loop."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._after: Event | None = None
        """What came behind deltas that were handed out as one, and isn't one."""

    def put(self, event: Event) -> None:
        self._events.put_nowait(event)

    async def delta(self) -> Delta:
        """A stream's next delta; those that have piled up come as one.

        Raises:
            EngineError: what the engine reported instead.
        """
        delta = _of_kind(Delta, self._after or await self._events.get())
        while delta.finish is None and not self._events.empty():
            event = self._events.get_nowait()
            if not isinstance(event, Delta):
                self._after = event
                break
            delta = _joined(delta, event)
        return delta

    async def results(self) -> list[PairResult]:
        """A call's results.

        Raises:
            EngineError: what the engine reported instead.
        """
        return _of_kind(list, await self._events.get())


def _of_kind(kind: type[Kind], event: Event) -> Kind:
    if isinstance(event, Exception):
        raise event
    if not isinstance(event, kind):
        raise EngineFailed("events of two kinds in one mailbox")
    return event


def _joined(first: Delta, second: Delta) -> Delta:
    return Delta(first.text + second.text, first.token_ids + second.token_ids, first.logprobs + second.logprobs, second.finish)
