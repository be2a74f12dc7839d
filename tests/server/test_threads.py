"""Work in threads of its own, and two models that are loaded at once."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lopa_server.engine.torch_engine.loader import load_foundation_model
from lopa_server.threads import apart, ended

from tests.tiny import build_tiny_fm


def test_what_is_given_up_holds_up_nothing_until_its_end_is_waited_for() -> None:
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(60)
        done.set()

    async def scene() -> None:
        task = asyncio.create_task(apart(work))
        while not begun.is_set():
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        waiting = asyncio.create_task(ended())
        for _ in range(10):
            await asyncio.sleep(0)
        assert task.cancelled()
        assert not waiting.done()
        go_on.set()
        await waiting
        assert done.is_set()

    asyncio.run(scene())


def test_the_works_own_error_is_its_callers_alone() -> None:
    def work() -> None:
        raise OSError("no such folder")

    async def scene() -> None:
        with pytest.raises(OSError, match="no such folder"):
            await apart(work)
        await ended()

    asyncio.run(scene())


def test_models_that_are_loaded_at_once_are_whole(tmp_path: Path) -> None:
    """Tied weights are what transformers loses otherwise, in these and in every later model of the process."""
    folder = build_tiny_fm(tmp_path / "fm", family="gemma")
    with ThreadPoolExecutor(4) as pool:
        models = [*pool.map(lambda _: load_foundation_model(folder), range(12)), load_foundation_model(folder)]
    for fm in models:
        assert fm.model.get_output_embeddings().weight.data_ptr() == fm.model.get_input_embeddings().weight.data_ptr()
