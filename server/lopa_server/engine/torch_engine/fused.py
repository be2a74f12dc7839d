"""Fewer passes over memory between a model's products, without touching its code: modules that are known by what they compute.

A module gets a fused forward only if that gives its own values on trial inputs, so an architecture that does something else
under a familiar name keeps its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lopa_server.engine.torch_engine.native.kernels import DTYPES, Kernels

TRIAL_SCALES = (0.02, 1.0, 50.0)
"""Of the trial inputs: what a model's layers may meet."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""Relative: bfloat16's last bits, or float32's, whose sums depend on their order."""

Forward = Callable[[torch.Tensor], torch.Tensor]


class Fusions:
    """The modules of a model that have a fused forward, which can be switched off and on. For the one thread that uses the model."""

    def __init__(self, model: nn.Module, kernels: Kernels | None) -> None:
        self._forwards: dict[nn.Module, Forward] = {}
        if kernels is None:
            return
        for module in model.modules():
            forward = _norm(module, kernels)
            if forward is not None:
                self._forwards[module] = forward
        self.on()

    def __len__(self) -> int:
        return len(self._forwards)

    def on(self) -> None:
        for module, forward in self._forwards.items():
            module.forward = forward

    def off(self) -> None:
        """Every module computes as transformers wrote it."""
        for module in self._forwards:
            del module.forward


def _norm(module: nn.Module, kernels: Kernels) -> Forward | None:
    """A root-mean-square norm in one pass: Llama's kind scales by the weight, Gemma's by 1 + weight."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    if weight.dtype not in DTYPES or weight.device.type != "cpu":
        return None
    own = module.forward
    for offset in (0.0, 1.0):
        norm = _Norm(kernels, module, epsilon, offset)
        fused = functools.partial(_normalized, own, norm)
        if _agree(own, fused, weight):
            return fused
    return None


@dataclass(frozen=True)
class _Norm:
    """A module's norm as the kernels compute it."""

    kernels: Kernels
    module: Any
    epsilon: float
    offset: float

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self.kernels.rms_norm(rows, self.module.weight, self.epsilon, self.offset)

    def backward(self, flowing: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self.kernels.rms_norm_backward(flowing, rows, self.module.weight, self.epsilon, self.offset)


class _Differentiated(torch.autograd.Function):
    """The norm with a gradient for its rows only: the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, norm: _Norm) -> torch.Tensor:
        ctx.norm = norm
        ctx.save_for_backward(rows)
        return norm(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.norm.backward(gradients[0], *ctx.saved_tensors), None


def _normalized(own: Forward, norm: _Norm, rows: torch.Tensor) -> torch.Tensor:
    if rows.dtype != norm.module.weight.dtype:
        return own(rows)
    if rows.requires_grad and torch.is_grad_enabled():
        return _Differentiated.apply(rows, norm)  # type: ignore[no-untyped-call]
    return norm(rows)


def _agree(own: Forward, fused: Forward, weight: torch.Tensor) -> bool:
    """Values, and gradients relative to the largest of their row: a sum of numbers that cancel is no more exact than these."""
    generator = torch.Generator().manual_seed(0)
    rows, flowing = torch.randn(2, len(TRIAL_SCALES), 4, len(weight), generator=generator).to(weight.dtype).unbind()
    rows = (rows * torch.tensor(TRIAL_SCALES, dtype=weight.dtype)[:, None, None]).requires_grad_()
    with torch.enable_grad():
        theirs, ours = own(rows), fused(rows)
        their_gradient, our_gradient = (torch.autograd.grad(values, rows, flowing)[0].float() for values in (theirs, ours))
    tolerance = TOLERANCE[weight.dtype]
    error = (their_gradient - our_gradient).abs() / their_gradient.abs().amax(dim=-1, keepdim=True)
    return torch.allclose(theirs.float(), ours.float(), rtol=tolerance, atol=tolerance) and bool((error <= tolerance).all())
