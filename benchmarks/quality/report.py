"""docs/quality.md: every number in it is computed here from finished cells."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.quality.cell import BATCH, STEPS, Cell
from benchmarks.quality.figures import Estimate, Results, by_size, by_user, estimate, figures, ratio, with_priors
from benchmarks.quality.grid import LIKE_TASK, Rates
from benchmarks.quality.methods import MAIN, METHODS, ROWS, SWEEP
from benchmarks.quality.tasks import DEVELOPERS, TASKS

TEMPLATE = Path(__file__).with_name("report.md")
BORDERS = Path(__file__).parents[1] / "results" / "borders.json"
"""Written by benchmarks/borders.py."""
COLUMNS = ("method", "NLL", "gain", "users better", "exact", "right label", "numbers", "device", "server", "tuning", "wire")
TITLES = {"completion": "Completion", "filing": "Filing", "naming": "Naming", "docstring": "Docstring"}


def write(results: Results, rates: Rates, path: Path, pictures: Sequence[Path]) -> None:
    """Fill the template's fields: {main}, {verdicts}, {priors}, {examples}, {sweeps}, {rates}, {pictures} and single values."""
    borders = json.loads(BORDERS.read_text(encoding="utf-8"))["figures"]
    values = {
        **{name: f"{gain:.1%}" for name, gain in borders.items()},
        "main": main_tables(results),
        "verdicts": verdicts(results),
        "priors": prior_table(results),
        "examples": example_table(results),
        "sweeps": sweep_table(results),
        "rates": rate_table(rates),
        "pictures": "\n\n".join(f"![{picture.stem}]({picture.name})" for picture in pictures),
        "missing": ", ".join(task for task in TASKS if not results.common((task,))) or "nothing",
        "developers": ", ".join(DEVELOPERS),
        "users": len({cell.user for cell in results.rows}),
        "batch": BATCH,
        "rows": ROWS,
        "steps": ", ".join(f"{task} {steps}" for task, steps in STEPS.items()),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    path.write_text(text, encoding="utf-8")


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
    return f"{found.value:.1%} ({100 * found.low:.1f} to {100 * found.high:.1f})"


def times(found: Estimate) -> str:
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


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
