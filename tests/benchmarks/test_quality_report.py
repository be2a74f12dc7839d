"""Figures and document of the laboratory follow from its cells, and nothing else stands in them."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.quality import plots, report
from benchmarks.quality.cell import Cell
from benchmarks.quality.command import run_grid, run_smoke
from benchmarks.quality.figures import Results, by_user, estimate, figures, ratio, unrepeated
from benchmarks.quality.grid import load_rates, smoke, stages
from benchmarks.quality.store import Row, Store
from benchmarks.quality.tasks import ROOT, TASKS, USERS

GRID = [cell for cells in stages(load_rates()).values() for cell in cells]
TYPED = {"95", "64", "16", "32", "2022", "8", "1.5"}
"""Numbers in the template that are no results: of intervals, tokens, float16 and float32, a citation, LoRA's rank and the aim."""


def committed() -> Results:
    return Results.of(Store(ROOT / "benchmarks" / "results" / "quality.jsonl"), GRID)


def whole() -> dict[Cell, Row]:
    """The whole grid, measured: every method halves the NLL."""
    costs = {"validation_nll": 1.0, "test_nll": 1.0, "accuracy": 0.5, "labels": 4, "device_bytes": 100, "server_bytes": 10}
    costs |= {"unrepeated_nll": 1.0, "unrepeated_accuracy": 0.5}
    plain = {**costs, "validation_nll": 2.0, "test_nll": 2.0, "unrepeated_nll": 4.0, "test_items": 40, "unrepeated_items": 30}
    return {cell: plain if cell.method == "none" else costs for cell in GRID}


def test_guard_and_intervals() -> None:
    def rows(method: str, validation: float, test: float) -> dict[Cell, dict[str, float]]:
        return {
            Cell(method, "filing", user): {"validation_nll": validation, "test_nll": test * (1 + 0.01 * i)} for i, user in enumerate("abc")
        }

    results = Results({**rows("none", 2.0, 4.0), **rows("default", 1.9, 3.0), **rows("full", 2.1, 1.0)})
    assert by_user(results.select("default"), results.gain) == pytest.approx(dict.fromkeys("abc", 0.25))
    assert by_user(results.select("full"), results.gain) == dict.fromkeys("abc", 0.0)
    assert by_user(results.select("full"), lambda cell: results.gain(cell, guarded=False)) == pytest.approx(dict.fromkeys("abc", 0.75))
    spread = estimate({"a": 0.0, "b": 0.5, "c": 1.0})
    assert spread.low < spread.value == 0.5 < spread.high
    assert ratio({"a": 1.0, "b": 3.0}, {"b": 1.5, "a": 0.5}).low == pytest.approx(2.0)


