"""From finished cells to figures: gains with the guard on, means over users, and 95 % intervals by bootstrap over users.

A user's gain is averaged over seeds, and over tasks where a figure spans them; users are then what is averaged and resampled. Methods are
compared on the same cells only: a (task, user, seed) counts once all of them have been measured on it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import numpy as np
from lopa.bundle import Bundle
from lopa_exporters import defaults
from lopa_exporters.lopa import LoPAConfig
from lopa_server.models import nano_bundle_folder
from numpy.typing import NDArray

from benchmarks.quality.cell import UNREPEATED, Cell
from benchmarks.quality.grid import FEW, SIZES
from benchmarks.quality.learners.learner import bytes_at_rest
from benchmarks.quality.learners.shared import read_method
from benchmarks.quality.methods import COMPARED, MAIN, PRIORS
from benchmarks.quality.store import Row, Store
from benchmarks.quality.tasks import TASKS, USERS

RESAMPLES = 10_000
BESIDE_PRIORS = ("prompt_tuning", *PRIORS, "default")
FEW_USERS = 6
FEW_METHODS = ("prompt_tuning", "default", "lora_r8")
FULL, NEAR = "full_context_nll", "full_context_near_nll"
Place = tuple[str, str, int]
"""Task, user and seed."""
WIDE = 4096
"""d of a large model."""


@dataclass(frozen=True)
class Estimate:
    """A mean over users, or a ratio of two, with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float
    users: int


@dataclass(frozen=True)
class Results:
    """Rows of the grid's cells, by cell."""

    rows: Mapping[Cell, Row]

    @classmethod
    def of(cls, store: Store, grid: Iterable[Cell]) -> Results:
        """What the store has of a grid."""
        return cls({cell: store.rows[cell.key()] for cell in grid if cell in store})

    def plain(self, cell: Cell) -> Row:
        """The plain model on the same items."""
        return self.rows[Cell("none", cell.task, cell.user, cell.seed, cell.size)]

    def has_plain(self, cell: Cell) -> bool:
        return Cell("none", cell.task, cell.user, cell.seed, cell.size) in self.rows

    def gain(self, cell: Cell, guarded: bool = True, nll: str = "test_nll") -> float:
        """Relative fall of the NLL on test items: 0.1 is 10 %. With the guard, what is no better on validation is not used."""
        plain, own = self.plain(cell), self.rows[cell]
        kept = own["validation_nll"] < plain["validation_nll"] or not guarded
        return 1 - own[nll] / plain[nll] if kept else 0.0

    def select(self, method: str, tasks: Sequence[str] = TASKS, size: int | None = None) -> list[Cell]:
        """A method's own cells that have a plain one beside them."""
        return [
            cell
            for cell in self.rows
            if cell.method == method and cell.task in tasks and cell.size == size and not cell.owner and self.has_plain(cell)
        ]

    def common(self, tasks: Sequence[str] = TASKS) -> dict[str, list[Cell]]:
        """Cells of the main methods, all items, on what all of `COMPARED` were measured on; methods without any are left out.

        A task's further seeds count once every user that it was measured for has them, so that no user weighs by chance.
        """
        chosen = {method: {(cell.task, cell.user, cell.seed): cell for cell in self.select(method, tasks)} for method in MAIN}
        shared = _whole_seeds(set.intersection(*(set(chosen[method]) for method in COMPARED)))
        kept = {method: [cell for place, cell in cells.items() if place in shared] for method, cells in chosen.items()}
        return {method: cells for method, cells in kept.items() if cells}


def _whole_seeds(places: Set[Place]) -> set[Place]:
    """Places but those of a seed that not every user of its task has, so that no user weighs by chance."""
    users: dict[str, set[str]] = defaultdict(set)
    for task, user, _ in places:
        users[task].add(user)
    return {(task, user, seed) for task, user, seed in places if all((task, other, seed) in places for other in users[task])}


