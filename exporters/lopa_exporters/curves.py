"""Learning curves of a population run: TensorBoard's event files while it runs, and a picture of its log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG, EVENTS, PICTURE = "log.jsonl", "tensorboard", "curves.png"
NAMES = {"loss": "train/nll_per_token", "nll": "validation/nll_per_token", "start_nll": "validation/nll_per_token_at_start"}


class EventWriter:
    """Copies new lines of the run's log to TensorBoard as they come; those up to step `done` were copied by an earlier run."""

    def __init__(self, folder: Path, done: int) -> None:
        self._path, self._events, self._done, self._offset = folder / LOG, folder / EVENTS, done, 0
        self._writer: Any = None

    def follow(self) -> None:
        """Copy what is new."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                row = json.loads(line)
                for key in NAMES.keys() & row.keys() if row["step"] > self._done else ():
                    self._open().add_scalar(NAMES[key], row[key], row["step"])

    def close(self) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> Any:
        """The writer, made for the first value: event files are named by the second, so an idle run could take another one's name."""
        from tensorboardX import SummaryWriter

        if self._writer is None:
            self._writer = SummaryWriter(str(self._events), purge_step=self._done + 1)
        return self._writer


def plot(folder: Path) -> Path:
    """Draw the run's log to curves.png: training loss, smoothed, and validation with own factors against the start values."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    trained = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    axes.plot([step for step, _ in trained], _smooth([loss for _, loss in trained]), label="training, smoothed", color="tab:blue")
    for key, label, color in (
        ("start_nll", "held examples, start values", "tab:gray"),
        ("nll", "held examples, own factors", "tab:orange"),
    ):
        points = _means([(row["step"], row[key]) for row in rows if key in row])
        axes.plot([step for step, _ in points], [value for _, value in points], "o-", markersize=3, label=label, color=color)
    axes.set(xlabel="step", ylabel="NLL per target token (nats)", title="Training over a population")
    axes.legend()
    figure.savefig(folder / PICTURE, dpi=120)
    return folder / PICTURE


def _smooth(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential mean."""
    result: list[float] = []
    for value in values:
        result.append(value if not result else keep * result[-1] + (1 - keep) * value)
    return result


def _means(points: list[tuple[int, float]], parts: int = 20) -> list[tuple[float, float]]:
    """At most `parts` means over consecutive points."""
    size = max(1, -(-len(points) // parts))
    groups: list[Any] = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(sum(column) / len(column) for column in zip(*group, strict=True)) for group in groups]
