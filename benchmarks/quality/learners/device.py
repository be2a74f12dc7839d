"""The shipped default: the bundle's own graphs step the factors, as on a device; only the wire is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from lopa.alignment import ENOUGH, aligned
from lopa.encoder import Moments, PromptEncoder, Tensors
from lopa.examples import batch
from lopa.factors import Factors
from lopa.priors import CHOSEN_BY, TRIAL_STEPS, choose, read_priors
from lopa_exporters.frozen import FrozenModel, PairLosses, TokenPair
from lopa_exporters.priors import DeviceSteps
from torch import Tensor

from benchmarks.quality.learners.learner import Footprint, State, losses_without_soft_prompt
from benchmarks.quality.material import Material


class DeviceLearner:
    """Starts where a device would, and takes the prior that fits the user's examples when a device would."""

    def __init__(
        self, fm: FrozenModel, encoder: PromptEncoder, material: Material, *, priors: bool = True, trial: int = TRIAL_STEPS
    ) -> None:
        """priors: whether one of the bundle's may be taken. trial: the steps after which it is, if those have not taught more."""
        self.fm, self.features, self.trial = fm, material.features, trial
        self.device = DeviceSteps(fm, encoder)
        self.rate, self.prior, self.taken_at = 1.0, "", 0
        self.held = (material.validation, material.of(material.validation))
        self.candidate, factors = self._candidate(material) if priors else ("", None)
        if factors is not None:
            self.candidate_nll = self._validation_nll(factors)
        rows = list(material.training)
        targets = [material.items[row].target for row in rows]
        self.device.factors = aligned(encoder, self.device.factors, targets, self._instance(rows))
        self.device.examples = len(rows)
        if trial == 0:
            self._judge()
        manifest = encoder.bundle.manifest
        size = len(self.device.factors.to_bytes())
        self.footprint = Footprint(self.device.factors.count, device=size, wire=manifest.rows * manifest.fm.hidden_size)

    def losses(self, rows: Sequence[int], pairs: Sequence[TokenPair]) -> PairLosses:
        return self.fm.losses(self.soft(rows), pairs)

    def step(self, rows: Sequence[int], pairs: Sequence[TokenPair], rate: float, number: int) -> None:
        if number == self.trial + 1:
            self._judge()
        self.device.step(self._instance(rows), pairs, self.rate * rate, number - self.taken_at)

    def state(self) -> State:
        return self.device.factors.tensors

    def at_rest(self, state: State) -> State:
        return dataclasses.replace(self.device.factors, tensors=state).at_rest().tensors

    def restore(self, state: State) -> None:
        self.device.factors = dataclasses.replace(self.device.factors, tensors=state)

    @torch.no_grad()
    def _candidate(self, material: Material) -> tuple[str, Factors | None]:
        """The prior that `lopa.tuner` would put on trial, by name, and its factors."""
        priors, count = read_priors(self.device.encoder.bundle), len(material.training)
        if not priors:
            return "", None
        rows = [material.training[place] for place in batch(count, min(CHOSEN_BY, count), 1, 0)]
        pairs, start, measured = material.of(rows), self.device.factors, {}
        for name, factors in {"": start, **priors}.items():
            self.device.factors = factors
            measured[name] = self.losses(rows, pairs).nll.tolist()
        self.device.factors = start
        plain = losses_without_soft_prompt(self.fm, pairs).nll.tolist()
        chosen = choose(plain, measured.pop(""), measured)
        return chosen, priors.get(chosen)

    @torch.no_grad()
    def _validation_nll(self, factors: Factors) -> float:
        """NLL per target token of the validation items under some factors."""
        kept, self.device.factors = self.device.factors, factors
        nll = self.losses(*self.held).mean().item()
        self.device.factors = kept
        return nll

    def _judge(self) -> None:
        """Take the candidate, unless what was learnt so far is better on the validation items."""
        bundle, name = self.device.encoder.bundle, self.candidate
        if not name or self._validation_nll(self.device.factors.at_rest()) <= self.candidate_nll:
            return
        self.device.factors, self.device.moments = read_priors(bundle)[name], Moments.zeros(bundle.manifest.personal)
        self.rate = next(prior.rate for prior in bundle.manifest.priors if prior.name == name)
        self.prior, self.taken_at, self.device.examples = name, self.trial, ENOUGH

    def _instance(self, rows: Sequence[int]) -> Tensors:
        return {name: value[list(rows)] for name, value in self.features.items()}

    def soft(self, rows: Sequence[int]) -> Tensor:
        """Some items' soft prompts: (b, m, d)."""
        return self.device.soft(self._instance(rows))
