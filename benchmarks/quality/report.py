"""docs/quality.md: every number in it is computed here from finished cells."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from lopa.priors import CHOSEN_BY, FITS, TRIAL_STEPS

from benchmarks.quality.cell import BATCH, MEASUREMENTS, STEPS, UNREPEATED, Cell
from benchmarks.quality.figures import (
    FULL,
    NEAR,
    RESAMPLES,
    WIDE,
    Estimate,
    Results,
    at_full_context,
    by_size,
    by_user,
    estimate,
    everywhere,
    figures,
    ratio,
    unrepeated,
    with_priors,
)
from benchmarks.quality.grid import LIKE_TASK, Rates, stages
from benchmarks.quality.learners.learner import CLIP
from benchmarks.quality.material import MAX_VALIDATION, VALIDATION_SHARE
from benchmarks.quality.methods import MAIN, METHODS, ROWS, SWEEP
from benchmarks.quality.tasks import DEVELOPERS, TASKS

TEMPLATE = Path(__file__).with_name("report.md")
BORDERS = Path(__file__).parents[1] / "results" / "borders.json"
"""Written by benchmarks/borders.py."""
CHOOSING = BORDERS.with_name("choosing.json")
"""Written by benchmarks/choosing.py."""
COLUMNS = ("method", "NLL", "gain", "users better", "exact", "right label", "numbers", "device", "server", "tuning", "wire")
TITLES = {"completion": "Completion", "filing": "Filing", "naming": "Naming", "docstring": "Docstring"}
STAGES = {
    "main": "filing and completion",
    "tasks": "naming and docstring",
    "priors": "with and without priors",
    "sizes": "numbers of examples",
    "others": "whose factors fit whom",
    "seeds": "further seeds",
    "sweeps": "variants",
}
"""What the grid's parts are called in the document."""


