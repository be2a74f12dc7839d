"""Train the shared part of lopa-nano's bundle over the population, measure it on other packages, and export it.

    python training/bundle.py --out build/lopa_nano_bundle

The settings below come from a few trials on the development packages (`split.json`): neither the population that the shared
part is trained on nor the held-out users of the demo. At the end those packages are tuned and measured with the new bundle.
An interrupted run goes on where it stopped.

    python training/bundle.py --shared server/lopa_server/models/lopa_nano_bundle --out build/lopa_nano_bundle

takes the shared part of a bundle that this made, instead of training it: for other rows, gains and start values (ROWS, DEVICE). Priors come
after.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the laboratory's reader of bundles, from the repository's root

import torch
from lopa.bundle import Bundle
from lopa.examples import permutation
from lopa.manifest import TuningDefaults
from lopa.tuning import TuneConfig
from lopa_exporters.bundle import export_bundle, read_fm_spec, replace_method
from lopa_exporters.cli import TerminalReporter
from lopa_exporters.cohort import StepSettings
from lopa_exporters.data import Dataset, build_dataset, read_examples
from lopa_exporters.encoder import Encoder, EncoderConfig
from lopa_exporters.frozen import FrozenModel
from lopa_exporters.lopa import LoPA, LoPAConfig, Tensors
from lopa_exporters.pipeline import ExportPlan, load_encoder, prepare, start_lopa
from lopa_exporters.population import PopulationConfig, PopulationTrainer
from lopa_exporters.simulate import aligned_start, evaluate, tune_personal

from benchmarks.quality.learners.shared import read_method
from benchmarks.quality.learners.starts import with_rows

METHOD = LoPAConfig(
    hidden=1,  # replaced by the models' widths
    features=1,
    rows=10,
    rank=4,
    head_width=128,
    z_rank=8,
    z_gain=0.3,  # about three times the embeddings' root mean square: prompt tuning needs rows that go far
    corrections={"W1u": 2, "W2u": 4, "W1v": 2, "W2v": 8},
    inner_std=0.045,
    output_std=0.07,  # the gate starts open to both sides: with 0.2 it is saturated at this width, and hardly learns
    dropout=0.05,
    z_start="product",
)
"""What the shared part is trained with."""
DEVICE = {
    "z_start": "direct",
    "z_rank": 10,
    "z_gain": 1.5,
    "corrections": {"W1u": 2, "W2u": 8, "W1v": 8, "W2v": 4},
    "correction_gain": 0.03,
    "spread": 10.0,
}
"""What devices tune with, over the same shared part, chosen on the development packages: with B zero and five times the gain the personal
prompt moves as far and as freely as prompt tuning's does, and the corrections follow more slowly; most slowly their Q, which starts at the
user's own answers (docs/quality.md). W2v's rank, which d multiplies, is the smaller one."""
ROWS = 25
"""m on devices. The shared part is trained with fewer, which costs less: what U's head has learnt is repeated for the others."""
GATE_SCALE = 0.3
"""Of U, on devices: a personal prompt that goes far is multiplied by the gate, so what the population's gate does to it has to be less."""
TUNING = TuningDefaults(learning_rate=3e-2, steps=150, batch_size=16)
TEST_ITEMS = 48
PREFIX_BYTES = 5 << 30
"""Memory for what the model read of the population's snippets."""


def develop(fm: FrozenModel, dataset: Dataset, lopa: LoPA, tuning: TuningDefaults, persons: Sequence[int]) -> list[dict[str, object]]:
    """Tune each development person as a device would and measure the last items, which stand after the tuning items."""
    rows = []
    config = TuneConfig(**dataclasses.asdict(tuning), validate_every=tuning.steps)
    for person in persons:
        own = dataset.rows[person]
        tuning_rows, test_rows = own[:-TEST_ITEMS], own[-TEST_ITEMS:]
        order = permutation(len(tuning_rows), "development")
        held, training = tuning_rows[order[:24]], tuning_rows[order[24:]]
        plain, start = evaluate(fm, dataset, test_rows, None), evaluate(fm, dataset, test_rows, lopa)
        begun = aligned_start(lopa, dataset.features[training], [pair.target for pair in dataset.pairs(training)])
        tuned = tune_personal(fm, dataset, begun, config, training, held)
        own_scores = evaluate(fm, dataset, test_rows, lopa, tuned.best)
        user, task = dataset.persons[person]
        rows.append({"user": user, "task": task, "plain": plain.nll, "start": start.nll, "own": own_scores.nll})
        rows[-1] |= {"plain_accuracy": plain.accuracy, "own_accuracy": own_scores.accuracy}
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True)
    for task in sorted({str(row["task"]) for row in rows}):
        chosen = [row for row in rows if row["task"] == task]
        means = {key: fmean(float(str(row[key])) for row in chosen) for key in ("plain", "start", "own", "plain_accuracy", "own_accuracy")}
        print(task, {key: round(value, 3) for key, value in means.items()}, flush=True)
    return rows


