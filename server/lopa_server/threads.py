"""Work in threads that end with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_given_up: set[Future[Any]] = set()


async def apart(work: Callable[[], T]) -> T:
    """Do it in a thread that ends with it.

    A thread of a pool would live on with the OpenMP threads that torch gave it. With those of the engine's own thread there would be more
    than cores, and OpenMP's threads would then sleep, and have to be woken, between any two operations of every step.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="lopa-apart")
    future = executor.submit(work)
    try:
        result = await asyncio.wrap_future(future)
    except BaseException:
        _given_up.add(future)
        future.add_done_callback(_given_up.discard)
        executor.shutdown(wait=False)  # whoever gives up on it must not hold up the loop
        raise
    executor.shutdown()
    return result


async def ended() -> None:
    """Wait for what was given up in this process: a thread can't be ended, and what it still does may get in the way of what comes next."""
    await asyncio.gather(*map(asyncio.wrap_future, tuple(_given_up)), return_exceptions=True)
