"""Before kernels are used: do they give torch's results on this device? A compiler that fails, or computes otherwise, is met here."""

from __future__ import annotations

import numpy as np
import torch

from lopa_server.engine.torch_engine.attention import Score
from lopa_server.engine.torch_engine.gpu.kernels import GpuKernels
from lopa_server.engine.torch_engine.kv_pool import KvPool
from lopa_server.engine.torch_engine.paging import PagedRows, Slots
from lopa_server.engine.torch_engine.rows import DTYPES

BLOCK_SIZE, BLOCKS, WIDTH = 8, 40, 64
HEADS, KV_HEADS = 4, 2
ENDS = (1, 8, 77)
"""Of the rows that decode: in the first block, at its end, over several tiles."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of weighted sums of numbers around 1."""


def try_kernels(kernels: GpuKernels, device: torch.device) -> None:
    """Write a pool and read it in place, in every dtype.

    Raises:
        ValueError: results differ from torch's. And whatever Triton raises where it can't compile.
    """
    for dtype in DTYPES:
        difference = _largest_difference(kernels, device, dtype)
        if not difference <= TOLERANCE[dtype]:
            raise ValueError(f"attention in {dtype} differs from torch's by {difference:.2g}")


@torch.inference_mode()
def _largest_difference(kernels: GpuKernels, device: torch.device, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    pool = KvPool(BLOCKS, BLOCK_SIZE, kernels)
    slots = np.arange(BLOCK_SIZE, pool.slots)
    keys, values = torch.randn(2, KV_HEADS, len(slots), WIDTH, generator=generator).to(device, dtype).unbind()
    pool.write(0, Slots(slots, pool.slots, device), keys, values)
    query = torch.randn(HEADS, len(ENDS), WIDTH, generator=generator).to(device, dtype)
    tables = 1 + np.random.default_rng(0).permutation(BLOCKS)[: len(ENDS) * 10].reshape(len(ENDS), 10)
    score = Score(WIDTH**-0.5, None, None)
    ours = kernels.decode(pool.layer(0), PagedRows(tables, np.array(ENDS), BLOCK_SIZE, pool.blocks, device), 0, query, score)
    return max(float((ours[row] - _plain(pool, query[:, row], tables[row], end)).abs().max()) for row, end in enumerate(ENDS))


def _plain(pool: KvPool, query: torch.Tensor, table: np.ndarray, end: int) -> torch.Tensor:
    """(h, e) of one row, in float32."""
    place = np.arange(end)
    slots = torch.from_numpy(table[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE).to(query.device)
    keys, values = (one[0].float().repeat_interleave(HEADS // KV_HEADS, dim=0) for one in pool.read(0, slots, 1))
    weights = torch.softmax(query.float()[:, None] @ keys.transpose(1, 2) * WIDTH**-0.5, dim=-1)
    return (weights @ values)[:, 0]
