"""Rotary positions in one pass: a model's attention keeps its own code, and finds our function where that names transformers'.

Each attention that has one gets a forward of its own with the same code, so that nothing of transformers is changed for
others. As with modules, the function must give transformers' own values and gradients on trial inputs first.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lopa_server.engine.torch_engine.paging import RowFunctions
from lopa_server.engine.torch_engine.rows import DTYPES

NAME = "apply_rotary_pos_emb"
"""Of the function, in all of transformers' models that have one: (queries, keys, cosine, sine) to (queries, keys)."""
TRIAL = (2, 3, 5, 8)
"""Sequences, heads, positions and head width of the trial inputs."""

Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Rotations:
    """Makes forwards of attentions, for one model."""

    def __init__(self, functions: RowFunctions, device: torch.device, tolerance: dict[torch.dtype, float]) -> None:
        """functions: for this device. tolerance: by dtype, relative to a row's largest number."""
        self._functions, self._device, self._tolerance = functions, device, tolerance
        self._names: dict[Any, dict[str, Any] | None] = {}
        """By function of transformers: what its module's names mean with ours in its place, or None where that differs."""

    def forward(self, module: nn.Module) -> Callable[..., Any] | None:
        """The module's own forward with rotary positions in one pass; None where it has none, or computes them otherwise."""
        code = getattr(module.forward, "__func__", None)
        own = getattr(code, "__globals__", {}).get(NAME)
        if not isinstance(code, types.FunctionType) or own is None or NAME not in code.__code__.co_names:
            return None
        if own not in self._names:
            fused = functools.partial(_rotated, own, self._functions)
            self._names[own] = {**code.__globals__, NAME: fused} if self._agree(own, fused) else None
        names = self._names[own]
        if names is None:
            return None
        copy = types.FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
        copy.__kwdefaults__ = code.__kwdefaults__
        return types.MethodType(copy, module)

    def _agree(self, own: Rotate, fused: Rotate) -> bool:
        for dtype in DTYPES:
            generator = torch.Generator().manual_seed(0)
            query, key, *flowing = torch.randn(4, *TRIAL, generator=generator).to(self._device, dtype).unbind()
            turns = torch.randn(2, TRIAL[0], *TRIAL[2:], generator=generator).to(self._device, dtype).unbind()
            try:
                pairs = zip(*(_with_gradients(rotate, (query, key), turns, flowing) for rotate in (own, fused)), strict=True)
            except (TypeError, RuntimeError, ValueError):
                return False  # it takes something else
            for theirs, ours in pairs:
                if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
                    return False
                if bool(((theirs - ours).abs().float() > self._tolerance[dtype] * theirs.abs().amax(-1, keepdim=True)).any()):
                    return False
        return True


class _DifferentiatedTurn(torch.autograd.Function):
    """Rows turned by their positions, with a gradient for the rows."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, functions: RowFunctions) -> torch.Tensor:
        ctx.functions = functions
        ctx.save_for_backward(cosine, sine)
        return functions.rotate(rows, cosine, sine)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.functions.rotate(gradients[0], *ctx.saved_tensors, back=True), None, None, None


def _rotated(own: Rotate, functions: RowFunctions, *arrays: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As `own`, which does what we don't: other arguments, a rotation of a part of each row, turns that want a gradient."""
    if options or len(arrays) != 4 or not _fit(*arrays):
        return own(*arrays, **options)
    query, key, cosine, sine = arrays
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        query, key = (_DifferentiatedTurn.apply(rows, cosine, sine, functions) for rows in (query, key))  # type: ignore[no-untyped-call]
        return query, key
    return functions.rotate(query, cosine, sine), functions.rotate(key, cosine, sine)


def _fit(query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> bool:
    whole = query.dim() == key.dim() == 4 and query.shape[-1] == key.shape[-1] == cosine.shape[-1]
    plain = cosine.is_contiguous() and sine.is_contiguous() and not (cosine.requires_grad or sine.requires_grad)
    return whole and plain and query.dtype == key.dtype == cosine.dtype == sine.dtype and query.dtype in DTYPES


def _with_gradients(
    rotate: Rotate, rows: tuple[torch.Tensor, torch.Tensor], turns: tuple[torch.Tensor, ...], flowing: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Rotated queries and keys, then their gradients, given those of the rotated ones."""
    leaves = [one.clone().requires_grad_() for one in rows]
    with torch.enable_grad():
        values = rotate(*leaves, *turns)
    return [*(value.detach() for value in values), *torch.autograd.grad(values, leaves, flowing)]
