"""The torch engine's settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from lopa_server.engine.scheduler import SchedulerLimits

STEP_POSITIONS = {"cpu": 512, "cuda": 8192}
"""Of streams: a CPU is nearly as fast with so few as with more, and nobody waits long for the next token."""
PAIR_POSITIONS = {"cpu": 640, "cuda": 16384}
"""A CPU is as fast with a micro-batch of this size as with a larger one; a GPU needs more to be busy."""


@dataclass(frozen=True)
class TorchEngineConfig:
    """One line a field; None means that the engine finds a value for this machine."""

    fm: str
    """Hugging Face id or folder."""
    dtype: str | None = None
    """"float32" or "bfloat16". Default: bfloat16 on CUDA, float32 on the CPU."""
    device: str | None = None
    """"cpu", "cuda", "cuda:1". Default: CUDA where there is one."""
    threads: int | None = None
    """CPU threads for torch. Default: torch's own choice."""
    native: bool = True
    """Use our own kernels, where they can be compiled."""
    graphs: bool = True
    """On CUDA, capture decode steps as graphs."""
    limits: SchedulerLimits = field(default_factory=SchedulerLimits)
    step_positions: int | None = None
    """Sets limits.step_positions and limits.pair_positions. Default: STEP_POSITIONS and PAIR_POSITIONS of the device."""
    kv_memory: int | None = None
    """Bytes for the key-value pool. Default: 40 % of the free memory, on a CPU 4 GiB at most."""
    max_waiting: int = 256
    """Generate requests that may wait for a place in the batch."""
    max_waiting_tokens: int = 1 << 18
    """Tokens to read and to write, of all those requests together."""
    max_waiting_pairs: int = 8192
    """Pairs of Score and PromptGradients that may wait."""
    max_waiting_pair_tokens: int = 1 << 21
    """Positions of all those pairs together."""
