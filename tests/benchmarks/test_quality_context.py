"""Completion at full context: the test items again, behind all of their files that the model can read."""

from __future__ import annotations

from dataclasses import replace

import torch
from lopa.demo.users import Item, TaskData

from benchmarks.quality.cell import Cell, run
from benchmarks.quality.figures import FULL, NEAR, Results, at_full_context, figures
from benchmarks.quality.learners.dept import DecomposedLearner
from benchmarks.quality.material import Material, prepare
from benchmarks.quality.methods import Bench
from benchmarks.quality.report import full_context_table
from benchmarks.quality.tasks import build, held_out_modules, with_all_before
from tests.benchmarks.test_quality_report import whole


def test_what_stands_before_an_item_is_put_before_its_prompt() -> None:
    modules = {"a": "one\ntwo\nthree\nfour\n", "b": "three\nfive\n"}
    first, second = Item("<|code|>one\n", "two\n"), Item("<|code|>three\n", "four\n")
    longer = with_all_before([first, second], modules, 100)
    assert longer == [first, replace(second, prompt="<|code|>one\ntwo\nthree\n")]
    assert with_all_before([second], modules, 4)[0].prompt == "<|code|>two\nthree\n"


def cut(bench: Bench) -> tuple[TaskData, Material]:
    """A few test items, with and without what stands before them."""
    modules = held_out_modules("email")
    data = build("email", "completion", modules, 0)
    data = replace(data, test=data.test[:4])
    return data, prepare(data, bench.fm, bench.encoder, 8, 0, with_all_before(data.test, modules, 8 * bench.fm.context))


def test_full_context_is_filled_and_not_passed(bench: Bench) -> None:
    data, material = cut(bench)
    rows = bench.encoder.bundle.manifest.rows
    assert (len(material.test), len(material.full)) == (4, 4)
    assert not {*material.training, *material.validation} & {*material.test, *material.full}
    for short, full, item in zip(material.of(material.test), material.of(material.full), data.test, strict=True):
        assert full.target == short.target
        assert full.prompt[0] == short.prompt[0]
        assert len(full) + rows <= bench.fm.context
        assert bench.fm.tokenizer.decode(full.prompt).endswith(item.prompt.removeprefix("<|code|>"))
    assert max(len(pair) + rows for pair in material.of(material.full)) == bench.fm.context
    for short, full, near in zip(*(material.of(places) for places in (material.test, material.full, material.near)), strict=True):
        assert [*near.prefix, *near.prompt] == [*full.prefix, *full.prompt]
        assert len(near.prompt) == min(len(short.prompt), len(full.prompt) - 1)
    assert DecomposedLearner(bench.fm, material, 0, rows=10).parameters["A"].shape[0] < 200


def test_a_cell_has_both(bench: Bench) -> None:
    _, material = cut(bench)
    row, _ = run(Cell("prompt_tuning", "completion", "email", steps=1, rate=0.1), bench, material)
    pairs = material.of(material.full)
    plain, _ = run(Cell("none", "completion", "email"), bench, material)
    with torch.no_grad():
        assert abs(plain[FULL] - bench.fm.losses(None, pairs).mean().item()) < 1e-4
    assert plain[FULL] != plain["test_nll"]
    assert plain[NEAR] == plain[FULL]
    assert row[NEAR] != row[FULL] > 0
    assert row["test_items"] == 4
    assert FULL not in run(Cell("idpg", "completion", "email", steps=1, rate=0.001), bench, material)[0]


def test_gains_at_full_context_are_told_where_they_were_measured() -> None:
    rows = whole()
    assert at_full_context(Results(rows)) == {}
    assert full_context_table(Results(rows)) == "Not measured yet."
    for cell, row in rows.items():
        if cell.task == "completion" and cell.seed == 2:
            rows[cell] = {**row, FULL: 1.6 if cell.method == "none" else 1.2, NEAR: 1.6 if cell.method == "none" else 0.8}
    found = figures(Results(rows))
    assert round(found["default_gain_completion_full_context"], 6) == 0.25
    assert round(found["default_gain_completion_full_context_near"], 6) == 0.5
    assert round(found["none_nll_completion_full_context"], 6) == 1.6
    assert {cell.seed for cells in at_full_context(Results(rows)).values() for cell in cells} == {2}
    assert "| plain model | 2.000 |  | 1.600 |  | 1.600 |  |" in full_context_table(Results(rows))
    assert "| 1.200 | 25.0% (25.0 to 25.0) | 0.800 | 50.0% (50.0 to 50.0) |" in full_context_table(Results(rows))
