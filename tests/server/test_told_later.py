"""Where a step is computed beside the engine's thread, tokens are told while the next one runs: clients can't tell the difference."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from lopa_server.engine.base import EngineError, EngineFailed, Finish
from lopa_server.engine.torch_engine.engine import TorchEngine
from lopa_server.engine.torch_engine.live import LiveStream
from lopa_server.engine.torch_engine.runner import ModelRunner

from tests.server.engines import Output, collect, load, pair, run, stream

STEP, TELL = ModelRunner.step, LiveStream.tell


@pytest.fixture(params=[False, True], ids=["at once", "later"])
def engine(tiny_fm: Path, request: pytest.FixtureRequest) -> Iterator[TorchEngine]:
    loaded = load(tiny_fm)
    loaded.intake.worker._asynchronous = request.param
    yield loaded


def test_streams_of_every_kind_are_the_same(tiny_fm: Path) -> None:
    """With ends by length, by a token, by a stop string and by a grammar; with gradients between them."""

    async def answers(engine: TorchEngine) -> list[Output]:
        first = await collect(engine, stream("probe", 1, max_tokens=30))
        requests = [
            *(stream(f"length {row}", row, max_tokens=1 + 5 * row, logprobs=1) for row in range(6)),
            stream("stop", 1, max_tokens=30, stop=(first.text[8:11],)),
            stream("schema", 2, max_tokens=60, json_schema='{"type": "boolean"}', ignore_end=False),
            stream("end", 3, max_tokens=60, ignore_end=False, temperature=2.0, seed=5),
        ]
        streams = asyncio.gather(*(collect(engine, request) for request in requests))
        await engine.prompt_gradients([pair(row) for row in range(4)])
        return [first, *await streams]

    at_once, later = load(tiny_fm), load(tiny_fm)
    later.intake.worker._asynchronous = True
    expected = run(at_once, answers)
    assert {output.finish for output in expected} >= {Finish.LENGTH, Finish.STOP}
    assert run(later, answers) == expected


def test_what_came_before_a_failure_is_told(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter(range(100))
    monkeypatch.setattr(ModelRunner, "step", lambda *arguments: 1 / 0 if next(steps) == 4 else STEP(*arguments))

    async def until_it_fails(engine: TorchEngine) -> int:
        told = 0
        with pytest.raises(EngineFailed, match="ZeroDivisionError"):
            async for delta in engine.generate(stream("a", 1, max_tokens=20)):
                told += len(delta.token_ids)
        return told

    assert run(engine, until_it_fails) == 4


@pytest.mark.parametrize("tokens", [3, 7])
def test_a_token_that_can_not_be_told_loses_its_stream_only(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """One in the middle, when the next step is under way, and the last one, when the stream counts as over."""
    monkeypatch.setattr(LiveStream, "tell", lambda self, *token: 1 / 0 if self.generated == 3 and self.id == "a" else TELL(self, *token))

    async def together(engine: TorchEngine) -> list[Output | BaseException]:
        requests = (stream("a", 1, max_tokens=tokens), stream("b", 2, max_tokens=9))
        return list(await asyncio.gather(*(collect(engine, one) for one in requests), return_exceptions=True))

    failed, whole = run(engine, together)
    assert isinstance(failed, EngineError) and isinstance(whole, Output) and len(whole.tokens) == 9
    assert engine.stats().failed == 1 and engine.stats().running == 0


def test_nothing_is_told_after_an_abort(engine: TorchEngine) -> None:
    async def leave_early(engine: TorchEngine) -> tuple[int, int]:
        requests = engine.generate(stream("a", 1, max_tokens=200))
        told = 0
        async for _ in requests:
            told += 1
            if told == 3:
                break
        await requests.aclose()
        again = await collect(engine, stream("a", 1, max_tokens=4))
        return told, len(again.tokens)

    assert run(engine, leave_early) == (3, 4)
    assert engine.stats().aborted == 1
