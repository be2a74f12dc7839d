"""From models on disk and a population's examples to a bundle: the whole way that `lopa export` goes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from lopa.bundle import Bundle
from lopa.manifest import MAX_FILE_BYTES, FMSpec, TuningDefaults

from lopa_exporters.backbone import plain_tokenizer
from lopa_exporters.bundle import check_place, export_bundle, read_fm_spec
from lopa_exporters.curves import EventWriter, plot
from lopa_exporters.data import Dataset, Example, build_dataset, persons_of, read_examples, split_rows
from lopa_exporters.defaults import Z_GAIN
from lopa_exporters.encoder import Encoder, EncoderConfig, NoEncoder
from lopa_exporters.frozen import FrozenModel
from lopa_exporters.lopa import LoPA, LoPAConfig, init_lopa
from lopa_exporters.population import PopulationConfig, PopulationTrainer
from lopa_exporters.probes import PROBES
from lopa_exporters.quality import Gate, Quality, Shrinker
from lopa_exporters.trained import Trained

MEASURED = 64
"""Examples that a quantized encoder is measured on."""


class Reporter(Protocol):
    """Who is told what happens."""

    def task(self, title: str, total: int | None) -> contextlib.AbstractContextManager[Callable[[int, str], None]]:
        """A stage of work. Inside, call with the units newly done and a few words; total None: it can't be counted."""
        ...


@dataclass(frozen=True)
class ExportPlan:
    """What to make a bundle from."""

    fm: Path
    """Folder of the foundation model."""
    out: Path
    encoder: EncoderConfig
    method: LoPAConfig
    """Its `hidden` and `features` are replaced by those of the models."""
    gain_from_vocabulary: bool = True
    """Profile factors: set `z_gain` to `defaults.Z_GAIN` root mean squares of the model's embeddings."""
    population: Path | None = None
    """Examples to train the shared part on; without them the heads stay random, and features are standardized over `probes`."""
    run: Path | None = None
    """Folder of the training run; needed with a population. An interrupted run there goes on."""
    training: PopulationConfig = dataclasses.field(default_factory=PopulationConfig)
    tuning: TuningDefaults = dataclasses.field(default_factory=TuningDefaults)
    personal_dtype: str | None = None
    bf16: bool = False
    """Train under bfloat16 autocast."""
    seed: int = 0
    """Of the start values."""
    fm_name: str = ""
    """What the manifest calls the model; empty is its folder's name."""
    quantize: str = "none"
    """A scheme of `lopa_exporters.quantize`, or "none"."""
    gate: Gate = dataclasses.field(default_factory=Gate)
    """What a quantized encoder may cost."""
    examples: Path | None = None
    """What the cost is measured on; else the population's held examples; without either, `lopa_exporters.probes`."""
    trained: Path | None = None
    """Folder of a finished run: its encoder, method and values take the place of those above, and nothing is trained."""


@dataclass(frozen=True)
class Made:
    """A finished bundle, and what its quantized encoder costs."""

    bundle: Bundle
    quality: Quality | None


def make_bundle(plan: ExportPlan, reporter: Reporter) -> Made:
    """Load, train where there is a population, export, verify.

    Raises:
        ValueError, OSError: a model, a file or a setting that cannot be used. DataError: an example that cannot be.
        ExportError: an exported graph is not what torch computes, or a quantized one costs more than the gate allows.
    """
    check_place(plan.out)
    spec, fm, encoder, lopa = load_parts(plan, reporter)
    if plan.quantize == "none" and isinstance(encoder, Encoder) and encoder.weight_bytes > MAX_FILE_BYTES:
        size = f"{encoder.weight_bytes / 2**30:.1f} GiB of weights; a device takes a file of 1"
        raise ValueError(f"encoder {encoder.config.label} has {size}: quantize it, or keep fewer layers")
    if plan.population is not None and plan.trained is None:
        dataset = prepare(plan.population, fm, encoder, lopa.config, reporter)
        if trains(lopa, plan.training):
            lopa = _train(plan, fm, dataset, lopa, reporter)
    shrinker = make_shrinker(plan, fm, encoder, lopa)
    with reporter.task("Exporting and verifying", None):
        bundle = export_bundle(
            plan.out, fm=spec, encoder=encoder, lopa=lopa, tuning=plan.tuning, personal_dtype=plan.personal_dtype, shrink=shrinker
        )
    return Made(bundle, shrinker.quality if shrinker else None)


def load_parts(plan: ExportPlan, reporter: Reporter) -> tuple[FMSpec, FrozenModel, Encoder | NoEncoder, LoPA]:
    """Foundation model, encoder and LoPA: fresh, or as a finished run left them.

    Raises:
        ValueError: the run was for another model, or is not finished.
    """
    with reporter.task("Loading models", None):
        spec = read_fm_spec(plan.fm, plan.fm_name)
        fm = FrozenModel.load(plan.fm, bf16=plan.bf16)
        if plan.trained is None:
            encoder = load_encoder(plan.encoder, plan.method, fm)
            if plan.population is None and isinstance(encoder, Encoder):
                encoder.standardize(encoder.encode([probe.prefix + probe.prompt for probe in PROBES]))
            return spec, fm, encoder, start_lopa(plan, fm, encoder)
        trained = Trained.load(plan.trained)
        if trained.fingerprint != spec.fingerprint:
            raise ValueError(f"{plan.trained} was trained for the model {trained.fingerprint[:16]}; {spec.name} is {spec.fingerprint[:16]}")
        encoder = load_encoder(trained.encoder, trained.lopa.config, fm)
        trained.apply(encoder)
        return spec, fm, encoder, trained.lopa


