"""The shipped default: the bundle's own three graphs step the factors, as on a device; only the wire is left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lopa.encoder import Moments, PromptEncoder
from lopa.factors import Factors
from lopa_exporters.frozen import FrozenModel, PairLosses, TokenPair
from torch import Tensor

from benchmarks.quality.learners.learner import CLIP, Footprint, State
from benchmarks.quality.material import Material


class DeviceLearner:
    """compose.onnx gives soft prompts, update.onnx takes their gradient."""

    def __init__(self, fm: FrozenModel, encoder: PromptEncoder, material: Material) -> None:
        self.fm, self.encoder, self.features = fm, encoder, material.features
        manifest = encoder.bundle.manifest
        self.factors = Factors.start(encoder.bundle)
        self.moments = Moments.zeros(manifest.personal)
        size = len(self.factors.to_bytes())
        self.footprint = Footprint(self.factors.count, device=size, wire=manifest.rows * manifest.fm.hidden_size)

    def losses(self, rows: Sequence[int], pairs: Sequence[TokenPair]) -> PairLosses:
        return self.fm.losses(self._soft(rows), pairs)

    def step(self, rows: Sequence[int], pairs: Sequence[TokenPair], rate: float, number: int) -> None:
        soft = self._soft(rows).requires_grad_()
        losses = self.fm.losses(soft, pairs)
        (gradient,) = torch.autograd.grad(losses.nll.sum() / losses.tokens.sum(), soft)
        update = self.encoder.update(
            {name: value[list(rows)] for name, value in self.features.items()},
            self.factors.tensors,
            self.moments,
            gradient.numpy(),
            learning_rate=rate,
            weight_decay=0.0,
            clip=CLIP,
            step=number,
        )
        self.factors, self.moments = self._with(update.personal), update.moments

    def state(self) -> State:
        return self.factors.tensors

    def at_rest(self, state: State) -> State:
        return self._with(state).at_rest().tensors

    def restore(self, state: State) -> None:
        self.factors = self._with(state)

    def _with(self, tensors: State) -> Factors:
        return Factors(tensors, self.factors.specs, self.factors.bundle_id, self.factors.fm_fingerprint)

    def _soft(self, rows: Sequence[int]) -> Tensor:
        """(b, m, d)."""
        instance = {name: value[list(rows)] for name, value in self.features.items()}
        return torch.from_numpy(self.encoder.compose(instance, self.factors.tensors))
