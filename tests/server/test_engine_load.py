"""A whole engine under random load, model and all: nothing is left of requests that ended, were cancelled or came too late."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from lopa_server.engine.base import DeadlineTooShort
from lopa_server.engine.torch_engine.engine import TorchEngine

from tests.server.engines import load, pair, run, stream
from tests.tiny import build_tiny_fm

AT_ONCE = 48
SYSTEM = 16
"""Tokens in front that requests of one kind share."""


class _Load:
    """Streams and calls with pairs of random lengths, a third of which are given up: at some token, or when their time is over."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine, self.random, self.outcomes, self.number = engine, random.Random(5), Counter[str](), 0

    async def requests(self, count: int) -> None:
        """So many, AT_ONCE of them at any time. Raises TimeoutError when one is stuck."""
        left = iter(range(count))

        async def client() -> None:
            for _ in left:
                self.number += 1
                async with asyncio.timeout(120):
                    self.outcomes[await (self.stream if self.random.random() < 0.9 else self.pairs)()] += 1

        await asyncio.gather(*(client() for _ in range(AT_ONCE)))

    async def stream(self) -> str:
        draw, length = self.random, self.random.randrange(1, self.random.choice([4, 8, 48]))
        sampling = draw.choice([{}, {"temperature": 1.0, "top_p": 0.9}, {"presence_penalty": 1.0}, {"logprobs": 2}])
        seconds = draw.choice([0.0, draw.uniform(0, 0.05)]) if draw.random() < 0.15 else None
        deadline = None if seconds is None else time.monotonic() + seconds
        fields = {"before": draw.choice([0, SYSTEM]), "tokens": SYSTEM + draw.randrange(1, 16), "max_tokens": length, **sampling}
        request = stream(
            f"r{self.number}", draw.randrange(30), rows=draw.randrange(5), tenant=draw.choice("abc"), deadline=deadline, **fields
        )
        leaves_at = draw.randrange(length + 1) if draw.random() < 0.2 else None
        tokens = 0
        try:
            async with asyncio.timeout(seconds), contextlib.aclosing(self.engine.generate(request)) as deltas:
                async for delta in deltas:
                    tokens += len(delta.token_ids)
                    if leaves_at is not None and tokens >= leaves_at:
                        return "cancelled"
        except TimeoutError:
            return "late"
        except DeadlineTooShort:
            return "refused"
        assert tokens == length
        return "answered"

    async def pairs(self) -> str:
        draw = self.random
        pairs = [pair(draw.randrange(30), tokens=SYSTEM + draw.randrange(9), before=SYSTEM) for _ in range(draw.randrange(1, 4))]
        call = asyncio.create_task(draw.choice([self.engine.score, self.engine.prompt_gradients])(pairs))
        if draw.random() < 0.2:
            await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])
            return "cancelled"
        assert len(await call) == len(pairs)
        return "answered"

    async def check_empty(self) -> None:
        """Nothing of any request is left anywhere, once the engine thread has taken the last aborts in."""
        await self.engine.score([pair(0)])
        worker = self.engine.intake.worker
        assert self.engine.stats().blocks_used == 0 == worker._scheduler.waiting == worker._scheduler.running
        assert not worker._streams and not worker._scheduler._known and not len(worker._sampler)
        table = worker._sampler._table
        assert len(table._free) == len(table._tokens)
        assert not self.engine._streams._live and not self.engine._calls._live and not self.engine._streams.waiting_tokens


def _objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("requests", [500, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_nothing_is_left_of_requests_that_are_over(requests: int, tmp_path: Path) -> None:
    """The pool holds a few of them, so that many lose their blocks; the first fifth is warm-up."""
    fm = build_tiny_fm(tmp_path, layers=1, context=128)

    async def scenario(engine: TorchEngine) -> None:
        load = _Load(engine)
        await load.requests(requests // 5)
        await load.check_empty()
        objects, resident = _objects(), _resident_bytes() if requests > 10_000 else 0
        await load.requests(requests - requests // 5)
        await load.check_empty()
        assert _objects() - objects < requests / 4, "objects stay behind"
        if resident:
            assert _resident_bytes() - resident < 32 << 20
        assert sum(load.outcomes.values()) == requests
        late = load.outcomes["late"] + load.outcomes["refused"]
        assert min(late, load.outcomes["answered"], load.outcomes["cancelled"]) > requests / 100
        assert engine.stats().preemptions > requests / 1000 and engine.stats().prefix_hit_tokens > 0 == engine.stats().failed

    run(load(fm, kv_positions=240, max_batch=16, step_positions=64), scenario)
