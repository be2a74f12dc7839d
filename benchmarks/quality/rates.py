"""Choose each method's learning rate on development packages, by their validation items.

From the method's first guess, steps of a factor of three in both directions, as long as the best is at an end of what was tried.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from benchmarks.quality.cell import STEPS, Cell
from benchmarks.quality.grid import RATES
from benchmarks.quality.laboratory import Laboratory
from benchmarks.quality.methods import METHODS
from benchmarks.quality.tasks import DEVELOPERS

FACTOR, MOST = 3.0, 6
"""Between neighbouring rates, and rates tried at most."""


def choose(laboratory: Laboratory, tasks: Sequence[str], methods: Sequence[str], path: Path = RATES) -> None:
    """Put the best rate of every method that has one of its own into the file (task -> method -> rate), one after the other."""
    chosen = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for method in (name for name in methods if METHODS[name].rate):
        for task in tasks:
            chosen.setdefault(task, {})[method] = best_rate(laboratory, method, task)
            path.write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")


def best_rate(laboratory: Laboratory, method: str, task: str) -> float:
    """The rate with the lowest validation NLL, mean over the development packages."""
    centre = METHODS[method].rate
    tried: dict[float, float] = {}
    wanted = [_rate(centre, place) for place in (-1, 0, 1)]
    while wanted and len(tried) < MOST:
        for rate in wanted:
            tried[rate] = _validation(laboratory, Cell(method, task, "", 0, None, STEPS[task], rate))
        best = min(tried, key=tried.__getitem__)
        lowest, highest = min(tried), max(tried)
        wanted = [_next(lowest, -1)] if best == lowest else [_next(highest, 1)] if best == highest else []
    print(f"{task}, {method}: {tried}", flush=True)
    return min(tried, key=tried.__getitem__)


def _validation(laboratory: Laboratory, cell: Cell) -> float:
    """Relative to the plain model, so that every package counts alike."""
    ratios = []
    for user in DEVELOPERS:
        plain, own = Cell("none", cell.task, user), replace(cell, user=user)
        laboratory.measure([plain, own])
        ratios.append(laboratory.store.rows[own.key()]["validation_nll"] / laboratory.store.rows[plain.key()]["validation_nll"])
    return fmean(ratios)


def _rate(centre: float, place: int) -> float:
    return float(f"{centre * FACTOR**place:.1g}")


def _next(rate: float, direction: int) -> float:
    return float(f"{rate * FACTOR**direction:.1g}")
