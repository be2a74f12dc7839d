"""Before kernels are used: do they give torch's results on this device? A compiler that fails, or computes otherwise, is met here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from lopa_server.engine.torch_engine.attention import Score
from lopa_server.engine.torch_engine.gpu.elementwise import GpuElementwise
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
    """Write a pool and read it in place, and what stands between products, in every dtype.

    Raises:
        ValueError: results differ from torch's. And whatever Triton raises where it can't compile.
    """
    for dtype in DTYPES:
        differences = {"attention": _largest_difference(kernels, device, dtype), **_between_products(kernels.elementwise, device, dtype)}
        for name, difference in differences.items():
            if not difference <= TOLERANCE[dtype]:
                raise ValueError(f"{name} in {dtype} differs from torch's by {difference:.2g}")


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


def _between_products(functions: GpuElementwise, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The largest difference of each function's values from torch's, and of their gradients."""
    generator = torch.Generator().manual_seed(0)
    rows, other, flowing = torch.randn(3, 2, 3, 5, WIDTH, generator=generator).to(device, dtype).unbind()
    weight = torch.rand(WIDTH, generator=generator).to(device, dtype)
    turns = torch.randn(2, 2, 5, WIDTH, generator=generator).to(device, dtype).unbind()
    cosine, sine = (turn[:, None] for turn in turns)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-high, low], dim=-1) * sine

    def compare(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())

    def gradient(function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = rows.clone().requires_grad_()
            return torch.autograd.grad(function(leaf), leaf, flowing)[0]

    def norm(x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (WIDTH,), weight, 1e-6)

    def gated(x: torch.Tensor) -> torch.Tensor:
        return functional.silu(x) * other

    return {
        "a norm": compare(functions.rms_norm(rows, weight, 1e-6, 0.0), norm(rows)),
        "a norm's gradient": compare(functions.rms_norm_backward(flowing, rows, weight, 1e-6, 0.0), gradient(norm)),
        "a gate": compare(functions.silu_mul(rows, other), gated(rows)),
        "a gate's gradient": compare(functions.silu_mul_backward(flowing, rows, other)[0], gradient(gated)),
        "a rotation": compare(functions.rotate(rows, *turns), rotated(rows)),
        "a rotation's gradient": compare(functions.rotate(flowing, *turns, back=True), gradient(rotated)),
    }


def _plain(pool: KvPool, query: torch.Tensor, table: np.ndarray, end: int) -> torch.Tensor:
    """(h, e) of one row, in float32."""
    place = np.arange(end)
    slots = torch.from_numpy(table[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE).to(query.device)
    keys, values = (one[0].float().repeat_interleave(HEADS // KV_HEADS, dim=0) for one in pool.read(0, slots, 1))
    weights = torch.softmax(query.float()[:, None] @ keys.transpose(1, 2) * WIDTH**-0.5, dim=-1)
    return (weights @ values)[:, 0]
