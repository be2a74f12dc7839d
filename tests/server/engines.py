"""Running a torch engine inside a test, without gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from lopa_server.engine.base import Finish, GenerateRequest, InputSequence, PairRequest, SamplingParams
from lopa_server.engine.scheduler import SchedulerLimits
from lopa_server.engine.torch_engine.config import TorchEngineConfig
from lopa_server.engine.torch_engine.engine import TorchEngine

Result = TypeVar("Result")


def load(fm: Path, *, kv_positions: int = 1 << 15, **fields: Any) -> TorchEngine:
    """An engine of one thread. step_positions: small values make long prompts come in several pieces."""
    names = ("max_waiting", "max_waiting_pairs", "dtype", "device", "native", "graphs", "step_positions")
    engine_fields = {name: fields.pop(name) for name in names if name in fields}
    limits = SchedulerLimits(kv_positions=kv_positions, **fields)
    return TorchEngine.load(TorchEngineConfig(str(fm), threads=1, limits=limits, **engine_fields))


def run(engine: TorchEngine, scenario: Callable[[TorchEngine], Awaitable[Result]]) -> Result:
    """Start the engine, run a scenario on a fresh loop, stop the engine."""

    async def main() -> Result:
        engine.start()
        try:
            return await scenario(engine)
        finally:
            await engine.stop()

    return asyncio.run(main())


@dataclass
class Output:
    """A whole stream."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None


async def collect(engine: TorchEngine, request: GenerateRequest) -> Output:
    """Read a stream to its end."""
    output = Output()
    async for delta in engine.generate(request):
        output.text += delta.text
        output.tokens += delta.token_ids
        output.logprobs += [entry.chosen.logprob for entry in delta.logprobs]
        output.finish = delta.finish
    return output


def soft_rows(seed: int, rows: int, hidden: int = 32) -> np.ndarray:
    """(rows, hidden) float32, as large as a tiny model's embeddings."""
    return (np.random.default_rng(seed).standard_normal((rows, hidden)) * 0.4).astype(np.float32)


def token_ids(seed: int, count: int) -> tuple[int, ...]:
    """Ids of ordinary tokens."""
    return tuple(np.random.default_rng(seed).integers(2, 300, count).tolist())


def stream(
    name: str,
    content: int,
    *,
    rows: int = 4,
    tokens: int = 12,
    before: int = 0,
    tenant: str = "",
    deadline: float | None = None,
    **sampling: Any,
) -> GenerateRequest:
    """A request with its own soft prompt and prompt; `content` seeds both, `before` of the tokens stand in front of the soft rows."""
    ids = token_ids(content, tokens)
    soft = soft_rows(content, rows) if rows else None
    params = SamplingParams(**{"max_tokens": 16, "ignore_end": True, **sampling})
    return GenerateRequest(name, InputSequence(ids[:before], soft, ids[before:]), params, tenant=tenant, deadline=deadline)


def pair(content: int, *, rows: int = 4, tokens: int = 12, targets: int = 5, before: int = 0) -> PairRequest:
    """A pair with its own soft prompt."""
    ids = token_ids(content, tokens + targets)
    soft = soft_rows(content, rows) if rows else None
    return PairRequest(InputSequence(ids[:before], soft, ids[before:tokens]), ids[tokens:])