def test_nothing_is_no_report(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    with pytest.raises(SystemExit, match=r"cells\.jsonl holds no finished cell"):
        run_grid(Namespace(cells=tmp_path / "cells.jsonl", docs=docs, report=True, json=None))
    assert not docs.exists()


def test_one_user_has_no_interval() -> None:
    assert report.percent(estimate({"a": 0.5})) == "50.0%"
    assert report.percent(estimate({"a": 0.5, "b": 0.5})) == "50.0% (50.0 to 50.0)"
    assert report.times(ratio({"a": 1.0}, {"a": 2.0})) == "0.50"


def test_every_figure_has_its_name() -> None:
    """Those that are published, over all tasks and of each."""
    found = figures(Results(whole()))
    gains = [f"{method}_gain" for method in ("default", "prompt_tuning", "heads", "lora_r8", "full")]
    ratios = ["default_over_prompt_tuning", "default_over_lora_r8"]
    for suffix in ("", *(f"_{task}" for task in TASKS)):
        for name in ("none_nll", *gains, *ratios):
            assert {f"{name}{suffix}", f"{name}{suffix}_low", f"{name}{suffix}_high"} <= found.keys()
        assert {f"{name}{suffix}" for name in ("users_improved", "default_bytes", "lora_r8_bytes")} <= found.keys()
    assert {f"{method}_filing_accuracy" for method in ("default", "lora_r8", "prompt_tuning")} <= found.keys()
    assert (found["users_improved_20_examples"], found["users_improved"], found["users"], found["seeds"]) == (12, 12, 12, 3)
    assert found["default_gain"] == found["default_gain_filing"] == 0.5
    assert (found["default_gain_filing_unrepeated"], found["default_filing_accuracy_unrepeated"]) == (0.75, 0.5)
    assert found["default_over_lora_r8"] == 1.0
    assert "| mean over tasks | 1.00 (1.00 to 1.00) | 0 of 12 |" in report.verdicts(Results(whole()))


def test_a_seed_counts_once_every_user_has_it() -> None:
    """Whichever seed that is, and of each method's cells that have what is counted."""
    rows = whole()
    first, second = (
        next(cell for cell in rows if cell.method == "full" and cell.task == "filing" and cell.seed == seed) for seed in (0, 1)
    )
    for cell in (first, second):
        rows[cell] = {name: value for name, value in rows[cell].items() if name != "unrepeated_nll"}
    results = Results(rows)
    assert {cell.seed for cell in unrepeated(results)["full"]} == {2}
    assert {cell.seed for cell in unrepeated(results)["default"]} == {cell.seed for cell in results.common()["full"]} == {0, 1, 2}


def test_what_is_not_measured_is_told() -> None:
    rows = whole()
    assert report.missing(Results(rows), load_rates()) == "nothing"
    del rows[next(cell for cell in rows if cell.method == "full" and cell.task == "completion" and cell.seed == 0)]
    assert report.missing(Results(rows), load_rates()) == "filing and completion, 1 of 144 cells"


def test_no_result_is_typed_by_hand() -> None:
    """Whatever the template says in digits comes from a field."""
    text = re.sub(r"{\w+}|`[^`]*`", "", report.TEMPLATE.read_text(encoding="utf-8"))
    assert set(re.findall(r"\d[\d.,]*\d|\d", text)) <= TYPED
    assert not re.search(r"three quarters|a third|half of|times as (good|much|many)|twice as", text)


def test_results_file_follows_from_the_committed_cells() -> None:
    written = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text(encoding="utf-8"))["figures"]
    assert written == pytest.approx(figures(committed()))


def test_pictures_are_drawn_from_the_committed_cells(tmp_path: Path) -> None:
    drawn = plots.draw(committed(), tmp_path)
    assert [path.name for path in drawn] == ["quality-bytes.png", "quality-examples.png", "quality-users.png"]
    assert all((ROOT / "docs" / path.name).exists() for path in drawn)
    assert plots.draw(Results({}), tmp_path) == []


def test_smoke_fails_when_the_order_is_wrong(tmp_path: Path) -> None:
    """From cells that are measured already: the default behind prompt tuning."""
    nll = {"none": 4.0, "prompt_tuning": 2.0, "default": 2.5}
    store = Store(tmp_path / "cells.jsonl")
    for cell in smoke(load_rates()):
        store.add({**vars(cell), "validation_nll": nll[cell.method], "test_nll": nll[cell.method]})
    args = Namespace(cells=store.path, work=tmp_path, threads=1, json=None)
    with pytest.raises(SystemExit, match="not the order"):
        run_smoke(args)
    for row in list(store.rows.values()):
        store.add({**row, "test_nll": 1.0} if row["method"] == "default" else row)
    run_smoke(args)


def test_document_follows_from_the_committed_cells(tmp_path: Path) -> None:
    results = committed()
    pictures = [ROOT / "docs" / f"quality-{name}.png" for name in ("bytes", "examples", "users")]
    report.write(results, load_rates(), tmp_path / "quality.md", [path for path in pictures if path.exists()])
    assert (tmp_path / "quality.md").read_text() == (ROOT / "docs" / "quality.md").read_text()
    assert {cell.user for cell in results.rows} == set(USERS)
    assert not re.search(r"{\w+}", (tmp_path / "quality.md").read_text())
