"""Personal tensors of several persons side by side, and the device's own optimizer step over all of them at once.

Legend: p persons, n rows of each, h encoder width, m soft-prompt rows, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lopa_exporters.adamw import AdamFactors, adam_factors, adamw
from lopa_exporters.graphs import MOMENTS
from lopa_exporters.lopa import LoPAConfig, Tensors, soft_prompt


@dataclass(frozen=True)
class StepSettings:
    """One AdamW step, as `lopa.manifest.TuningDefaults` has it."""

    learning_rate: float
    weight_decay: float = 0.0
    clip: float = 1.0


@dataclass(frozen=True)
class Cohort:
    """tensors: NAME, `exp_avg.NAME` and `exp_avg_sq.NAME`, each (p, ...); ages: (p,) int64, steps taken."""

    tensors: Tensors
    ages: Tensor

    @classmethod
    def start(cls, start: Mapping[str, Tensor], count: int) -> Cohort:
        """`count` new persons."""
        tensors = {name: tensor.expand(count, *tensor.shape).clone() for name, tensor in start.items()}
        moments = {f"{moment}.{name}": torch.zeros_like(tensor) for moment in MOMENTS for name, tensor in tensors.items()}
        return cls(tensors | moments, torch.zeros(count, dtype=torch.int64))

    def personal(self, names: Mapping[str, Tensor], who: Tensor) -> Tensors:
        """Fresh copies of the personal tensors of persons `who` (p',), by name."""
        return {name: self.tensors[name][who] for name in names}

    def step(self, who: Tensor, gradients: Mapping[str, Tensor], settings: StepSettings, lifetime: int = 0) -> Tensor:
        """One step of each person in `who`, in place. Gradients (p', ...) by name.

        Each person's gradient is clipped by its own norm. lifetime: steps over which each person's rate falls linearly to zero,
        as on a device; 0 keeps it constant. Returns the norms before clipping, (p',).
        """
        norms = torch.stack([gradient.flatten(1).square().sum(dim=1) for gradient in gradients.values()]).sum(dim=0).sqrt()
        scales = (settings.clip / (norms + 1e-6)).clamp(max=1.0)
        rates = settings.learning_rate * (1 - self.ages[who].float() / lifetime if lifetime else torch.ones(len(who)))
        self.ages[who] += 1
        factors = adam_factors(rates, torch.tensor(settings.weight_decay), self.ages[who].float())
        for name, gradient in gradients.items():
            spread = (-1, *[1] * (gradient.dim() - 1))
            keys = (name, *(f"{moment}.{name}" for moment in MOMENTS))
            parameter, first, second = (self.tensors[key][who] for key in keys)
            own = AdamFactors(*(factor.reshape(spread) for factor in factors))
            results = adamw(parameter, scales.reshape(spread) * gradient, first, second, own)
            for key, result in zip(keys, results, strict=True):
                self.tensors[key][who] = result
        return norms

    def restart(self, who: int, start: Mapping[str, Tensor]) -> None:
        """Person `who` begins anew, in place."""
        for name, tensor in start.items():
            self.tensors[name][who] = tensor
            for moment in MOMENTS:
                self.tensors[f"{moment}.{name}"][who] = 0
        self.ages[who] = 0


def soft_prompts(config: LoPAConfig, shared: Tensors, personal: Mapping[str, Tensor], x: Tensor, dropout: float = 0.0) -> Tensor:
    """Every person's own soft prompts: personal (p, ...), x (p, n, h) -> (p, n, m, d)."""

    def one(tensors: Tensors, features: Tensor) -> Tensor:
        return soft_prompt(config, shared, tensors, features, dropout)

    return torch.func.vmap(one, randomness="different")(dict(personal), x)
