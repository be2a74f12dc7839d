"""The shipped default: the bundle's own graphs step the factors, as on a device; only the wire is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from lopa.alignment import aligned
from lopa.encoder import PromptEncoder, Tensors
from lopa.examples import batch
from lopa.priors import CHOSEN_BY, choose, read_priors
from lopa_exporters.frozen import FrozenModel, PairLosses, TokenPair
from lopa_exporters.priors import DeviceSteps
from torch import Tensor

from benchmarks.quality.learners.learner import Footprint, State, losses_without_soft_prompt
from benchmarks.quality.material import Material


class DeviceLearner:
    """Starts where a device would: at the bundle's plain start, or at the prior that fits the user's examples."""

    def __init__(self, fm: FrozenModel, encoder: PromptEncoder, material: Material, *, priors: bool = True) -> None:
        """priors: whether the bundle's may be taken. Where none is, the factors are aligned with the user's answers."""
        self.fm, self.features = fm, material.features
        self.device = DeviceSteps(fm, encoder)
        self.rate = 1.0
        self.prior = self._begin(material) if priors else ""
        if not self.prior:
            rows = list(material.training)
            targets = [material.items[row].target for row in rows]
            self.device.factors = aligned(encoder, self.device.factors, targets, self._instance(rows))
        manifest = encoder.bundle.manifest
        size = len(self.device.factors.to_bytes())
        self.footprint = Footprint(self.device.factors.count, device=size, wire=manifest.rows * manifest.fm.hidden_size)

    def losses(self, rows: Sequence[int], pairs: Sequence[TokenPair]) -> PairLosses:
        return self.fm.losses(self.soft(rows), pairs)

    def step(self, rows: Sequence[int], pairs: Sequence[TokenPair], rate: float, number: int) -> None:
        self.device.step(self._instance(rows), pairs, self.rate * rate, number)

    def state(self) -> State:
        return self.device.factors.tensors

    def at_rest(self, state: State) -> State:
        return dataclasses.replace(self.device.factors, tensors=state).at_rest().tensors

    def restore(self, state: State) -> None:
        self.device.factors = dataclasses.replace(self.device.factors, tensors=state)

    @torch.no_grad()
    def _begin(self, material: Material) -> str:
        """Take a prior as `lopa.tuner` does; its name."""
        bundle = self.device.encoder.bundle
        priors, count = read_priors(bundle), len(material.training)
        if not priors:
            return ""
        rows = [material.training[place] for place in batch(count, min(CHOSEN_BY, count), 1, 0)]
        pairs, start, measured = material.of(rows), self.device.factors, {}
        for name, factors in {"": start, **priors}.items():
            self.device.factors = factors
            measured[name] = self.losses(rows, pairs).nll.tolist()
        plain = losses_without_soft_prompt(self.fm, pairs).nll.tolist()
        chosen = choose(plain, measured.pop(""), measured)
        self.device.factors = priors.get(chosen, start)
        self.rate = next((prior.rate for prior in bundle.manifest.priors if prior.name == chosen), 1.0)
        return chosen

    def _instance(self, rows: Sequence[int]) -> Tensors:
        return {name: value[list(rows)] for name, value in self.features.items()}

    def soft(self, rows: Sequence[int]) -> Tensor:
        """Some items' soft prompts: (b, m, d)."""
        return self.device.soft(self._instance(rows))