def write(results: Results, rates: Rates, path: Path, pictures: Sequence[Path]) -> None:
    """Fill the template's fields: {main}, {verdicts}, {priors}, {examples}, {sweeps}, {rates}, {pictures} and single values."""
    borders = json.loads(BORDERS.read_text(encoding="utf-8"))["figures"]
    choosing = json.loads(CHOOSING.read_text(encoding="utf-8"))
    values = {
        **{name: f"{gain:.1%}" for name, gain in borders.items()},
        **{name: f"{value:.2f}" if "_nll_" in name else f"{value:.0%}" for name, value in choosing["figures"].items()},
        **{f"{kind}_sizes": ", ".join(map(str, _sizes(choosing["rows"], kind))) for kind in ("own_labels", "shared_kind")},
        **settings(),
        **quoted(results),
        "main": main_tables(results),
        "full_context": full_context_table(results),
        "unrepeated": unrepeated_table(results),
        "repeats": repeats(results),
        "verdicts": verdicts(results),
        "priors": prior_table(results),
        "examples": example_table(results),
        "sweeps": sweep_table(results),
        "rates": rate_table(rates),
        "pictures": "\n\n".join(f"![{picture.stem}]({picture.name})" for picture in pictures),
        "missing": missing(results, rates),
        "users": len({cell.user for cell in results.rows}),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    path.write_text(text, encoding="utf-8")


def _sizes(rows: Sequence[Mapping[str, Any]], kind: str) -> list[int]:
    return sorted({row["size"] for row in rows if row["kind"] == kind})


def settings() -> dict[str, str]:
    """How everything was measured."""
    return {
        "developers": ", ".join(DEVELOPERS),
        "batch": str(BATCH),
        "rows": str(ROWS),
        "steps": ", ".join(f"{task} {steps}" for task, steps in STEPS.items()),
        "clip": f"{CLIP:g}",
        "measurements": str(MEASUREMENTS),
        "validation_share": f"{VALIDATION_SHARE:.0%}",
        "max_validation": str(MAX_VALIDATION),
        "resamples": f"{RESAMPLES:,}",
        "fits": f"{FITS:.0%}",
        "chosen_by": str(CHOSEN_BY),
        "trial_steps": str(TRIAL_STEPS),
        "wide": f"{WIDE:,}",
    }


def quoted(results: Results) -> dict[str, str]:
    """Results that the text quotes: gains, accuracies and ratios by the figure's name, and what follows from them."""
    found = figures(results)
    values = {name: f"{value:.1%}" for name, value in found.items() if "_gain_" in name or name.endswith("_accuracy")}
    for name in (name for name in found if "_over_" in name and f"{name}_low" in found):
        values[name] = times(Estimate(*(found[f"{name}{end}"] for end in ("", "_low", "_high")), int(found["users"])))
    values |= {name: size(found[f"{name}_bytes"]) for name in ("default_wide", "export_wide")}
    if "prompt_tuning_gain_filing" in found:
        values["aim"] = f"{1.5 * found['prompt_tuning_gain_filing']:.0%}"
        values["chance"] = (
            f"{fmean(by_user(results.select('none', ('filing',)), lambda one: 1 / results.rows[one]['labels']).values()):.1%}"
        )
    return values


def missing(results: Results, rates: Rates) -> str:
    """Parts of the grid that are not finished, with the number of cells that they lack."""
    lacking = {name: (sum(one not in results.rows for one in cells), len(cells)) for name, cells in stages(rates).items()}
    return "; ".join(f"{STAGES[name]}, {count:,} of {of:,} cells" for name, (count, of) in lacking.items() if count) or "nothing"


def main_tables(results: Results) -> str:
    """A table for each task that every main method was measured on."""
    parts = []
    for task in TASKS:
        common = results.common((task,))
        if common:
            seeds = {one.seed for one in common["default"]}
            users = {one.user for one in common["default"]}
            rows = [_row(results, method, cells) for method, cells in common.items()]
            parts.append(f"### {TITLES[task]}\n\n{len(users)} users, {len(seeds)} seed{'s' * (len(seeds) > 1)}.\n\n{_table(COLUMNS, rows)}")
    return "\n\n".join(parts)


def full_context_table(results: Results) -> str:
    """Completion behind all that the model's context holds."""
    rows = []
    for method, cells in at_full_context(results).items():
        row = [METHODS[method].title]
        for nll in ("test_nll", FULL, NEAR):
            values = by_user(cells, lambda one, nll=nll: results.rows[one][nll])  # type: ignore[misc]
            gains = by_user(cells, partial(results.gain, nll=nll))
            row += [f"{fmean(values.values()):.3f}", "" if method == "none" else percent(estimate(gains))]
        rows.append(row)
    header = ("method", "NLL, short prompts", "gain", "NLL, full context", "gain", "NLL, soft prompt near the target", "gain")
    return _table(header, rows) if rows else "Not measured yet."


def repeats(results: Results) -> str:
    """The part of filing's test items that mostly repeat tuning items."""
    rows = [results.rows[cell] for cell in unrepeated(results).get("none", ())]
    items = sum(row["test_items"] for row in rows)
    return f"{1 - sum(row['unrepeated_items'] for row in rows) / items:.1%}" if rows else "Some"


def unrepeated_table(results: Results) -> str:
    """Filing without the test items that mostly repeat tuning items."""
    rows = []
    for method, cells in unrepeated(results).items():
        nll = fmean(by_user(cells, lambda one: results.rows[one][UNREPEATED]).values())
        right = estimate(by_user(cells, lambda one: results.rows[one]["unrepeated_accuracy"]))
        gain = "" if method == "none" else percent(estimate(by_user(cells, partial(results.gain, nll=UNREPEATED))))
        rows.append([METHODS[method].title, str(len({one.seed for one in cells})), f"{nll:.3f}", gain, percent(right)])
    return _table(("method", "seeds", "NLL", "gain", "right label"), rows) if rows else "Not measured yet."


def _row(results: Results, method: str, cells: Sequence[Cell]) -> list[str]:
    rows = [results.rows[one] for one in cells]
    gains = by_user(cells, results.gain)

    def mean(name: str) -> float:
        return fmean(by_user(cells, lambda one: results.rows[one][name]).values())

    nothing = method == "none"
    return [
        METHODS[method].title,
        f"{mean('test_nll'):.3f}",
        "" if nothing else percent(estimate(gains)),
        "" if nothing else f"{sum(gain > 0 for gain in gains.values())} of {len(gains)}",
        f"{mean('exact_match'):.1%}",
        percent(estimate(by_user(cells, lambda one: results.rows[one]["accuracy"]))) if "accuracy" in rows[0] else "",
        f"{rows[0]['numbers']:,}",
        size(rows[0]["device_bytes"]),
        size(rows[0]["server_bytes"]),
        "" if nothing else f"{mean('tuning_seconds'):.0f} s",
        size(mean("wire_bytes")),
    ]


def verdicts(results: Results) -> str:
    """The comparisons that the product is judged by, as a table: of gains, and on filing of accuracies too."""
    rows = []
    for task in TASKS:
        common = results.common((task,))
        if common:
            rows.append([task, *_comparison(common, results.gain)])
            if task == "filing":
                rows.append([f"{task}, right label", *_comparison(common, lambda one: results.rows[one]["accuracy"])])
                if few := unrepeated(results):
                    right = _comparison(few, lambda one: results.rows[one]["unrepeated_accuracy"])
                    rows.append([f"{task} without repeats, right label", *right])
    if common := everywhere(results):
        rows.append(["mean over tasks", *_comparison(common, results.gain)])
    header = ("", "default / prompt tuning", "users above", "default / LoRA r = 8", "users above", "heads / prompt tuning", "users above")
    return _table((*header, "heads / LoRA r = 8", "users above"), rows)


def _comparison(common: Mapping[str, Sequence[Cell]], value: Callable[[Cell], float]) -> list[str]:
    """Ratio of means and number of users above, for default and heads against prompt tuning and LoRA."""
    users = {method: by_user(cells, value) for method, cells in common.items()}
    columns = []
    for ours in ("default", "heads"):
        for theirs in ("prompt_tuning", "lora_r8"):
            above = sum(users[ours][user] > other for user, other in users[theirs].items())
            columns += [times(ratio(users[ours], users[theirs])), f"{above} of {len(users[ours])}"]
    return columns


def prior_table(results: Results) -> str:
    """Gains with and without the bundle's priors, by task."""
    rows = []
    for task in TASKS:
        for method, cells in with_priors(results, task).items():
            gains = by_user(cells, results.gain)
            taken = sorted({results.rows[cell].get("prior", "") for cell in cells})
            better = f"{sum(gain > 0 for gain in gains.values())} of {len(gains)}"
            rows.append([task, METHODS[method].title, ", ".join(taken), percent(estimate(gains)), better])
    return _table(("task", "method", "prior taken", "gain", "users better"), rows) if rows else "Not measured yet."


def example_table(results: Results) -> str:
    """Filing over the number of examples."""
    rows = []
    for count, methods in by_size(results).items():
        for method, cells in methods.items():
            gains = by_user(cells, results.gain)
            right = estimate(by_user(cells, lambda one: results.rows[one]["accuracy"]))
            better = f"{sum(gain > 0 for gain in gains.values())} of {len(gains)}"
            rows.append([str(count or "all"), METHODS[method].title, percent(estimate(gains)), better, percent(right)])
    return _table(("examples", "method", "gain", "users better", "right label"), rows) if rows else "Not measured yet."


def sweep_table(results: Results) -> str:
    """Variants on filing, on the users that they were measured on, beside the main methods on the same users."""
    measured = [method for method in SWEEP if results.select(method, ("filing",))]
    if not measured:
        return "Not measured yet."
    users = set.intersection(*({one.user for one in results.select(method, ("filing",))} for method in measured))
    rows = []
    for method in (*MAIN[1:], *measured):
        cells = [one for one in results.select(method, ("filing",)) if one.user in users and one.seed == 0]
        if not cells:
            continue
        first = results.rows[cells[0]]
        found, right = estimate(by_user(cells, results.gain)), estimate(by_user(cells, lambda one: results.rows[one]["accuracy"]))
        rows.append([METHODS[method].title, percent(found), percent(right), f"{first['numbers']:,}", size(_stored(first))])
    return f"Users: {', '.join(sorted(users))}.\n\n" + _table(("method", "gain", "right label", "numbers", "bytes a user"), rows)


def rate_table(rates: Rates) -> str:
    """Learning rates by method and task."""
    methods = [method for method in METHODS if METHODS[method].rate and all(method in rates[task] for task in rates)]
    tasks = list(rates)
    also = {task: [other for other, like in LIKE_TASK.items() if like == task] for task in tasks}
    header = ("method", *(", ".join([task, *also[task]]) for task in tasks))
    return _table(header, [[METHODS[method].title, *(f"{rates[task][method]:g}" for task in tasks)] for method in methods])


def printed(results: Results) -> str:
    """Figures as lines for a terminal."""
    return "\n".join(f"{name:44s} {value:14.4f}" for name, value in figures(results).items())


def percent(found: Estimate) -> str:
    """With its interval, if there is more than one user."""
    return f"{found.value:.1%}" + (f" ({100 * found.low:.1f} to {100 * found.high:.1f})" if found.users > 1 else "")


def times(found: Estimate) -> str:
    """As `percent`."""
    return f"{found.value:.2f}" + (f" ({found.low:.2f} to {found.high:.2f})" if found.users > 1 else "")


def size(count: float) -> str:
    """Bytes for people."""
    if count < 1:
        return "0"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 1024:.1f} KiB"


def _stored(row: dict[str, float]) -> float:
    return row["device_bytes"] + row["server_bytes"]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
