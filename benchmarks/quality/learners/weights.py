"""Methods that change the model itself: LoRA by PEFT, and full fine-tuning. Every step reads the whole text, since its keys change too."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from lopa_exporters.frozen import FrozenModel, PairLosses, PrefixStore, TokenPair
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.quality.learners.learner import Footprint, TorchLearner, bytes_at_rest, count, losses_without_soft_prompt

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""LoRA's matrices: those that multi-adapter servers support everywhere, and that our serving benchmark gives its peers."""
ADAPTERS = Path(__file__).parents[1] / "lora_priors.safetensors"
"""Of kinds of tasks, "task:parameter"; made by `benchmarks.quality.lora_priors`."""
RANK = 8
"""Of these."""
SCORING_BYTES = 1 << 29


class WeightLearner(TorchLearner):
    """fm: a copy of the model whose parameters with gradients are the personal ones. pace: part of the learning rate that they take."""

    def __init__(self, fm: FrozenModel, pace: float = 1.0) -> None:
        parameters = {name: tensor for name, tensor in fm.model.named_parameters() if tensor.requires_grad}
        super().__init__(parameters, dict.fromkeys(parameters, pace))
        self.fm = fm
        numbers = count(self.parameters)
        self.footprint = Footprint(numbers, server=bytes_at_rest(numbers))

    def losses(self, rows: Sequence[int], pairs: Sequence[TokenPair]) -> PairLosses:
        del rows
        if torch.is_grad_enabled():
            return self.fm.losses(None, pairs)
        # Within one call the weights stay: each prefix is read once, however many answers stand behind it.
        return losses_without_soft_prompt(dataclasses.replace(self.fm, prefixes=PrefixStore(SCORING_BYTES)), pairs)


def lora(fm: FrozenModel, seed: int, rank: int, start: Mapping[str, Tensor] | None = None, pace: float = 1.0) -> WeightLearner:
    """Hu et al. 2022: alpha is twice the rank, no dropout. start: an adapter to go on from, at `pace` times the learning rate."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS))
    learner = WeightLearner(dataclasses.replace(fm, model=inject_adapter_in_model(config, copy.deepcopy(fm.model))), pace)
    if start is not None:
        learner.restore(start)
    return learner


def adapter(task: str) -> dict[str, Tensor]:
    """What a population learnt of a kind of task, for `lora` to go on from."""
    return {name.removeprefix(f"{task}:"): tensor.float() for name, tensor in load_file(ADAPTERS).items() if name.startswith(f"{task}:")}


def full(fm: FrozenModel) -> WeightLearner:
    """Every weight."""
    return WeightLearner(dataclasses.replace(fm, model=copy.deepcopy(fm.model).requires_grad_(True)))
