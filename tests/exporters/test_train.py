"""`lopa train-encoder`: from users' examples to a trained part, curves and a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
import torch
from lopa.bundle import Bundle
from lopa_exporters.data import DataError, read_examples
from lopa_exporters.trained import Trained
from pyarrow import parquet
from tensorboardX.proto import event_pb2
from transformers import AutoModelForCausalLM

from tests.exporters.test_cli import SMALL, run
from tests.tiny import build_tiny_fm

ROWS = [{"user": f"u{i % 3}", "task": "t", "prompt": f"def f{i}(x):", "target": "pass"} for i in range(24)]


@pytest.fixture
def population(tmp_path: Path) -> Path:
    path = tmp_path / "users.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def events(folder: Path) -> list[int]:
    """Steps of the training curve in TensorBoard's files, in order."""
    steps = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            steps += [event.step for value in event.summary.value if value.tag == "train/nll_per_token"]
            data = data[16 + size :]
    return steps


def test_train_go_on_and_export(fm_folder: Path, population: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    arguments = ["--fm", fm_folder, "--population", population, "--run", folder, "--steps", 6, "--lifetime", 3, *SMALL]
    arguments += ["--tuning-rate", 0.005, "--features", 8]
    assert run("train-encoder", *arguments) == 0
    assert "--trained" in capsys.readouterr().out
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert events(folder / "tensorboard") == [1, 2, 3, 4, 5, 6]
    assert run("train-encoder", *arguments) == 0  # finished already: nothing is trained twice
    assert events(folder / "tensorboard") == [1, 2, 3, 4, 5, 6]
    assert len([row for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in row]) == 6

    out = tmp_path / "bundle"
    assert run("export", "--fm", fm_folder, "--trained", folder, "--out", out) == 0
    assert "random" not in capsys.readouterr().err
    manifest = Bundle.open(out).manifest
    assert (manifest.rows, manifest.encoder.max_tokens, manifest.tuning.learning_rate) == (3, 32, 0.005)
    assert manifest.instance[0].shape == (8,)
    assert run("train-encoder", *arguments, "--pooling", "mean") == 1  # on with features that are another encoder's
    assert "encoder" in capsys.readouterr().err
    values = json.loads((folder / "trained.json").read_text())
    del values["encoder"]["features"]
    values["encoder"]["layers"] = 0  # as written when that stood for all layers
    (tmp_path / "changed").mkdir()
    (tmp_path / "changed" / "trained.json").write_text(json.dumps(values))
    (tmp_path / "changed" / "trained.safetensors").write_bytes((folder / "trained.safetensors").read_bytes())
    assert run("export", "--fm", fm_folder, "--trained", tmp_path / "changed", "--out", tmp_path / "x") == 1
    assert "the run's encoder constants are not those of" in capsys.readouterr().err
    other = build_tiny_fm(tmp_path / "other", seed=3)
    assert run("export", "--fm", other, "--trained", folder, "--out", tmp_path / "x") == 1
    assert "was trained for the model" in capsys.readouterr().err


def test_rows_start_from_the_vocabulary(fm_folder: Path, population: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ["--steps", 1, "--shared-rate", 0, *SMALL]
    assert run("train-encoder", "--fm", fm_folder, "--population", population, "--run", folder, *settings) == 0
    vocabulary = AutoModelForCausalLM.from_pretrained(fm_folder).get_input_embeddings().weight
    rows = Trained.load(folder).lopa.shared["Z"]
    assert all(torch.isclose(vocabulary, row, atol=1e-6).all(dim=1).any() for row in rows)


def test_parquet_is_read_as_strictly_as_jsonl(population: Path, tmp_path: Path) -> None:
    lines = tmp_path / "users.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_examples(population) == read_examples(lines)
    parquet.write_table(pyarrow.Table.from_pylist([*ROWS, {**ROWS[0], "target": ""}]), population)
    with pytest.raises(DataError, match=r"users\.parquet, row 25"):
        read_examples(population)
    population.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_examples(population)


def test_an_unfinished_run_is_not_exported(fm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    assert run("export", "--fm", fm_folder, "--trained", tmp_path / "run", "--out", tmp_path / "x") == 1
    assert "train it to the end" in capsys.readouterr().err
