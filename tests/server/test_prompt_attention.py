"""Prompts' attention by products with the softmax kernel between them, against torch's fused attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lopa_server.engine.torch_engine import products
from lopa_server.engine.torch_engine.attention import Score
from lopa_server.engine.torch_engine.native.elementwise import WIDEST
from lopa_server.engine.torch_engine.native.kernels import find_native_kernels

KERNELS = find_native_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no C compiler here, or one without OpenMP")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def masked(size: int, queries: int, own: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Every query reads something, the first position at least."""
    hidden = torch.rand(size, 1, queries, own, generator=generator) < 0.4
    hidden[..., 0] = False
    return torch.zeros(size, 1, queries, own).masked_fill(hidden, -torch.inf).to(dtype)


@example(size=1, queries=2, border=0, own=3, mask_each=False, dtype=torch.float32)
@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 40), st.sampled_from([1, 3, 16, 33, 200]), st.booleans(), DTYPES)
def test_softmax_is_torchs(size: int, queries: int, border: int, own: int, mask_each: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size + 7 * own)
    heads = 2
    scores = (10 * torch.randn(heads * size, queries, border + own, generator=generator)).to(dtype)
    masks = [masked(size if mask_each else 1, queries, own, dtype, generator)]
    if queries <= own:
        masks.append(
            torch.zeros(1, 1, queries, own, dtype=dtype).masked_fill_(~torch.ones(queries, own, dtype=torch.bool).tril(), -torch.inf)
        )
    for mask in masks:
        added = scores.float() * 0.3
        added[..., border:] += mask[:, 0].repeat(len(scores) // len(mask), 1, 1)
        wanted = torch.softmax(added, dim=-1)
        for given_mask in (mask, None) if len(masks) == 2 and mask is masks[1] else (mask,):
            parts = [part.clone(memory_format=torch.contiguous_format) for part in (scores[..., :border], scores[..., border:])]
            KERNELS.elementwise.softmax(parts[0] if border else None, parts[1], queries, 0.3, given_mask)
            ours = torch.cat(parts, dim=-1)
            torch.testing.assert_close(ours.float(), wanted, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
            assert not ours[..., border:][(mask[:, 0] == -torch.inf).repeat(len(scores) // len(mask), 1, 1)].any()


def test_what_is_no_number_stays_in_its_row() -> None:
    scores = torch.zeros(1, 4, 20)
    scores[0, 2, 3] = torch.nan
    KERNELS.elementwise.softmax(None, scores, 4, 1.0, None)
    assert [bool(row.isnan().any()) for row in scores[0]] == [False, False, False, False], "causal order: query 2 reads three positions"
    scores[0, 3, 3] = torch.nan
    KERNELS.elementwise.softmax(None, scores, 4, 1.0, None)
    assert [bool(row.isnan().any()) for row in scores[0]] == [False, False, False, True]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2]), st.integers(2, 40), st.sampled_from([0, 64]), st.booleans(), DTYPES)
def test_attention_is_that_of_torch(size: int, kv_heads: int, group: int, width: int, front: int, causal: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    own = width if causal else width + 9
    query = torch.randn(kv_heads * group, size * width, 16, generator=generator).to(dtype).unflatten(1, (size, width)).transpose(0, 1)
    keys, values = torch.randn(2, size, kv_heads, own, 16, generator=generator).to(dtype)
    mask = None if causal else masked(size, width, own, dtype, generator)
    torchs, ours = Score(0.25, None, None), Score(0.25, None, None, KERNELS.elementwise)
    if not front:
        torch.testing.assert_close(ours(query, keys, values, mask), torchs(query, keys, values, mask), rtol=0, atol=TOLERANCE[dtype])
        return
    shared = torch.randn(2, kv_heads, front, 16, generator=generator).to(dtype).unbind()
    mask = masked(size, width, own, dtype, generator) if mask is None else mask
    both = [one.behind(query, shared, (keys, values), mask) for one in (ours, torchs)]
    torch.testing.assert_close(*both, rtol=0, atol=TOLERANCE[dtype])


def test_more_positions_than_the_kernel_spans_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values = torch.randn(3, 1, 2, 5, 8).unbind()
    shared = torch.randn(2, 2, 64, 8).unbind()
    mask = torch.zeros(1, 1, 5, 5)
    score = Score(1.0, None, None, KERNELS.elementwise)
    usual = score(query, keys, values, None), score.behind(query, shared, (keys, values), mask)
    monkeypatch.setattr(products, "WIDEST", 4)
    monkeypatch.setattr(KERNELS.elementwise, "softmax", None)
    torch.testing.assert_close((score(query, keys, values, None), score.behind(query, shared, (keys, values), mask)), usual)
    assert dataclasses.replace(score, kernels=None)(query, keys, values, None).shape == query.shape


def test_scores_and_masks_that_do_not_go_together_never_reach_the_kernel() -> None:
    softmax, scores, mask = KERNELS.elementwise.softmax, torch.zeros(6, 4, 8), torch.zeros(3, 1, 4, 8)
    shared = torch.zeros(2, 12, 16)
    softmax(shared, scores, 4, 1.0, mask)
    for queries, other in ((5, None), (12, None), (0, None), (2, mask), (4, mask.bfloat16()), (4, mask[:0]), (4, mask[0]), (4, mask.mT)):
        with pytest.raises(IndexError):
            softmax(shared, scores, queries, 1.0, other)
    wide = torch.zeros(24, WIDEST - 7)
    for before in (shared.bfloat16(), shared[:1], shared.mT, wide, torch.zeros(23, 16)):
        with pytest.raises(IndexError):
            softmax(before, scores, 4, 1.0, None)
    for wrong in (scores.double(), scores[..., :7], torch.zeros(1, WIDEST + 1), torch.zeros(4, 0)):
        with pytest.raises(IndexError):
            softmax(None, wrong, 1, 1.0, None)
