"""Pools with sequences in them, and what reading them must give: for the kernels of every device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from lopa_server.engine.torch_engine.attention import Score
from lopa_server.engine.torch_engine.kv_pool import KvPool
from lopa_server.engine.torch_engine.paging import Kernels, PagedRows, Slots


@dataclass(frozen=True)
class Case:
    """A pool with sequences in it, one of whose positions is new."""

    ends: list[int]
    kv_heads: int
    group: int
    width: int
    block_size: int
    dtype: torch.dtype
    window: int
    softcap: float | None
    sinks: bool
    seed: int


CASES = st.builds(
    Case,
    ends=st.lists(st.one_of(st.integers(1, 20), st.integers(60, 200)), min_size=1, max_size=5),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 8, 9]),
    width=st.sampled_from([8, 16, 40, 64, 128, 256]),
    block_size=st.sampled_from([1, 5, 8, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.sampled_from([0, 1, 7, 64, 1000]),
    softcap=st.sampled_from([None, 5.0]),
    sinks=st.booleans(),
    seed=st.integers(0, 1 << 16),
)


def _expected(case: Case, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """(h, e) of one row over its own (k, l, e) keys and values, in double precision."""
    keys, values = (tensor.double().repeat_interleave(case.group, dim=0) for tensor in (keys, values))
    scores = torch.einsum("he,hle->hl", query.double(), keys) * case.width**-0.5
    if case.softcap is not None:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None]], dim=1)
    return torch.einsum("hl,hle->he", torch.softmax(scores, dim=1)[:, : keys.shape[1]], values)


def check_decoding(kernels: Kernels, case: Case) -> None:
    """Write a case's sequences, on the CPU, and read them in place."""
    rng = np.random.default_rng(case.seed)
    size = max(-(-end // case.block_size) for end in case.ends)
    blocks = 1 + size * len(case.ends)
    tables = rng.permutation(np.arange(1, blocks))[: size * len(case.ends)].reshape(len(case.ends), size)
    pool = KvPool(blocks - 1, case.block_size, kernels)
    heads = case.kv_heads * case.group

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(case.dtype)

    sequences = [(draw(end, case.kv_heads, case.width).transpose(0, 1), draw(case.kv_heads, end, case.width)) for end in case.ends]
    for table, end, (keys, values) in zip(tables, case.ends, sequences, strict=True):
        place = np.arange(end)
        slots = table[place // case.block_size] * case.block_size + place % case.block_size
        pool.write(0, Slots(slots, pool.slots), keys, values)
    query = draw(len(case.ends), heads, case.width).transpose(0, 1)
    sinks = draw(heads).float() if case.sinks else None
    rows = PagedRows(tables, np.array(case.ends), case.block_size, pool.blocks)
    found = kernels.decode(pool.layer(0), rows, case.window, query, Score(case.width**-0.5, case.softcap, sinks))
    tolerance = 1e-5 if case.dtype == torch.float32 else 0.02
    for row, (end, (keys, values)) in enumerate(zip(case.ends, sequences, strict=True)):
        first = max(0, end - case.window) if case.window else 0
        expected = _expected(case, query[:, row], keys[:, first:], values[:, first:], sinks)
        torch.testing.assert_close(found[row].double(), expected, atol=tolerance, rtol=tolerance)
