"""Population priors: personal tensors for a kind of task, tuned on many people's examples, that new users may start from.

One set of factors is tuned on everybody's examples of the kind, as a device tunes its own: compose.onnx and update.onnx step it, with each
batch spread over persons. That is the transfer of soft prompts of Vu et al. 2022 (SPoT, section 3) for LoPA's factors. It suits tasks whose
answers mean the same for everybody; where each user has labels of their own, an average user is nobody's start (docs/quality.md).

Legend: b pairs, m soft-prompt rows, d hidden size.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lopa.alignment import ENOUGH, aligned, slowed
from lopa.bundle import Bundle, digest_file
from lopa.encoder import Moments, PromptEncoder, Tensors
from lopa.factors import Factors
from lopa.manifest import MANIFEST, PRIORS, PriorSpec
from lopa.tensorfile import write_tensors
from lopa.values import Float32
from torch import Tensor

from lopa_exporters.audit import Audit
from lopa_exporters.bundle import check_place, publish
from lopa_exporters.data import Example, Indices, persons_of, tokenize
from lopa_exporters.frozen import FrozenModel, TokenPair


@dataclass(frozen=True)
class PriorConfig:
    """How a prior is tuned. The learning rate rises over `warmup` steps and falls to zero."""

    steps: int = 300
    persons: int = 16
    """In one step, one example of each; all of them if there are fewer."""
    learning_rate: float = 3e-2
    warmup: int = 20
    rate: float = 0.1
    """Part of the learning rate that devices take from here (`PriorSpec.rate`)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.persons) < 1 or self.warmup < 0:
            raise ValueError("steps and persons must be at least 1, warmup not negative")
        if not 0 < self.learning_rate < np.inf or not 0 < self.rate < np.inf:
            raise ValueError("learning_rate and rate must be finite and above 0")

    def rate_at(self, number: int) -> float:
        """The learning rate of a step, which counts from 1."""
        return self.learning_rate * min(1.0, number / max(1, self.warmup)) * (1 - (number - 1) / self.steps)


class DeviceSteps:
    """Factors that are stepped as on a device, without the wire: compose.onnx gives soft prompts, update.onnx takes their gradient."""

    def __init__(self, fm: FrozenModel, encoder: PromptEncoder) -> None:
        manifest = encoder.bundle.manifest
        self.fm, self.encoder, self.clip = fm, encoder, manifest.tuning.clip
        self.factors, self.moments = Factors.start(encoder.bundle), Moments.zeros(manifest.personal)
        self.examples = ENOUGH
        """Training examples that the factors are tuned on; a prior's count as enough."""

    def soft(self, instance: Tensors) -> Tensor:
        """(b, m, d)."""
        return torch.from_numpy(self.encoder.compose(instance, self.factors.tensors))

    def step(self, instance: Tensors, pairs: Sequence[TokenPair], rate: float, number: int) -> float:
        """One step of AdamW on the mean over the pairs' target tokens, which is returned as it was before. number: counts from 1."""
        soft = self.soft(instance).to(self.fm.device).requires_grad_()
        losses = self.fm.losses(soft, pairs)
        mean = losses.mean()
        (gradient,) = torch.autograd.grad(mean, soft)
        update = self.encoder.update(
            instance,
            self.factors.tensors,
            self.moments,
            gradient.float().cpu().numpy(),
            learning_rate=rate,
            weight_decay=0.0,
            clip=self.clip,
            step=number,
        )
        tensors = slowed(self.encoder, self.factors.tensors, update.personal, self.examples)
        self.factors, self.moments = dataclasses.replace(self.factors, tensors=tensors), update.moments
        return mean.item()


def train_prior(
    fm: FrozenModel,
    encoder: PromptEncoder,
    examples: Sequence[Example],
    config: PriorConfig,
    on_step: Callable[[int, float], None] = lambda _step, _loss: None,
) -> Factors:
    """Tune one set of factors on everybody's examples of one kind. `on_step` gets a step's number and the NLL per token before it.

    Raises:
        DataError: an example does not fit the model's context.
    """
    pairs = tokenize(examples, fm, encoder.bundle.manifest.rows)
    instance = encoder.encode([example.prefix + example.prompt for example in examples])
    people = persons_of(examples)[1]
    device, rng = DeviceSteps(fm, encoder), np.random.default_rng(config.seed)
    device.factors = aligned(encoder, device.factors, [example.target for example in examples], instance)
    device.examples = len(examples)
    for number in range(1, config.steps + 1):
        rows = spread(people, config.persons, rng)
        batch: dict[str, Float32] = {name: value[rows] for name, value in instance.items()}
        on_step(number, device.step(batch, [pairs[row] for row in rows], config.rate_at(number), number))
    return device.factors


def spread(people: Sequence[Indices], count: int, rng: np.random.Generator) -> list[int]:
    """One row each of as many persons, drawn without replacement."""
    chosen = rng.permutation(len(people))[:count]
    return [int(rng.choice(people[person])) for person in chosen]


def add_priors(bundle: Bundle, priors: Mapping[str, Factors], rate: float, out: Path) -> Bundle:
    """Write a copy of a bundle with these priors, in place of any that it has, at `out`, which is replaced as a whole or not at all.

    The copy is another bundle, with an id of its own and no signature.

    Raises:
        ValueError: `out` exists and is not a bundle, or values that float16 cannot hold. BundleError: a name that a prior cannot have.
        ExportError: the copy does not pass the audit.
    """
    check_place(out)
    personal = bundle.manifest.personal
    if not_finite := [name for name, factors in priors.items() if not factors.at_rest().finite]:
        raise ValueError(f"priors {', '.join(not_finite)} have values that are not finite at rest")
    named = [(f"{name}.{spec.name}", spec, factors.tensors[spec.name]) for name, factors in priors.items() for spec in personal]
    specs = [dataclasses.replace(spec, name=name) for name, spec, _ in named]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / "bundle"
        shutil.copytree(bundle.folder, folder)
        (folder / PRIORS).write_bytes(write_tensors({name: tensor for name, _, tensor in named}, specs, {}))
        changed = dataclasses.replace(
            bundle.manifest,
            priors=tuple(PriorSpec(name, rate) for name in priors),
            files={**bundle.manifest.files, PRIORS: digest_file(folder / PRIORS)},
            signature="",
        )
        (folder / MANIFEST).write_text(changed.to_json(), encoding="utf-8")
        for _ in Audit(Bundle.open(folder)).run():
            pass
        publish(folder, out)
    return Bundle.open(out)
