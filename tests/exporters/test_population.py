"""Training from a population lowers the loss, helps people it never saw, and goes on after an interruption to the bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from lopa.tuning import TuneConfig
from lopa_exporters.data import DataError, Dataset, Example, build_dataset, read_examples
from lopa_exporters.encoder import Encoder
from lopa_exporters.frozen import FrozenModel
from lopa_exporters.lopa import LoPA
from lopa_exporters.population import PopulationConfig, PopulationTrainer
from lopa_exporters.simulate import evaluate, tune_personal

WORDS = ("alpha", "beta", "gamma", "delta", "eps")


def examples_of(people: range) -> list[Example]:
    """Each person answers every word with the one `person` places further on."""
    return [
        Example(f"user{u}", "shift", f"def {WORDS[i % 5]}(x{i // 5}):\n", WORDS[(i + u) % 5], append_end=True)
        for u in people
        for i in range(20)
    ]


@pytest.fixture(scope="module")
def fm(fm_folder: Path) -> FrozenModel:
    return FrozenModel.load(fm_folder, device="cpu")


@pytest.fixture(scope="module")
def dataset(fm: FrozenModel, parts: tuple[Encoder, LoPA]) -> Dataset:
    return build_dataset(examples_of(range(5)), fm, parts[0], soft_rows=4, standardize=False)


def config(**settings: object) -> PopulationConfig:
    base = PopulationConfig(steps=24, persons=2, rows=4, lifetime=8, start_rate=0.2, checkpoint_every=6, validation=4, shared_warmup=4)
    return dataclasses.replace(base, **settings)  # type: ignore[arg-type]


class Interrupted(Exception):
    """Stands for a power cut."""


@pytest.mark.parametrize("lifetime", [8, 0])
def test_an_interrupted_run_ends_as_an_unbroken_one(fm: FrozenModel, dataset: Dataset, lopa: LoPA, tmp_path: Path, lifetime: int) -> None:
    settings = config(lifetime=lifetime, shared_every=2)
    unbroken = PopulationTrainer(fm, dataset, lopa, settings, tmp_path / "a").run()

    def cut(step: int, _loss: float) -> None:
        if step == 15:
            raise Interrupted

    with pytest.raises(Interrupted):
        PopulationTrainer(fm, dataset, lopa, settings, tmp_path / "b").run(cut)
    resumed = PopulationTrainer(fm, dataset, lopa, settings, tmp_path / "b")
    assert resumed.state.step == 12
    result = resumed.run()
    for group in ("shared", "start"):
        for name, tensor in getattr(unbroken, group).items():
            assert torch.equal(tensor, getattr(result, group)[name]), name
    losses = [[row["loss"] for row in read_log(tmp_path / run) if "loss" in row] for run in "ab"]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 24


def test_training_lowers_the_loss_and_helps_strangers(
    fm: FrozenModel, dataset: Dataset, parts: tuple[Encoder, LoPA], tmp_path: Path
) -> None:
    encoder, lopa = parts
    trained = PopulationTrainer(fm, dataset, lopa, config(steps=120, lifetime=20, shared_rate=5e-3), tmp_path).run()
    losses = [row["loss"] for row in read_log(tmp_path) if "loss" in row]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    lives = [row for row in read_log(tmp_path) if "nll" in row and row["age"] == 20]
    assert sum(row["nll"] for row in lives) < sum(row["start_nll"] for row in lives)
    strangers = build_dataset(examples_of(range(7, 8)), fm, encoder, soft_rows=4, standardize=False)
    tune = TuneConfig(steps=20, batch_size=8, learning_rate=1e-2, weight_decay=0.0, clip=1.0)
    before, after = (
        evaluate(fm, strangers, range(15, 20), method, tune_personal(fm, strangers, method, tune, range(15)).best)
        for method in (lopa, trained)
    )
    assert after.nll < before.nll


def test_the_population_itself_is_not_changed(fm: FrozenModel, dataset: Dataset, lopa: LoPA, tmp_path: Path) -> None:
    copies = {name: tensor.clone() for name, tensor in (lopa.shared | lopa.start).items()}
    PopulationTrainer(fm, dataset, lopa, config(steps=10), tmp_path).run()
    assert all(torch.equal(tensor, copies[name]) for name, tensor in (lopa.shared | lopa.start).items())


def test_a_run_of_another_configuration_is_not_continued(fm: FrozenModel, dataset: Dataset, lopa: LoPA, tmp_path: Path) -> None:
    PopulationTrainer(fm, dataset, lopa, config(steps=6), tmp_path).run()
    with pytest.raises(ValueError, match="another population"):
        PopulationTrainer(fm, dataset, lopa, config(steps=6, seed=1), tmp_path)


def test_validation_rows_are_never_trained_on(dataset: Dataset) -> None:
    train, held = dataset.split(4)
    for rows, kept, out in zip(dataset.rows, train, held, strict=True):
        assert len(out) == 4
        assert sorted([*kept, *out]) == sorted(rows)


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '["a"]',
        '{"user": "u", "task": "t", "prompt": "p"}',
        '{"user": "u", "task": "t", "prompt": "", "target": "x"}',
        '{"user": "u", "task": "t", "prompt": "p", "target": 3}',
        '{"user": "u", "task": "t", "prompt": "p", "target": "x", "append_end": 1}',
        '{"user": "u", "task": "t", "prompt": "p", "target": "x", "weight": 1}',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "users.jsonl"
    path.write_text('{"user": "u", "task": "t", "prompt": "p", "target": "x"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"users\.jsonl, line 2"):
        read_examples(path)


def test_an_example_beyond_the_context_is_named(fm: FrozenModel, encoder: Encoder) -> None:
    with pytest.raises(DataError, match="long, t needs"):
        build_dataset([Example("long", "t", "x y z " * 400, "a")], fm, encoder, soft_rows=4, standardize=False)


def read_log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