def with_priors(results: Results, task: str) -> dict[str, list[Cell]]:
    """A task's cells of prompt tuning, the default and what stands between them, for the users who were measured with all; else empty."""
    found = {method: {cell.user: cell for cell in results.select(method, (task,)) if cell.seed == 0} for method in BESIDE_PRIORS}
    users = set.intersection(*map(set, found.values()))
    return {method: [cells[user] for user in USERS if user in users] for method, cells in found.items()} if users else {}


def at_full_context(results: Results) -> dict[str, list[Cell]]:
    """Completion: the comparable cells that all of `COMPARED` have been measured on at full context too; empty if there are none."""
    return _measured(results, "completion", NEAR)


def unrepeated(results: Results) -> dict[str, list[Cell]]:
    """Filing: the comparable cells that all of `COMPARED` have been measured on without repeated snippets too; empty if there are none."""
    return _measured(results, "filing", UNREPEATED)


def _measured(results: Results, task: str, name: str) -> dict[str, list[Cell]]:
    """A task's comparable cells whose rows have a value of that name."""
    common = results.common((task,))
    measured = {
        method: _whole_seeds({(task, cell.user, cell.seed) for cell in cells if name in results.rows[cell]})
        for method, cells in common.items()
    }
    shared = set.intersection(*(measured.get(method, set()) for method in COMPARED))
    kept = {
        method: [cell for cell in cells if (task, cell.user, cell.seed) in shared & measured[method]] for method, cells in common.items()
    }
    return {method: cells for method, cells in kept.items() if cells}


def by_size(results: Results) -> dict[int | None, dict[str, list[Cell]]]:
    """Filing: size -> method -> cells; None is all items.

    Sizes that at least `FEW_USERS` were measured with under the default, the users who have all of these, and the methods that have all of
    those users. Empty if there is but one size.
    """
    found = {
        (size, method): {cell.user: cell for cell in results.select(method, ("filing",), size) if cell.seed == 0}
        for size in (*SIZES, None)
        for method in FEW_METHODS
    }
    sizes = [size for size in (*SIZES, None) if len(found[size, "default"]) >= FEW_USERS]
    if len(sizes) < 2:
        return {}
    users = set.intersection(*(set(found[size, "default"]) for size in sizes))
    return {
        size: {
            method: [found[size, method][user] for user in USERS if user in users]
            for method in FEW_METHODS
            if users <= set(found[size, method])
        }
        for size in sizes
    }


