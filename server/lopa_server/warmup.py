"""Builds the engine that a configuration asks for, and makes it compute everything once before anybody is served."""

from __future__ import annotations

import numpy as np

from lopa_server.config import ServerConfig
from lopa_server.engine.base import Engine, GenerateRequest, InputSequence, PairRequest, SamplingParams
from lopa_server.engine.process.engine import ProcessEngine
from lopa_server.engine.scheduler import SchedulerLimits
from lopa_server.engine.torch_engine.config import TorchEngineConfig
from lopa_server.supervisor import ReplaceableEngine
from lopa_server.threads import apart


async def load_engine(config: ServerConfig) -> ReplaceableEngine:
    """Load the model, in the process that the configuration says."""
    settings = TorchEngineConfig(
        fm=str(config.fm),
        dtype=config.dtype,
        device=config.device,
        threads=config.threads,
        native=config.native,
        graphs=config.cuda_graphs,
        limits=SchedulerLimits(max_batch=config.max_batch, block_size=config.block_size, tenant_weights=config.tenant_weights()),
        step_positions=config.step_positions,
        kv_memory=None if config.kv_memory_mib is None else config.kv_memory_mib << 20,
        max_waiting=config.max_waiting,
        max_waiting_tokens=config.max_waiting_tokens,
        max_waiting_pairs=config.max_waiting_pairs,
    )
    if config.engine_process:
        return await ProcessEngine.load(settings)
    return await apart(lambda: _torch_engine(settings))


def _torch_engine(settings: TorchEngineConfig) -> ReplaceableEngine:
    """Imports torch."""
    from lopa_server.engine.torch_engine.engine import TorchEngine

    return TorchEngine.load(settings)


async def warm_up(engine: Engine) -> None:
    """A real stream, a score and a gradient, with a soft prompt of one neutral row: whatever can fail, fails now.

    Raises:
        EngineError: what a client would have got.
    """
    soft = np.zeros((1, engine.spec.hidden_size), dtype=np.float32)
    sequence = InputSequence((), soft, (0, 1))
    sampling = SamplingParams(max_tokens=2, ignore_end=True, logprobs=1)
    async for _ in engine.generate(GenerateRequest("warm-up", sequence, sampling)):
        pass
    pairs = [PairRequest(sequence, (0, 1))]
    await engine.score(pairs)
    await engine.prompt_gradients(pairs)
