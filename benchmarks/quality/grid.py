"""Which cells are measured, in which order: what matters most first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.quality.cell import STEPS, Cell
from benchmarks.quality.methods import MAIN, PRIORS, SWEEP, UNTUNED, rate_of
from benchmarks.quality.tasks import TASKS, USERS

RATES = Path(__file__).parent / "rates.json"
LIKE_TASK = {"naming": "filing", "docstring": "filing"}
"""Learning rates of these tasks are those of another: short answers behind the soft prompt, as in filing."""
SIZES = (5, 20, 100)
FEW = 20
"""The size that is judged, so it is measured first."""
SWEEP_USERS = 4
SMOKE_USERS = ("email", "multiprocessing")
"""Where the default is far enough ahead of prompt tuning that a fault turns the order around, and chance does not; not all users are so."""
Rates = Mapping[str, Mapping[str, float]]
"""task -> method -> learning rate."""


def load_rates() -> Rates:
    """What `--rates` chose on development packages."""
    return json.loads(RATES.read_text(encoding="utf-8"))


def cell(rates: Rates, method: str, task: str, user: str, seed: int = 0, size: int | None = None) -> Cell:
    """A cell with its task's steps and its method's learning rate."""
    if method in UNTUNED:
        return Cell(method, task, user, seed, size)
    return Cell(method, task, user, seed, size, STEPS[task], rates[LIKE_TASK.get(task, task)][rate_of(method)])


def stages(rates: Rates) -> dict[str, list[Cell]]:
    """The whole grid in order, by stage."""
    return {
        "main": list(_cells(rates, ("filing", "completion"), MAIN)),
        "tasks": list(_cells(rates, ("naming", "docstring"), MAIN)),
        "priors": list(_cells(rates, ("naming", "docstring", "completion"), PRIORS)),
        "sizes": [
            cell(rates, method, "filing", user, size=size)
            for size in (FEW, *(size for size in SIZES if size != FEW))
            for user in USERS
            for method in ("none", "default", "lora_r8", "prompt_tuning")
        ],
        "others": [replace(cell(rates, "default", "filing", user), owner=owner) for user in USERS for owner in USERS if owner != user],
        "seeds": [one for seed in (1, 2) for one in _cells(rates, TASKS, MAIN, seed)],
        "sweeps": [
            cell(rates, method, "filing", user) for user in USERS[:SWEEP_USERS] for method in SWEEP if rate_of(method) in rates["filing"]
        ],
    }


def _cells(rates: Rates, tasks: tuple[str, ...], methods: tuple[str, ...], seed: int = 0) -> Iterator[Cell]:
    for task in tasks:
        for user in USERS:
            for method in methods:
                yield cell(rates, method, task, user, seed)


def smoke(rates: Rates) -> list[Cell]:
    """Two users, one seed, three methods whose order is known."""
    return [cell(rates, method, "filing", user) for user in SMOKE_USERS for method in ("none", "prompt_tuning", "default")]