def by_user(cells: Sequence[Cell], value: Callable[[Cell], float]) -> dict[str, float]:
    """Each user's mean: over seeds within a task, then over tasks."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        values[cell.user][cell.task].append(value(cell))
    return {user: fmean(fmean(seeds) for seeds in tasks.values()) for user, tasks in values.items()}


def _resamples(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def estimate(users: Mapping[str, float]) -> Estimate:
    """Mean over users and its interval: percentiles of the mean over users drawn with replacement."""
    values = np.array(list(users.values()))
    low, high = np.percentile(values[_resamples(len(values))].mean(axis=1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def ratio(above: Mapping[str, float], below: Mapping[str, float]) -> Estimate:
    """Ratio of two means over the same users; both are resampled together."""
    first, second = (np.array([users[user] for user in above]) for users in (above, below))
    drawn = _resamples(len(first))
    ratios = first[drawn].mean(axis=1) / second[drawn].mean(axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Estimate(float(first.mean() / second.mean()), float(low), float(high), len(first))


def figures(results: Results) -> dict[str, float]:
    """Every published figure by name; of each estimate also NAME_low and NAME_high. Tasks not measured yet are left out."""
    values: dict[str, float] = {}
    finished = finished_tasks(results)
    values |= _gains(everywhere(results), results, "")
    for task in finished:
        values |= _gains(results.common((task,)), results, f"_{task}")
    values |= _gains(at_full_context(results), results, "_completion_full_context", FULL)
    values |= _gains(at_full_context(results), results, "_completion_full_context_near", NEAR)
    values |= _gains(unrepeated(results), results, "_filing_unrepeated", UNREPEATED)
    for task in finished:
        measured = {method: by_user(cells, results.gain) for method, cells in with_priors(results, task).items()}
        for method in PRIORS:
            if method in measured:
                _put(values, f"{method}_gain_{task}", estimate(measured[method]))
                _put(values, f"default_over_{method}_{task}", ratio(measured["default"], measured[method]))
    for suffix, name, found in (("", "accuracy", results.common(("filing",))), ("_unrepeated", "unrepeated_accuracy", unrepeated(results))):
        for method, cells in found.items():
            _put(values, f"{method}_filing_accuracy{suffix}", estimate(by_user(cells, lambda cell, name=name: results.rows[cell][name])))
    few = by_size(results).get(FEW)
    if few:
        gains = by_user(few["default"], results.gain)
        improved = f"users_improved_{FEW}_examples"
        values |= {improved: sum(gain > 0 for gain in gains.values()), f"users_{FEW}_examples": len(gains)}
        values[f"{improved}_filing"] = values[improved]
    for suffix, tasks in {"": TASKS, **{f"_{task}": (task,) for task in finished}}.items():
        for method in ("default", "lora_r8"):
            row = next((results.rows[cell] for cell in results.select(method, tasks)), None)
            if row:
                values[f"{method}_bytes{suffix}"] = row["device_bytes"] + row["server_bytes"]
    values |= wide_bytes()
    values |= {
        "users": len({cell.user for cell in results.rows}),
        "seeds": min(len({cell.seed for cell in results.common((task,))["default"]}) for task in finished) if finished else 0,
    }
    return values


def wide_bytes() -> dict[str, float]:
    """What one user's numbers take at rest with a model of width `WIDE`: at the shipped bundle's ranks, and at an export's own."""
    shipped = replace(read_method(Bundle.open(nano_bundle_folder()))[0], hidden=WIDE)
    plain = LoPAConfig(hidden=WIDE, features=defaults.FEATURES, **defaults.factors())
    return {f"{name}_wide_bytes": bytes_at_rest(config.personal_count()) for name, config in (("default", shipped), ("export", plain))}


def finished_tasks(results: Results) -> list[str]:
    """Tasks that there are comparable cells of."""
    return [task for task in TASKS if results.common((task,))]


def everywhere(results: Results) -> dict[str, list[Cell]]:
    """`Results.common` over all finished tasks, of users who were measured on every one, so that users' means over tasks are alike."""
    tasks, kept = finished_tasks(results), {}
    for method, cells in results.common(tasks).items():
        users = {user for user in {cell.user for cell in cells} if {cell.task for cell in cells if cell.user == user} == set(tasks)}
        kept[method] = [cell for cell in cells if cell.user in users]
    return {method: cells for method, cells in kept.items() if cells}


def _gains(common: Mapping[str, Sequence[Cell]], results: Results, suffix: str, nll: str = "test_nll") -> dict[str, float]:
    values: dict[str, float] = {}
    if not common:
        return values
    _put(values, f"none_nll{suffix}", estimate(by_user(common["none"], lambda cell: results.rows[cell][nll])))
    gains = {method: by_user(cells, partial(results.gain, nll=nll)) for method, cells in common.items() if method != "none"}
    for method, users in gains.items():
        _put(values, f"{method}_gain{suffix}", estimate(users))
    for other in ("prompt_tuning", "lora_r8"):
        _put(values, f"default_over_{other}{suffix}", ratio(gains["default"], gains[other]))
    values[f"users_improved{suffix}"] = sum(gain > 0 for gain in gains["default"].values())
    return values


def _put(values: dict[str, float], name: str, found: Estimate) -> None:
    values |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
