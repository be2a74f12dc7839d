"""A generation while it is under way, for a thread and for an event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from lopa.session import GenerationFlow
from lopa.values import Delta, Generation

if TYPE_CHECKING:
    from lopa.async_link import AsyncLink
    from lopa.link import Link


class GenerationStream(Iterator[Delta]):
    """Deltas as they come; at the end the whole `generation`. Its `with` block, or `close`, frees the server's work."""

    def __init__(self, link: Link, flow: GenerationFlow) -> None:
        self._link, self._flow = link, flow

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop. Harmless after the end."""
        self._flow.close()

    def __next__(self) -> Delta:
        delta = self._link.run(self._flow.next_delta())
        if delta is None:
            raise StopIteration
        return delta

    @property
    def generation(self) -> Generation:
        """The whole text, verified.

        Raises:
            ProtocolError: the stream was not read to its end.
        """
        return self._flow.generation


class AsyncGenerationStream(AsyncIterator[Delta]):
    """As `GenerationStream`, for `async for` and `async with`."""

    def __init__(self, link: AsyncLink, flow: GenerationFlow) -> None:
        self._link, self._flow = link, flow

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop. Harmless after the end."""
        self._flow.close()

    async def __anext__(self) -> Delta:
        delta = await self._link.run(self._flow.next_delta())
        if delta is None:
            raise StopAsyncIteration
        return delta

    @property
    def generation(self) -> Generation:
        """The whole text, verified.

        Raises:
            ProtocolError: the stream was not read to its end.
        """
        return self._flow.generation
