"""One cell of the grid: one method tuned for one user on one task, and measured on test items that it never saw.

Every method gets the same items, split, steps and batches, and the same guard: its best state by validation counts, and a user whom it
does not help on validation keeps the plain model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from lopa.control import pair_bytes
from lopa.examples import batch
from lopa.protocol.requests import DTYPES
from lopa_exporters.frozen import TokenPair

from benchmarks.quality.learners.device import DeviceLearner
from benchmarks.quality.learners.learner import Learner, State
from benchmarks.quality.material import Material
from benchmarks.quality.methods import MAIN, METHODS, Bench

BATCH = 8
STEPS = {"completion": 30, "filing": 100, "naming": 100, "docstring": 100}
MEASUREMENTS = 4
"""On validation items while tuning, evenly spread, the last after the last step."""
UNREPEATED = "unrepeated_nll"
"""Name of the NLL over `Material.unrepeated` in a row."""


@dataclass(frozen=True)
class Cell:
    """What is measured. size: tuning items that the user has, None for all. steps and rate: how it is tuned.

    owner: whose tuned state is measured on this user's items; empty for the user's own.
    """

    method: str
    task: str
    user: str
    seed: int = 0
    size: int | None = None
    steps: int = 0
    rate: float = 0.0
    owner: str = ""

    def key(self) -> str:
        return "/".join(str(value) for value in asdict(self).values())


@dataclass(frozen=True)
class Scores:
    """Over some items: NLL in nats per target token, and the part of targets that greedy decoding gives exactly."""

    nll: float
    exact: float


@dataclass(frozen=True)
class Tuned:
    """state: the best by validation. curve: (steps done, validation NLL)."""

    state: State
    best_step: int
    best_nll: float
    curve: tuple[tuple[int, float], ...]
    seconds: float
    """Of the steps alone."""


@torch.no_grad()
def score(learner: Learner, material: Material, rows: Sequence[int]) -> Scores:
    """Measure items under the learner's present state."""
    losses = learner.losses(rows, material.of(rows))
    return Scores(losses.mean().item(), losses.exact.float().mean().item())


def at_full_context(learner: Learner, material: Material) -> dict[str, float]:
    """NLL with the soft prompt at the front, and near the target; the same for learners that have none."""
    front = score(learner, material, material.full).nll
    near = front if learner.footprint.wire is None else score(learner, material, material.near).nll
    return {"full_context_nll": front, "full_context_near_nll": near}


def accuracy(learner: Learner, material: Material) -> float:
    """Filing: the part of test items that are `filed_right`."""
    return fmean(filed_right(learner, material).values())


@torch.no_grad()
def filed_right(learner: Learner, material: Material) -> dict[int, bool]:
    """Filing: for every test item whether its own label is the likeliest, as a whole, of all the user's labels."""
    rows = [row for row in material.test for _ in material.labels]
    choices = [
        TokenPair(material.pairs[row].prompt, label, material.pairs[row].prefix) for row in material.test for label in material.labels
    ]
    nll = learner.losses(rows, choices).nll.view(len(material.test), len(material.labels))
    guesses = [material.data.labels[i] for i in nll.argmin(dim=1).tolist()]
    return {row: guess == material.items[row].target for guess, row in zip(guesses, material.test, strict=True)}


def filing(learner: Learner, material: Material) -> dict[str, float]:
    """Right labels, of all test items and of those alone that repeat no tuning item, and these ones' NLL."""
    right, unrepeated = filed_right(learner, material), material.unrepeated
    return {
        "accuracy": fmean(right.values()),
        "labels": len(material.labels),
        "unrepeated_items": len(unrepeated),
        UNREPEATED: score(learner, material, unrepeated).nll,
        "unrepeated_accuracy": fmean(right[row] for row in unrepeated),
    }


