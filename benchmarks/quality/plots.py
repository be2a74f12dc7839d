"""Three pictures: gain against bytes, gain against the number of examples, and whose factors fit whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.quality.figures import FEW_METHODS, Results, by_size, by_user, estimate
from benchmarks.quality.methods import MAIN, METHODS

COLOURS = {"default": "#1f6f8b", "lora_r8": "#d9a05b", "prompt_tuning": "#9aa5b1", "heads": "#7a9e7e", "full": "#8d5a97"}
OTHER = "#c3c9d0"


def draw(results: Results, folder: Path) -> list[Path]:
    """Write the pictures for which there are cells; their paths."""
    pictures = {"quality-bytes.png": gain_by_bytes, "quality-examples.png": gain_by_examples, "quality-users.png": heat_map}
    drawn = []
    for name, make in pictures.items():
        figure = make(results)
        if figure is not None:
            figure.savefig(folder / name, dpi=110)
            plt.close(figure)
            drawn.append(folder / name)
    return drawn


def gain_by_bytes(results: Results) -> Any:
    """A panel for each measured task: mean gain of every method over the bytes that one user costs, on device and server together."""
    tasks = [task for task in ("filing", "completion", "naming", "docstring") if results.common((task,))]
    if not tasks:
        return None
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 4.4), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        for method in METHODS:
            cells = results.select(method, (task,))
            if method == "none" or not cells or (method in MAIN and not (cells := results.common((task,)).get(method, []))):
                continue
            found = estimate(by_user(cells, results.gain))
            size = results.rows[cells[0]]["device_bytes"] + results.rows[cells[0]]["server_bytes"]
            reach = [[100 * (found.value - found.low)], [100 * (found.high - found.value)]]
            colour = COLOURS.get(method, OTHER)
            axis.errorbar(size / 1024, 100 * found.value, reach, fmt="o", color=colour, capsize=3 if method in MAIN else 0, ms=6)
            if method in MAIN:
                axis.annotate(method, (size / 1024, 100 * found.value), textcoords="offset points", xytext=(5, 5), fontsize=8)
        axis.set(xscale="log", xlabel="KiB a user", ylabel="gain in NLL, %", title=task)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def gain_by_examples(results: Results) -> Any:
    """Filing: gain and accuracy over the number of tuning items; all items stand at their mean number."""
    sizes = by_size(results)
    if not sizes:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for method in FEW_METHODS:
        groups = [methods[method] for methods in sizes.values() if method in methods]
        places = [
            np.mean([results.rows[cell]["train_items"] + results.rows[cell]["validation_items"] for cell in cells]) for cells in groups
        ]
        values = {
            axes[0]: [estimate(by_user(cells, results.gain)) for cells in groups],
            axes[1]: [estimate(by_user(cells, lambda cell: results.rows[cell]["accuracy"])) for cells in groups],
        }
        for axis, found in values.items():
            middle = [100 * one.value for one in found]
            reach = [[100 * (one.value - one.low) for one in found], [100 * (one.high - one.value) for one in found]]
            axis.errorbar(places, middle, reach, fmt="o-", color=COLOURS[method], capsize=3, label=METHODS[method].title)
    for axis, label in zip(axes, ("gain in NLL, %", "right label, %"), strict=True):
        axis.set(xscale="log", xlabel="examples", ylabel=label, title="filing")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    return figure


def heat_map(results: Results) -> Any:
    """Filing: rows are whose test items, columns whose factors; the change of the NLL from the plain model, in percent."""
    lent = {(cell.user, cell.owner): row for cell, row in results.rows.items() if cell.owner}
    own = {(cell.user, cell.user): results.rows[cell] for cell in results.select("default", ("filing",)) if cell.seed == 0}
    users = [user for user, _ in own if all((user, other) in lent for other, _ in own if other != user)]
    if len(users) < 2:
        return None
    plain = {cell.user: results.plain(cell)["test_nll"] for cell in results.select("default", ("filing",)) if cell.seed == 0}
    table = np.array([[100 * ({**lent, **own}[user, owner]["test_nll"] / plain[user] - 1) for owner in users] for user in users])
    figure, axis = plt.subplots(figsize=(8.4, 6.8), layout="constrained")
    limit = float(np.abs(np.diag(table)).max())
    image = axis.imshow(table, cmap="RdYlBu_r", vmin=-limit, vmax=limit)
    axis.set_xticks(range(len(users)), users, rotation=40, ha="right")
    axis.set_yticks(range(len(users)), users)
    axis.set(xlabel="factors of", ylabel="test items of", title="filing: NLL against the plain model, %")
    for place, value in np.ndenumerate(table):
        axis.text(
            *reversed(place), f"{value:+.0f}", ha="center", va="center", fontsize=8, color="white" if abs(value) > 0.6 * limit else "black"
        )
    figure.colorbar(image, ax=axis, shrink=0.8)
    return figure
