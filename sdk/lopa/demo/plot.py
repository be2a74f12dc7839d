"""The demo's picture: who gained how much, and whose factors fit whom."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lopa.demo.results import DemoResult, UserResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAIN, OWN, OTHER = "#9aa5b1", "#1f6f8b", "#d9a05b"


def draw(result: DemoResult, path: Path) -> None:
    """Write a picture of the result (the suffix picks the format).

    Raises:
        ModuleNotFoundError: matplotlib is not installed; `pip install "lopa[demo]"` brings it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(user.task for user in result.users))
    figure, axes = plt.subplots(len(tasks), 2, figsize=(14, 5.2 * len(tasks)), squeeze=False, layout="constrained")
    for row, task in enumerate(tasks):
        users = result.of_task(task)
        _bars(axes[row][0], task, users)
        _heat_map(axes[row][1], task, users, figure)
    mixed = result.mixed_batch
    figure.suptitle(
        f"{result.fm['name']}: {len(result.of_task(tasks[0]))} users, one frozen model.  Mixed batch of {mixed.requests} requests: "
        f"{mixed.tokens_per_second:.0f} tokens/s personal, {mixed.plain_tokens_per_second:.0f} plain"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axis: Axes, task: str, users: list[UserResult]) -> None:
    """NLL per target token of every user: plain, own factors, the others' factors."""
    places = np.arange(len(users))
    for offset, label, color, values in (
        (-0.27, "plain model", PLAIN, [user.base_nll for user in users]),
        (0.0, "own factors", OWN, [user.personal_nll for user in users]),
        (0.27, "others' factors (mean)", OTHER, [user.other_nll for user in users]),
    ):
        axis.bar(places + offset, values, 0.27, label=label, color=color)
    axis.set_xticks(places, [_label(user) for user in users], rotation=40, ha="right", rotation_mode="anchor")
    axis.set_ylabel("NLL per target token (nats)")
    axis.set_title(f"{task}: lower is better")
    axis.legend(frameon=False, ncols=3, loc="upper center")
    axis.set_ylim(0, 1.18 * max(max(user.base_nll, user.other_nll) for user in users))
    axis.spines[["top", "right"]].set_visible(False)


def _label(user: UserResult) -> str:
    if user.personal_accuracy is None or user.base_accuracy is None:
        return f"{user.name}\n{100 * user.gain:+.1f} %"
    return f"{user.name}\n{100 * user.base_accuracy:.0f} → {100 * user.personal_accuracy:.0f} % right"


def _heat_map(axis: Axes, task: str, users: list[UserResult], figure: Any) -> None:
    """Rows: whose test items. Columns: whose factors. Colour: change of NLL from the plain model, in percent."""
    names = [user.name for user in users]
    change = np.array([[100 * (user.nll_by_factors[name] / user.base_nll - 1) for name in names] for user in users])
    limit = float(np.abs(np.diag(change)).max()) or 1.0
    image = axis.imshow(change, cmap="RdYlBu_r", vmin=-limit, vmax=limit)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("factors of")
    axis.set_ylabel("test items of")
    axis.set_title(f"{task}: NLL against the plain model, %")
    for i in range(len(names)):
        for j in range(len(names)):
            dark = abs(change[i, j]) > 0.6 * limit
            axis.text(j, i, f"{change[i, j]:+.0f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    figure.colorbar(image, ax=axis, shrink=0.8)
