"""`lopa export` as users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lopa.bundle import Bundle
from lopa.cli import main
from lopa_exporters.cli import parse_corrections
from lopa_exporters.cli.options import rate_of

SMALL = ["--rows", "3", "--rank", "1", "--encoder-layers", "1", "--max-tokens", "32"]


def run(*arguments: object) -> int:
    """The exit status of a `lopa` command line."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_a_population_becomes_a_bundle(fm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    population = tmp_path / "users.jsonl"
    rows = [{"user": f"u{i % 3}", "task": "t", "prompt": f"def f{i}(x):", "target": "pass"} for i in range(24)]
    population.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "bundle"
    assert run("export", "--fm", fm_folder, "--out", out, "--population", population, "--steps", 4, "--lifetime", 2, *SMALL) == 0
    printed = capsys.readouterr()
    assert "a user owns" in printed.out
    assert "No population" not in printed.err
    manifest = Bundle.open(out).manifest
    assert (manifest.rows, manifest.rank, manifest.encoder.max_tokens) == (3, 1, 32)
    assert len((tmp_path / "bundle.run" / "log.jsonl").read_text().splitlines()) >= 4


def test_without_a_population_it_says_so(fm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", "--fm", fm_folder, "--out", tmp_path / "bundle", "--corrections", "W2v=2", *SMALL) == 0
    assert "No population was given: the shared heads are random" in capsys.readouterr().err
    assert [spec.name for spec in Bundle.open(tmp_path / "bundle").manifest.personal] == ["Z.A", "Z.B", "W2v.P", "W2v.Q"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--fm", "{folder}/nowhere"], "nowhere"),
        (["--fm", "{fm}", "--corrections", "W9=1"], "W1u, W2u, W1v, W2v"),
        (["--fm", "{fm}", "--corrections", "W1u"], "corrections"),
        (["--fm", "{fm}", "--encoder-layers", "5"], "layers is 5"),
        (["--fm", "{fm}", "--pooling", "last"], "token embeddings"),
        (["--fm", "{fm}", "--profile", "heads", "--z-rank", "2"], "--z-rank: no effect with profile heads"),
        (["--fm", "{fm}", "--profile", "prompt", "--features", "8", "--rank", "2"], "--features, --rank: no effect with profile prompt"),
        (["--fm", "{fm}", "--composition", "none", "--pooling", "cls"], "--pooling: no effect with composition none"),
        (["--fm", "{fm}", "--steps", "3"], "--steps: no effect without --population"),
        (["--fm", "{fm}", "--max-loss", "1"], "--max-loss: no effect without --quantize"),
        (["--fm", "{fm}", "--head-width", "1000000000"], "soft prompt and heads are"),
        (["--fm", "{fm}", "--max-tokens", "1000000000"], "max_tokens is 1000000000"),
        (["--fm", "{fm}", "--features", "1"], "features is 1"),
        (["--fm", "{fm}", "--trained", "{folder}", "--rows", "2"], "--rows: no effect with --trained"),
    ],
)
def test_mistakes_are_told_in_one_line(
    fm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    filled = [argument.format(folder=tmp_path, fm=fm_folder) for argument in arguments]
    assert run("export", "--out", tmp_path / "bundle", *filled) == 1
    error = capsys.readouterr().err
    assert word in error
    assert "Traceback" not in error
    assert not (tmp_path / "bundle").exists()


def test_corrections_are_parsed() -> None:
    assert parse_corrections("W1u=1, W2v=3 , W1v=2") == {"W1u": 1, "W2v": 3, "W1v": 2}
    assert parse_corrections("none") == {}
    with pytest.raises(ValueError, match="each matrix once"):
        parse_corrections("W1u=1,W1u=2")


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rate_that_teaches_nothing_is_told_before_anything_is_loaded(rate: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        rate_of("factors", rate)


def test_the_command_s_module_needs_no_torch() -> None:
    code = "import sys, lopa_exporters.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