def train(plan: ExportPlan, reporter: Reporter) -> Path:
    """Train the shared part to the end in `plan.run`: checkpoints, log, TensorBoard events, curves.png and the result. Returns the picture.

    Raises:
        ValueError, OSError: a model, a file or a setting that cannot be used; a method that has nothing to train.
        DataError: an example that cannot be used.
    """
    if plan.population is None or plan.run is None:
        raise ValueError("training needs a population and a folder for its run")
    spec, fm, encoder, lopa = load_parts(plan, reporter)
    if not trains(lopa, plan.training):
        raise ValueError(f"profile {plan.method.profile} shares nothing; give start_rate to train where its users begin")
    dataset = prepare(plan.population, fm, encoder, lopa.config, reporter)
    lopa = _train(plan, fm, dataset, lopa, reporter)
    Trained.of(spec.fingerprint, encoder, lopa, plan.training.personal.learning_rate).save(plan.run)
    return plot(plan.run)


def make_shrinker(plan: ExportPlan, fm: FrozenModel, encoder: Encoder | NoEncoder, lopa: LoPA) -> Shrinker | None:
    """What makes the encoder smaller and measures the cost; None where nothing is to be quantized.

    Raises:
        ValueError: there is no encoder to quantize.
    """
    if plan.quantize == "none":
        return None
    if not isinstance(encoder, Encoder):
        raise ValueError(f"quantize is {plan.quantize}; a method without an instance part has no encoder")
    encoder.config = dataclasses.replace(encoder.config, name=f"{encoder.config.label}, {plan.quantize}")
    if plan.examples is not None:
        examples = spread(read_examples(plan.examples))
    elif plan.population is not None:
        everybody = read_examples(plan.population)
        held = np.concatenate(split_rows(persons_of(everybody)[1], plan.training.validation)[1])
        examples = spread([everybody[i] for i in held] or everybody)
    else:
        examples = list(PROBES)
    dataset = build_dataset(examples, fm, encoder, soft_rows=lopa.config.soft_prompt_rows, standardize=False)
    return Shrinker(plan.quantize, encoder, lopa, fm, examples, dataset, plan.gate)


def spread(examples: Sequence[Example], count: int = MEASURED) -> list[Example]:
    """At most `count` examples, evenly over all."""
    places = np.linspace(0, len(examples) - 1, min(count, len(examples))).round().astype(np.int64)
    return [examples[i] for i in places]


def load_encoder(config: EncoderConfig, method: LoPAConfig, fm: FrozenModel) -> Encoder | NoEncoder:
    """The encoder, on the model's device while it is used; a constant for methods without an instance part."""
    if not method.has_instance_part:
        return NoEncoder(plain_tokenizer(fm.tokenizer.backend_tokenizer))
    return Encoder.load(config)


def start_lopa(plan: ExportPlan, fm: FrozenModel, encoder: Encoder | NoEncoder) -> LoPA:
    """Start values for these models.

    Raises:
        ValueError: Z_S and the heads are larger than a device's file.
    """
    vocabulary = fm.vocabulary()
    method = dataclasses.replace(plan.method, hidden=fm.hidden, features=encoder.width)
    item = 2 if method.profile != "factors" and plan.personal_dtype == "F16" else 4  # shared tensors are float32 in the graphs
    size = item * sum(map(math.prod, method.full_shapes().values()))
    if size > MAX_FILE_BYTES:
        raise ValueError(
            f"soft prompt and heads are {size / 2**30:.1f} GiB; a device takes a file of 1: fewer rows, or a smaller rank or head width"
        )
    if plan.gain_from_vocabulary and method.profile == "factors":
        method = dataclasses.replace(method, z_gain=float(f"{Z_GAIN * vocabulary.square().mean().sqrt().item():.4g}"))
    return init_lopa(method, vocabulary, torch.Generator().manual_seed(plan.seed))


def trains(lopa: LoPA, training: PopulationConfig) -> bool:
    """Whether a population changes anything: shared tensors, or start values that follow the persons."""
    return bool(lopa.shared) or training.start_rate > 0


def prepare(population: Path, fm: FrozenModel, encoder: Encoder | NoEncoder, config: LoPAConfig, reporter: Reporter) -> Dataset:
    """Read and encode a population; the encoder's constants are set from it."""
    examples = read_examples(population)
    with reporter.task("Encoding prompts", len(examples)) as advance, _on_device(encoder, fm):
        return build_dataset(
            examples, fm, encoder, soft_rows=config.soft_prompt_rows, standardize=True, on_progress=lambda count: advance(count, "")
        )


@contextlib.contextmanager
def _on_device(encoder: Encoder | NoEncoder, fm: FrozenModel) -> Iterator[None]:
    encoder.to(fm.device)
    try:
        yield
    finally:
        encoder.cpu()


def _train(plan: ExportPlan, fm: FrozenModel, dataset: Dataset, lopa: LoPA, reporter: Reporter) -> LoPA:
    if plan.run is None:
        raise ValueError("a population needs a folder for its training run")
    trainer = PopulationTrainer(fm, dataset, lopa, plan.training, plan.run, plan.encoder)
    with (
        reporter.task("Training the shared part", plan.training.steps) as advance,
        contextlib.closing(EventWriter(plan.run, trainer.state.step)) as events,
    ):
        advance(trainer.state.step, "")

        def tell(_step: int, loss: float) -> None:
            advance(1, f"NLL {loss:.3f} per token")
            events.follow()

        return trainer.run(tell)
