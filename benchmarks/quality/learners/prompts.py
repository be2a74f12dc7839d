"""Soft prompts in torch: plain prompt tuning from PEFT, IDPG, and LoPA in every profile and composition.

Legend: b pairs, m soft-prompt rows, d hidden size, h encoder width, w width of an inner layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from lopa.alignment import share
from lopa_exporters.frozen import FrozenModel, PairLosses, TokenPair
from lopa_exporters.lopa import LoPA, LoPAConfig, aligned, init_lopa, soft_prompt
from peft import PromptEmbedding, PromptTuningConfig, PromptTuningInit, TaskType
from torch import Tensor

from benchmarks.quality.learners.learner import Footprint, TorchLearner, bytes_at_rest, count
from benchmarks.quality.learners.starts import at_answers
from benchmarks.quality.material import Material

SoftPrompts = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""(parameters, features (b, h)) -> (b, m, d)."""
IDPG_WIDTH = 16
"""w; Wu et al.'s own code has 16 for a generator in every layer, LoPA's repository 256 for one at the input, as here."""


class PromptLearner(TorchLearner):
    """A function from parameters and an item's features to its soft prompt."""

    def __init__(
        self,
        fm: FrozenModel,
        material: Material,
        parameters: Mapping[str, Tensor],
        soft: SoftPrompts,
        paces: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__({name: tensor.detach().clone().requires_grad_() for name, tensor in parameters.items()}, paces)
        self.fm, self.soft = fm, soft
        (features,) = material.features.values()
        self.features = torch.from_numpy(features)
        with torch.no_grad():
            wire = soft(self.parameters, self.features[:1]).numel()
        numbers = count(self.parameters)
        self.footprint = Footprint(numbers, device=bytes_at_rest(numbers), wire=wire)

    def losses(self, rows: Sequence[int], pairs: Sequence[TokenPair]) -> PairLosses:
        return self.fm.losses(self.soft(self.parameters, self.features[list(rows)]), pairs)


def prompt_tuning(fm: FrozenModel, material: Material, seed: int, *, rows: int, start: str) -> PromptLearner:
    """Lester et al. 2021, with PEFT's start values. start: "RANDOM" is N(0, 1), "SAMPLE_VOCAB" rows of the vocabulary's embeddings."""
    torch.manual_seed(seed)
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=rows,
        token_dim=fm.hidden,
        num_transformer_submodules=1,
        prompt_tuning_init=PromptTuningInit(start),
    )
    weight = PromptEmbedding(config, fm.model.get_input_embeddings()).embedding.weight
    return PromptLearner(fm, material, {"prompt": weight}, lambda tensors, x: tensors["prompt"].expand(len(x), -1, -1))


def from_prompt(fm: FrozenModel, material: Material, start: Tensor, gain: float) -> PromptLearner:
    """Prompt tuning from a given soft prompt, (m, d), at `gain` times the learning rate."""
    return PromptLearner(fm, material, {"prompt": start / gain}, lambda tensors, x: gain * tensors["prompt"].expand(len(x), -1, -1))


def idpg(fm: FrozenModel, material: Material, seed: int, *, rows: int) -> PromptLearner:
    """Wu et al. 2022, without the PHM variant: the whole prompt is W2 tanh(W1 x + b1) + b2, for each item its own."""
    generator = torch.Generator().manual_seed(seed)
    width = next(iter(material.features.values())).shape[1]
    vocabulary = fm.vocabulary()
    picked = vocabulary[torch.randperm(len(vocabulary), generator=generator)[:rows]]
    parameters = {
        "W1": torch.randn(IDPG_WIDTH, width, generator=generator) * width**-0.5,
        "b1": torch.zeros(IDPG_WIDTH),
        "W2": 0.02 * torch.randn(rows * fm.hidden, IDPG_WIDTH, generator=generator),
        "b2": picked.flatten(),
    }

    def soft(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        inner = torch.tanh(x @ tensors["W1"].T + tensors["b1"])
        return (inner @ tensors["W2"].T + tensors["b2"]).view(len(x), rows, -1)

    return PromptLearner(fm, material, parameters, soft)


def heads(fm: FrozenModel, material: Material, seed: int, config: LoPAConfig, z_rate: float = 1.0) -> PromptLearner:
    """The paper's LoPA and its ablations: Z_S and both heads are personal and start at random.

    z_rate: how many times the heads' learning rate Z_S has: its gain, since a step of Adam moves every tensor alike.
    """
    lopa = init_lopa(config, fm.vocabulary(), torch.Generator().manual_seed(seed))
    scaled = replace(lopa, start={**lopa.start, "Z": lopa.start["Z"] / z_rate})
    return from_lopa(fm, material, scaled, z_rate)


def from_answers(fm: FrozenModel, material: Material, lopa: LoPA) -> PromptLearner:
    """LoPA as a device begins: what the corrections read tells the user's own answers apart, and counts for less with few of them."""
    paces = dict.fromkeys(aligned(lopa), share(len(material.training)))
    return from_lopa(fm, material, at_answers(lopa, material), paces=paces)


def from_lopa(
    fm: FrozenModel, material: Material, lopa: LoPA, z_gain: float = 1.0, paces: Mapping[str, float] | None = None
) -> PromptLearner:
    """LoPA in any profile: what is shared stays as it is. The config's dropout applies wherever gradients are taken, as in the paper.

    z_gain: factor of a personal Z_S. paces: as `TorchLearner` has them.
    """

    def soft(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        gained = {"Z": z_gain * tensors["Z"]} if "Z" in tensors else {}
        return soft_prompt(lopa.config, lopa.shared, {**tensors, **gained}, x, lopa.config.dropout if torch.is_grad_enabled() else 0.0)

    return PromptLearner(fm, material, lopa.start, soft, paces)
