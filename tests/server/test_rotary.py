"""Rotary positions in one pass: transformers' values and gradients, and its own function wherever ours doesn't do what that does."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
from lopa_server.engine.torch_engine.fused import TOLERANCE
from lopa_server.engine.torch_engine.native.kernels import find_native_kernels
from lopa_server.engine.torch_engine.paging import HOST
from lopa_server.engine.torch_engine.rotary import NAME, Rotations
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as of_a_part
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as of_all

KERNELS = find_native_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no C compiler here, or one without OpenMP")
Pair = tuple[torch.Tensor, torch.Tensor]


def interleaved(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    """As GPT-J has it: numbers side by side are a pair."""

    def turned(rows: torch.Tensor) -> torch.Tensor:
        across = torch.stack((-rows[..., 1::2], rows[..., ::2]), dim=-1).flatten(-2)
        return rows * cos[:, None] + across * sin[:, None]

    return turned(q), turned(k)


def attention(function: Callable[..., Pair]) -> torch.nn.Module:
    """A module whose forward finds the function under its usual name, among its file's names."""

    def forward(self: torch.nn.Module, *arrays: torch.Tensor) -> Pair:
        del self
        return apply_rotary_pos_emb(*arrays)  # type: ignore[name-defined]  # noqa: F821 (below)

    named = types.FunctionType(forward.__code__, {NAME: function, "__builtins__": __builtins__}, "forward")
    module: torch.nn.Module = type("OneAttention", (torch.nn.Module,), {"forward": named})()
    return module


def fused(function: Callable[..., Pair]) -> Callable[..., Pair] | None:
    return Rotations(KERNELS.elementwise, HOST, TOLERANCE).forward(attention(function))


def arrays(dtype: torch.dtype, heads: int, places: int, width: int, turns: int = 1) -> list[torch.Tensor]:
    """Queries, half as many keys, as models have them: views of (b, t, h, e); cosines and sines of as many sequences as `turns`."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, places, heads, width), (2, places, max(1, heads // 2), width), *[(turns, places, width)] * 2]
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [drawn[0].transpose(1, 2), drawn[1].transpose(1, 2), *drawn[2:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "places", "width", "turns"), [(4, 5, 16, 1), (1, 1, 2, 2), (12, 64, 64, 2), (3, 7, 80, 1)])
@pytest.mark.parametrize("function", [of_all, of_a_part], ids=["llama", "gpt-neox"])
def test_values_and_gradients_are_those_of_transformers(
    function: Callable[..., Pair], dtype: torch.dtype, heads: int, places: int, width: int, turns: int
) -> None:
    mine, given = fused(function), arrays(dtype, heads, places, width, turns)
    assert mine is not None
    for rotate in (function, mine):
        assert rotate(*given)[0].shape == given[0].shape
    for theirs, ours in zip(function(*given), mine(*given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * TOLERANCE[dtype])
    leaves = [one.clone().requires_grad_() for one in given[:2]]
    flowing = [torch.randn(one.shape).to(dtype) for one in leaves]
    theirs, ours = (torch.autograd.grad(rotate(*leaves, *given[2:]), leaves, flowing) for rotate in (function, mine))
    for their, our in zip(theirs, ours, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=2 * TOLERANCE[dtype])


def test_a_part_of_each_row_and_turns_with_gradients_go_to_the_own_function() -> None:
    mine = fused(of_a_part)
    query, key, cosine, sine = arrays(torch.float32, 2, 3, 16)
    assert mine is not None
    torch.testing.assert_close(
        mine(query, key, cosine[..., :8], sine[..., :8]), of_a_part(query, key, cosine[..., :8], sine[..., :8]), rtol=0, atol=0
    )
    assert mine(query, key, cosine.requires_grad_(), sine)[0].grad_fn is not None


def test_a_function_that_computes_something_else_stays() -> None:
    assert fused(interleaved) is None
    assert fused(lambda q, k: (q, k)) is None
    assert Rotations(KERNELS.elementwise, HOST, TOLERANCE).forward(torch.nn.Linear(2, 2)) is None


def test_turns_that_do_not_go_with_the_rows_never_reach_the_kernel() -> None:
    query, _, cosine, sine = arrays(torch.float32, 2, 3, 16)
    bad = [(cosine[:, :2], sine[:, :2]), (cosine[..., :8], sine[..., :8]), (cosine.bfloat16(), sine.bfloat16()), (cosine, sine[:, :2])]
    bad += [(cosine.expand(3, -1, -1).contiguous(), sine.expand(3, -1, -1).contiguous()), (cosine, sine.mT.contiguous().mT)]
    for turns in bad:
        with pytest.raises(IndexError):
            KERNELS.elementwise.rotate(query, *turns)
    with pytest.raises(IndexError):
        KERNELS.elementwise.rotate(query[..., :15], cosine[..., :15].contiguous(), sine[..., :15].contiguous())