def for_devices(lopa: LoPA, vocabulary: torch.Tensor, seed: int) -> LoPA:
    """The trained shared part with a flatter gate, under the devices' rows, gains and start values."""
    scaled = {name: GATE_SCALE * lopa.shared[name] for name in ("W2u", "b2u")}
    return with_start(lopa.config, {**lopa.shared, **scaled}, vocabulary, seed)


def with_start(config: LoPAConfig, shared: Tensors, vocabulary: torch.Tensor, seed: int) -> LoPA:
    """A shared part that devices can have, under their rows, gains and start values. vocabulary: (tokens, d)."""
    lopa = LoPA(dataclasses.replace(config, **DEVICE), shared, {})
    return with_rows(lopa, vocabulary, seed, ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fm", type=Path, default=Path("build/lopa_nano/model"))
    parser.add_argument("--encoder", type=Path, default=Path("build/lopa_nano_encoder"))
    parser.add_argument("--people", type=Path, default=Path("build/people"), help="folder made by people.py")
    parser.add_argument("--shared", type=Path, help="a bundle whose shared part is taken instead of trained")
    parser.add_argument("--out", type=Path, default=Path("build/lopa_nano_bundle"))
    parser.add_argument("--run", type=Path, default=Path("build/lopa_nano_bundle.run"))
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--persons", type=int, default=4, help="in one step")
    parser.add_argument("--shared-rate", type=float, default=2e-3)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="train under bfloat16 autocast")
    parser.add_argument("--develop", type=int, default=12, help="development persons to measure; 0: none")
    args = parser.parse_args()
    if args.shared:
        config, shared = read_method(bundle := Bundle.open(args.shared))
        replace_method(bundle, with_start(config, shared, FrozenModel.load(args.fm).vocabulary(), ExportPlan.seed), args.out)
        return

    training = PopulationConfig(
        steps=args.steps,
        persons=args.persons,
        rows=TUNING.batch_size,
        lifetime=TUNING.steps,
        personal=StepSettings(TUNING.learning_rate),
        shared_rate=args.shared_rate,
    )
    encoder_config = EncoderConfig(folder=str(args.encoder), name="lopa-nano-encoder")
    plan = ExportPlan(fm=args.fm, out=args.out, encoder=encoder_config, method=METHOD, gain_from_vocabulary=False, bf16=args.bf16)
    reporter = TerminalReporter()
    fm = FrozenModel.load(plan.fm, bf16=plan.bf16, prefix_bytes=PREFIX_BYTES)
    encoder = load_encoder(plan.encoder, plan.method, fm)
    if not isinstance(encoder, Encoder):
        raise SystemExit("the method needs an encoder")
    start = start_lopa(plan, fm, encoder)
    dataset = prepare(args.people / "population.jsonl", fm, encoder, start.config, reporter)
    print(f"{len(dataset.persons)} persons, {start.config.personal_count():,} personal values, z_gain {start.config.z_gain}", flush=True)
    trainer = PopulationTrainer(fm, dataset, start, training, args.run, encoder_config)
    with reporter.task("Training the shared part", training.steps) as advance:
        advance(trainer.state.step, "")
        lopa = trainer.run(lambda _step, loss: advance(1, f"NLL {loss:.3f} per token"))
    lopa = for_devices(lopa, fm.vocabulary(), plan.seed)
    spec = dataclasses.replace(read_fm_spec(plan.fm), name="lopa-nano")
    export_bundle(plan.out, fm=spec, encoder=encoder, lopa=lopa, tuning=TUNING)
    if args.develop:
        examples = read_examples(args.people / "development.jsonl")
        people = build_dataset(examples, fm, encoder, soft_rows=lopa.config.soft_prompt_rows, standardize=False)
        develop(fm, people, lopa, TUNING, range(min(args.develop, len(people.persons))))


if __name__ == "__main__":
    main()