def tune(learner: Learner, material: Material, cell: Cell) -> Tuned:
    """Linear fall of the rate to zero, batches in the device's own order."""
    measured = {round(cell.steps * (i + 1) / MEASUREMENTS) for i in range(MEASUREMENTS)}
    curve, best, seconds = [], None, 0.0
    for number in range(1, cell.steps + 1):
        began = time.perf_counter()
        places = batch(len(material.training), min(BATCH, len(material.training)), number, cell.seed)
        rows = [material.training[place] for place in places]
        learner.step(rows, material.of(rows), cell.rate * (1 - (number - 1) / cell.steps), number)
        seconds += time.perf_counter() - began
        if number in measured:
            exact = learner.state()
            kept = learner.at_rest(exact)
            learner.restore(kept)
            curve.append((number, score(learner, material, material.validation).nll))
            learner.restore(exact)
            if best is None or curve[-1][1] < best[1]:
                best = (kept, curve[-1][1], number)
    if best is None:
        raise ValueError(f"cell {cell.key()} has no steps")
    return Tuned(best[0], best[2], best[1], tuple(curve), seconds)


def lend(cell: Cell, bench: Bench, material: Material, state: State) -> dict[str, Any]:
    """Measure somebody else's state on this user's test items. The row for the results file."""
    learner = METHODS[cell.method].make(bench, material, cell.seed)
    learner.restore(state)
    return {**asdict(cell), "test_nll": score(learner, material, material.test).nll}


def run(cell: Cell, bench: Bench, material: Material) -> tuple[dict[str, Any], State]:
    """Tune and measure. The row for the results file, and the state that was measured."""
    learner = METHODS[cell.method].make(bench, material, cell.seed)
    began = time.perf_counter()
    row: dict[str, Any] = {**asdict(cell), "train_items": len(material.training), "validation_items": len(material.validation)}
    row |= {"test_items": len(material.test), "batch": min(BATCH, len(material.training))}
    state: State = {}
    if cell.steps:
        tuned = tune(learner, material, cell)
        state = tuned.state
        learner.restore(state)
        row |= {"validation_nll": tuned.best_nll, "best_step": tuned.best_step, "curve": tuned.curve, "tuning_seconds": tuned.seconds}
    else:
        row |= {"validation_nll": score(learner, material, material.validation).nll}
    test = score(learner, material, material.test)
    row |= {"test_nll": test.nll, "exact_match": test.exact}
    if material.full and cell.method in MAIN:
        row |= at_full_context(learner, material)
    if material.labels:
        row |= filing(learner, material)
    row |= costs(learner, material, cell)
    if isinstance(learner, DeviceLearner):
        row |= {"prior": learner.prior}
    return row | {"seconds": time.perf_counter() - began}, state


def costs(learner: Learner, material: Material, cell: Cell) -> Mapping[str, int]:
    """Numbers, and bytes on device, on server and on the wire.

    The wire carries float32 soft prompts and gradients for every training pair of every step and soft prompts for every measurement; or,
    where tuning happens on the server, the user's items once.
    """
    place = learner.footprint
    values = {"numbers": place.numbers, "device_bytes": place.device, "server_bytes": place.server}
    if not cell.steps:
        return {**values, "wire_bytes": 0}
    both = {False: material.training, True: material.validation}
    texts = {
        held: [(item.prompt, item.target, item.prefix) for item in map(material.items.__getitem__, rows)] for held, rows in both.items()
    }
    if place.wire is None:
        return {**values, "wire_bytes": sum(pair_bytes(text, 0, 0, []) for held in texts.values() for text in held)}
    plain, rows = DTYPES["F32"], 0
    steps = [batch(len(texts[False]), min(BATCH, len(texts[False])), number, cell.seed) for number in range(1, cell.steps + 1)]
    sent = sum(pair_bytes(texts[False][i], place.wire, rows, [plain, plain]) for step in steps for i in step)
    return {**values, "wire_bytes": sent + MEASUREMENTS * sum(pair_bytes(text, place.wire, rows, [plain]) for text in texts[True])}
