"""Nothing of one request reaches another: recycled rows, values that aren't numbers, aborted and refused requests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from lopa_server.engine.base import EngineFailed, EngineStopped, GenerateRequest, PairRequest, QueueFull
from lopa_server.engine.torch_engine.engine import TorchEngine

from tests.server.engines import collect, load, pair, run, stream


def _poisoned(request: GenerateRequest) -> GenerateRequest:
    """The request with a soft prompt of NaN, as if validation had let it through."""
    soft = np.full_like(request.input.soft, np.nan)
    return dataclasses.replace(request, id="poisoned", input=dataclasses.replace(request.input, soft=soft))


def test_values_that_are_not_numbers_stay_in_their_row(tiny_fm: Path) -> None:
    requests = [stream(f"r{seed}", seed, tokens=10 + seed, max_tokens=24) for seed in range(8)]

    async def scenario(engine: TorchEngine) -> None:
        alone = [await collect(engine, request) for request in requests]
        for _ in range(3):
            beside = [asyncio.create_task(collect(engine, request)) for request in requests]
            with pytest.raises(EngineFailed, match="not finite"):
                await collect(engine, _poisoned(stream("x", 99, tokens=90)))
            assert [(await task).tokens for task in beside] == [output.tokens for output in alone]
        again = await asyncio.gather(*(collect(engine, request) for request in requests))
        assert [output.tokens for output in again] == [output.tokens for output in alone]
        assert engine.stats().failed == 3 and engine.stats().blocks_used == 0

    run(load(tiny_fm), scenario)


def test_a_broken_pair_fails_its_own_call_only(tiny_fm: Path) -> None:
    good, bad = [pair(1), pair(2)], pair(3)
    bad = PairRequest(dataclasses.replace(bad.input, soft=np.full_like(bad.input.soft, np.nan)), bad.target)

    async def scenario(engine: TorchEngine) -> None:
        alone = await engine.prompt_gradients(good)
        broken, healthy = await asyncio.gather(
            engine.prompt_gradients([pair(4), bad]), engine.prompt_gradients(good), return_exceptions=True
        )
        assert isinstance(broken, EngineFailed)
        for one, two in zip(alone, healthy, strict=True):
            np.testing.assert_allclose(two.gradient, one.gradient, rtol=1e-4, atol=1e-6)

    run(load(tiny_fm), scenario)


def test_rows_of_aborted_requests_are_reused_cleanly(tiny_fm: Path) -> None:
    requests = [stream(f"r{seed}", seed, tokens=6 + seed, max_tokens=30) for seed in range(6)]

    async def leave_early(engine: TorchEngine, name: str, seed: int) -> None:
        request = stream(name, seed, tokens=80, max_tokens=200)
        async with contextlib.aclosing(engine.generate(request)) as deltas:
            async for _ in deltas:
                return

    async def scenario(engine: TorchEngine) -> None:
        alone = [await collect(engine, request) for request in requests]
        for turn in range(4):
            leaving = [leave_early(engine, f"leaving{turn}-{seed}", 50 + seed) for seed in range(4)]
            mixed = await asyncio.gather(*(collect(engine, request) for request in requests), *leaving)
            assert [output.tokens for output in mixed[:6]] == [output.tokens for output in alone]
        await engine.score([pair(0)])
        stats = engine.stats()
        assert (stats.blocks_used, stats.running, stats.waiting) == (0, 0, 0)
        assert stats.aborted == 16

    run(load(tiny_fm, max_batch=5), scenario)


def test_an_abort_frees_a_request_that_never_got_a_place(tiny_fm: Path) -> None:
    async def scenario(engine: TorchEngine) -> None:
        running = asyncio.create_task(collect(engine, stream("running", 1, max_tokens=60)))
        waiting = asyncio.create_task(collect(engine, stream("waiting", 2)))
        await asyncio.sleep(0)
        waiting.cancel()
        assert len((await running).tokens) == 60
        assert waiting.cancelled() and engine.stats().waiting == 0

    run(load(tiny_fm, max_batch=1), scenario)


def test_a_full_queue_refuses_and_says_when_to_come_back(tiny_fm: Path) -> None:
    async def scenario(engine: TorchEngine) -> None:
        streams = [asyncio.create_task(collect(engine, stream(f"r{seed}", seed))) for seed in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as full:
            await collect(engine, stream("late", 9))
        assert (full.value.waiting, full.value.limit) == (2, 2) and full.value.retry_after > 0
        pairs = asyncio.create_task(engine.score([pair(seed) for seed in range(4)]))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="pair queue"):
            await engine.score([pair(7)])
        assert len(await pairs) == 4
        assert all(len(output.tokens) == 16 for output in await asyncio.gather(*streams))
        assert len((await collect(engine, stream("late", 9))).tokens) == 16

    run(load(tiny_fm, max_batch=1, max_waiting=2, max_waiting_pairs=4), scenario)


def test_a_step_that_raises_fails_its_own_requests_and_the_engine_goes_on(tiny_fm: Path) -> None:
    requests = [stream(f"r{seed}", seed, tokens=20, before=16, max_tokens=12) for seed in range(4)]
    pairs = [pair(seed, tokens=20, before=16) for seed in range(3)]
    engine = load(tiny_fm, max_batch=4)
    faults: list[bool] = []

    def fail(*_: object) -> None:
        if faults:
            faults.pop()
            raise RuntimeError("a fault from outside")

    engine.intake.fm.model.get_output_embeddings().register_forward_pre_hook(fail)

    async def scenario(engine: TorchEngine) -> None:
        alone = [await collect(engine, dataclasses.replace(request, cache_salt=request.id.encode())) for request in requests]
        gradients = await engine.prompt_gradients(pairs)
        for turn in range(3):
            salt = b"turn %d" % turn
            faults.append(True)
            lost = [collect(engine, dataclasses.replace(request, cache_salt=salt)) for request in requests]
            results = await asyncio.gather(*lost, return_exceptions=True)
            failed = [one for one in results if isinstance(one, EngineFailed)]
            assert failed and all("a fault from outside" in str(one) for one in failed)
            kept = [(one, two) for one, two in zip(alone, results, strict=True) if not isinstance(two, EngineFailed)]
            assert all(one.tokens == two.tokens for one, two in kept)
            assert (await collect(engine, dataclasses.replace(requests[0], cache_salt=salt))).tokens == alone[0].tokens
            faults.append(True)
            with pytest.raises(EngineFailed):
                await engine.prompt_gradients([dataclasses.replace(one, cache_salt=salt) for one in pairs])
            again = await engine.prompt_gradients([dataclasses.replace(one, cache_salt=salt) for one in pairs])
            np.testing.assert_allclose(again[0].gradient, gradients[0].gradient, rtol=1e-4, atol=1e-6)
            assert engine.stats().blocks_used == 0

    run(engine, scenario)


def test_stopping_tells_everybody(tiny_fm: Path) -> None:
    async def scenario(engine: TorchEngine) -> None:
        running = asyncio.create_task(collect(engine, stream("r", 1, max_tokens=400)))
        tuning = asyncio.create_task(engine.prompt_gradients([pair(seed, tokens=60) for seed in range(300)]))
        await asyncio.sleep(0)
        await engine.stop()
        for task in (running, tuning):
            with pytest.raises(EngineStopped):
                await task
        with pytest.raises(EngineStopped):
            await engine.score([pair(1)])

    run(load(tiny_fm), scenario)
