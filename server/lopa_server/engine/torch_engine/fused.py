"""Fewer passes over memory between a model's products, without touching its code: modules that are known by what they compute.

A module gets a fused forward only if that gives its own values on trial inputs, so an architecture that does something else
under a familiar name keeps its own. Where a gradient is wanted, every module's own forward runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lopa_server.engine.torch_engine.native.kernels import DTYPES, Kernels

TRIAL_SCALES = (0.02, 1.0, 50.0)
"""Of the trial inputs: what a model's layers may meet."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""Relative: bfloat16's last bit, or float32's last few, whose sums depend on their order."""

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
        fused = functools.partial(_normalized, own, kernels, module, epsilon, offset)
        if _agree(own, fused, weight):
            return fused
    return None


def _normalized(own: Forward, kernels: Kernels, module: Any, epsilon: float, offset: float, rows: torch.Tensor) -> torch.Tensor:
    if rows.dtype != module.weight.dtype or (rows.requires_grad and torch.is_grad_enabled()):
        return own(rows)
    return kernels.rms_norm(rows, module.weight, epsilon, offset)


@torch.inference_mode()
def _agree(own: Forward, fused: Forward, weight: torch.Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(TRIAL_SCALES), 4, len(weight), generator=generator)
    rows = (rows * torch.tensor(TRIAL_SCALES)[:, None, None]).to(weight.dtype)
    tolerance = TOLERANCE[weight.dtype]
    return torch.allclose(own(rows).float(), fused(rows).float(), rtol=tolerance, atol=tolerance)
