"""Methods that change the model itself: LoRA by PEFT, and full fine-tuning. Every step reads the whole text, since its keys change too."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
from lopa_exporters.frozen import FrozenModel, PairLosses, PrefixStore, TokenPair
from peft import LoraConfig, inject_adapter_in_model

from benchmarks.quality.learners.learner import Footprint, TorchLearner, bytes_at_rest, count, losses_without_soft_prompt

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""LoRA's matrices: those that multi-adapter servers support everywhere, and that our serving benchmark gives its peers."""
SCORING_BYTES = 1 << 29


class WeightLearner(TorchLearner):
    """fm: a copy of the model whose parameters with gradients are the personal ones."""

    def __init__(self, fm: FrozenModel) -> None:
        super().__init__({name: tensor for name, tensor in fm.model.named_parameters() if tensor.requires_grad})
        self.fm = fm
        numbers = count(self.parameters)
        self.footprint = Footprint(numbers, server=bytes_at_rest(numbers))

    def losses(self, rows: Sequence[int], pairs: Sequence[TokenPair]) -> PairLosses:
        del rows
        if torch.is_grad_enabled():
            return self.fm.losses(None, pairs)
        # Within one call the weights stay: each prefix is read once, however many answers stand behind it.
        return losses_without_soft_prompt(dataclasses.replace(self.fm, prefixes=PrefixStore(SCORING_BYTES)), pairs)


def lora(fm: FrozenModel, seed: int, rank: int) -> WeightLearner:
    """Hu et al. 2022: alpha is twice the rank, no dropout."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS))
    return WeightLearner(dataclasses.replace(fm, model=inject_adapter_in_model(config, copy.deepcopy(fm.model))))


def full(fm: FrozenModel) -> WeightLearner:
    """Every weight."""
    return WeightLearner(dataclasses.replace(fm, model=copy.deepcopy(fm.model).requires_grad_(True)))
