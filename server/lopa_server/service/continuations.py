"""Several continuations of one prompt as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from lopa_server.engine.base import Delta

Item = tuple[int, Delta] | BaseException


async def interleaved(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Deltas of all streams as they come, each with its stream's number. Closing this closes all of them.

    All streams are started before the first delta is waited for. The first failure ends everything and is raised here.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    items: asyncio.Queue[Item] = asyncio.Queue(maxsize=1)
    tasks = [asyncio.create_task(_forward(index, stream, items)) for index, stream in enumerate(streams)]
    going = len(tasks)
    try:
        while going:
            item = await items.get()
            if isinstance(item, BaseException):
                raise item
            going -= item[1].finish is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(index: int, stream: AsyncGenerator[Delta, None], items: asyncio.Queue[Item]) -> None:
    try:
        async with aclosing(stream) as deltas:
            async for delta in deltas:
                await items.put((index, delta))
    except Exception as error:
        await items.put(error)
