"""Fewer passes over memory between a model's products, without touching its code: modules that are known by what they compute.

A module gets a fused forward only if that gives its own values and gradients on trial inputs, so an architecture that does
something else under a familiar name keeps its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lopa_server.engine.torch_engine.packed import JointPart, PackedLinear
from lopa_server.engine.torch_engine.paging import RowFunctions
from lopa_server.engine.torch_engine.rotary import Rotations
from lopa_server.engine.torch_engine.rows import DTYPES

TRIAL_SCALES = (0.02, 1.0, 50.0)
"""Of the trial inputs: what a model's layers may meet."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""Relative to a row's largest number: bfloat16's last bits, or float32's, whose sums depend on their order."""

Forward = Callable[..., Any]


class Fusions:
    """The modules of a model that have a fused forward, which can be switched off and on. For the one thread that uses the model."""

    def __init__(self, model: nn.Module, functions: RowFunctions | None, device: torch.device) -> None:
        """functions: for this device, on which the model is."""
        self._forwards: dict[nn.Module, Forward] = {}
        if functions is None:
            return
        rotations = Rotations(functions, device, TOLERANCE)
        for module in model.modules():
            forward = _norm(module, functions) or _gated(module, functions, device) or rotations.forward(module)
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


def _norm(module: nn.Module, functions: RowFunctions) -> Forward | None:
    """A root-mean-square norm in one pass: Llama's kind scales by the weight, Gemma's by 1 + weight."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    if weight.dtype not in DTYPES:
        return None
    own = module.forward
    for offset in (0.0, 1.0):
        fused = functools.partial(_normalized, own, _Norm(functions, module, epsilon, offset))
        if _agree(own, fused, len(weight), weight.dtype, weight.device):
            return fused
    return None


def _gated(module: Any, functions: RowFunctions, device: torch.device) -> Forward | None:
    """A feed-forward part with a gate, where the gate's SiLU and its product with the rest are one pass."""
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activation = type(getattr(module, "act_fn", None)).__name__
    if not all(isinstance(layer, nn.Linear | PackedLinear | JointPart) for layer in layers) or activation not in ("SiLU", "SiLUActivation"):
        return None
    fused = functools.partial(_through_gate, module, functions)
    dtype = next((tensor.dtype for tensor in module.parameters()), torch.bfloat16)  # packed layers have no parameters
    return fused if dtype in DTYPES and _agree(module.forward, fused, module.gate_proj.in_features, dtype, device) else None


@dataclass(frozen=True)
class _Norm:
    """A module's norm as our functions compute it."""

    functions: RowFunctions
    module: Any
    epsilon: float
    offset: float

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self.functions.rms_norm(rows, self.module.weight, self.epsilon, self.offset)

    def backward(self, flowing: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self.functions.rms_norm_backward(flowing, rows, self.module.weight, self.epsilon, self.offset)


class _DifferentiatedNorm(torch.autograd.Function):
    """The norm with a gradient for its rows only: the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, norm: _Norm) -> torch.Tensor:
        ctx.norm = norm
        ctx.save_for_backward(rows)
        return norm(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.norm.backward(gradients[0], *ctx.saved_tensors), None


class _DifferentiatedGate(torch.autograd.Function):
    """SiLU of the gate, times up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, functions: RowFunctions) -> torch.Tensor:
        ctx.functions = functions
        ctx.save_for_backward(gate, up)
        return functions.silu_mul(gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return (*ctx.functions.silu_mul_backward(gradients[0], *ctx.saved_tensors), None)


def _normalized(own: Forward, norm: _Norm, rows: torch.Tensor) -> torch.Tensor:
    if rows.dtype != norm.module.weight.dtype:
        return own(rows)
    if rows.requires_grad and torch.is_grad_enabled():
        return _DifferentiatedNorm.apply(rows, norm)  # type: ignore[no-untyped-call]
    return norm(rows)


def _through_gate(module: Any, functions: RowFunctions, rows: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(rows), module.up_proj(rows)
    if gate.requires_grad and torch.is_grad_enabled():
        return module.down_proj(_DifferentiatedGate.apply(gate, up, functions))  # type: ignore[no-untyped-call]
    return module.down_proj(functions.silu_mul(gate, up))


def _agree(own: Forward, fused: Forward, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Values and gradients on trial inputs, each relative to the largest of its row: sums of numbers that cancel are no more exact."""
    generator = torch.Generator().manual_seed(0)
    rows, flowing = torch.randn(2, len(TRIAL_SCALES), 4, width, generator=generator).to(device, dtype).unbind()
    rows = (rows * torch.tensor(TRIAL_SCALES, dtype=dtype, device=device)[:, None, None]).requires_grad_()
    with torch.enable_grad():
        try:
            theirs = own(rows)
        except TypeError:
            return False  # it takes more than rows
        ours = fused(rows)
        pairs = [(theirs, ours), tuple(torch.autograd.grad(values, rows, flowing)[0] for values in (theirs, ours))]
    return all(bool((_differences(*pair) <= TOLERANCE[dtype]).all()) for pair in pairs)


def _differences(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    theirs, ours = theirs.detach().float(), ours.detach().float()
    return (theirs - ours).abs() / theirs.abs().amax(dim=-1, keepdim=True)
