"""Work in threads that end with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


async def apart(work: Callable[[], T]) -> T:
    """Do it in a thread that ends with it.

    A thread of a pool would live on with the OpenMP threads that torch gave it. With those of the engine's own thread there would be more
    than cores, and OpenMP's threads would then sleep, and have to be woken, between any two operations of every step.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="lopa-apart")
    try:
        result = await asyncio.get_running_loop().run_in_executor(executor, work)
    except BaseException:
        executor.shutdown(wait=False)  # whoever gives up on it must not hold up the loop
        raise
    executor.shutdown()
    return result
