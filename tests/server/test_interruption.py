"""Streams have their turn in the middle of a micro-batch of pairs, and neither changes what the other gets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from lopa_server.engine.base import PairRequest, PairResult
from lopa_server.engine.torch_engine import checkpointing
from lopa_server.engine.torch_engine import pairs as micro_batches
from lopa_server.engine.torch_engine.engine import TorchEngine
from lopa_server.engine.torch_engine.interruption import Interruptions

from tests.server.engines import Output, collect, load, pair, run, stream
from tests.tiny import build_tiny_fm

OFTEN = 0.9
"""Of the time is for streams: a micro-batch pauses after a ninth of a step's time."""


def _pairs(count: int) -> list[PairRequest]:
    return [pair(index, rows=index % 5 + 1, tokens=20 + index % 6, before=(0, 9)[index % 2]) for index in range(count)]


async def _beside(engine: TorchEngine, pairs: list[PairRequest], gradients: bool) -> tuple[list[PairResult], list[Output]]:
    """Results of pairs and of streams beside them: the pairs arrive with the first token."""
    call: asyncio.Task[list[PairResult]] | None = None
    outputs = [Output(), Output()]

    async def follow(index: int) -> None:
        nonlocal call
        async for delta in engine.generate(stream(f"s{index}", index, tokens=12 + 50 * index, max_tokens=200, logprobs=0)):
            outputs[index].tokens += delta.token_ids
            outputs[index].logprobs += [entry.chosen.logprob for entry in delta.logprobs]
            call = call or asyncio.create_task(engine.prompt_gradients(pairs) if gradients else engine.score(pairs))

    await asyncio.gather(follow(0), follow(1))
    assert call is not None
    return await call, outputs


@pytest.fixture(params=[False, True], ids=["kept", "computed_twice"])
def twice(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether layers are computed twice to save memory, and logits a few at a time."""
    if request.param:
        monkeypatch.setattr(checkpointing, "ACTIVATION_BYTES", 0)
        monkeypatch.setattr(micro_batches, "LOGIT_BYTES", {"cpu": 8 * micro_batches.BYTES_A_LOGIT * 300})
    yield request.param


@pytest.mark.parametrize("gradients", [False, True], ids=["score", "gradients"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_streams_go_on_inside_a_micro_batch(family: str, gradients: bool, twice: bool, tmp_path: Path) -> None:
    del twice
    pairs = _pairs(12)
    fm = build_tiny_fm(tmp_path, family=family)

    async def apart(engine: TorchEngine) -> tuple[list[PairResult], list[Output]]:
        results = await (engine.prompt_gradients(pairs) if gradients else engine.score(pairs))
        return results, [await collect(engine, stream(f"s{row}", row, tokens=12 + 50 * row, max_tokens=200, logprobs=0)) for row in (0, 1)]

    expected, alone = run(load(fm), apart)
    engine = load(fm, interactive_share=OFTEN)
    results, outputs = run(engine, lambda engine: _beside(engine, pairs, gradients))
    assert engine.stats().pair_pauses > 2
    for one, other in zip(alone, outputs, strict=True):
        assert other.tokens == one.tokens
        np.testing.assert_allclose(other.logprobs, one.logprobs, atol=1e-4)
    for result, wanted in zip(results, expected, strict=True):
        assert result.nll_sum == pytest.approx(wanted.nll_sum, abs=1e-3)
        if wanted.gradient is not None:
            np.testing.assert_allclose(result.gradient, wanted.gradient, atol=1e-4)
    assert engine.stats().blocks_used == 0


def test_a_call_that_is_given_up_and_a_stop_end_a_paused_micro_batch(tiny_fm: Path) -> None:
    async def scenario(engine: TorchEngine) -> None:
        call = asyncio.create_task(engine.prompt_gradients(_pairs(12)))
        async for _ in engine.generate(stream("s", 1, max_tokens=40)):
            call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert (await engine.prompt_gradients(_pairs(2)))[0].gradient is not None
        assert engine.stats().blocks_used == 0
        endless = asyncio.create_task(collect(engine, stream("endless", 2, max_tokens=400)))
        last = asyncio.create_task(engine.prompt_gradients(_pairs(12)))
        await asyncio.sleep(0)
        await engine.stop()
        await asyncio.gather(endless, last, return_exceptions=True)

    run(load(tiny_fm, interactive_share=OFTEN), scenario)


def test_a_pass_has_a_part_for_each_innermost_module_both_ways() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(4, 1)))
    rows = torch.ones(3, 4, requires_grad=True)
    calls = []

    def between(turn: float, part: float) -> bool:
        assert turn >= part >= 0
        calls.append(turn)
        with torch.inference_mode():
            model(torch.ones(2, 4))
        return len(calls) % 2 == 0

    parts = Interruptions(between)
    with parts.within(model):
        (gradient,) = torch.autograd.grad(model(rows).sum(), rows)
    assert len(calls) == 2 * 3
    assert parts.longest < parts.seconds
    (expected,) = torch.autograd.grad(model(rows).sum(), rows)
    torch.testing.assert_close(gradient, expected)
    assert len(calls) == 2 * 3, "nothing is left behind"
