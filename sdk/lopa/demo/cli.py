"""`lopa demo`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def demo(
    users: Annotated[int, typer.Option(help="How many held-out packages play a user.", min=2, max=14)] = 8,
    steps: Annotated[int | None, typer.Option(help="Tuning steps a task (default: 50 for completion, 200 for filing).", min=1)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures here (PNG, SVG or PDF).")] = None,
    folder: Annotated[Path | None, typer.Option(help="Keep the users' folders here (default: a temporary folder).")] = None,
) -> None:
    """Eight users, one frozen model: each tunes on code of its own, at the same time, and is measured on what it never tuned on.

    Starts a server with lopa-nano on this machine. Each user is a Python package that no part of the product was trained on, with a
    device process and a folder of its own, and learns two personal tasks: to go on with its own code, and to name the module
    that a snippet is from.
    """
    from lopa.demo.run import DemoOptions, run

    # Ended from outside, the demo still ends its server and devices: SystemExit runs their `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    result = run(DemoOptions(users, steps, folder), _Screen())
    _print(result)
    if json_file is not None:
        result.write(json_file)
        typer.echo(f"figures: {json_file}")
    if plot is not None:
        from lopa.demo.plot import draw

        draw(result, plot)
        typer.echo(f"picture: {plot}")


class _Screen:
    """Shows the demo's events: a bar for each user and task while tuning, a line for each phase and result."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description:<26}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[nll]}"),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns)
        self.bars: dict[tuple[str, str], Any] = {}

    def __call__(self, event: str, values: dict[str, Any]) -> None:
        if event == "phase":
            self._phase(values)
            return
        key = (values["user"], values["task"])
        if event == "step":
            if key not in self.bars:
                self.bars[key] = self.progress.add_task(" ".join(key), total=values["steps"], nll="")
            loss = values["nll"]
            self.progress.update(self.bars[key], completed=values["step"], nll="" if loss is None else f"NLL {loss:.2f}")
        elif event == "done":
            right = values["personal_accuracy"]
            answers = "" if right is None else f", {100 * values['base_accuracy']:.0f} -> {100 * right:.0f} % right"
            self.progress.console.print(
                f"{' '.join(key):<26} test NLL {values['base_nll']:.3f} -> {values['personal_nll']:.3f}{answers}; "
                f"{values['factor_bytes'] / 1024:.1f} KiB of factors, {values['tune_seconds']:.0f} s, "
                f"{values['sent_bytes'] / 1e6:.1f} MB sent, {values['received_bytes'] / 1e6:.1f} MB received",
                highlight=False,
            )

    def _phase(self, values: dict[str, Any]) -> None:
        self.progress.console.print(f"[bold]{values['title']}")
        if values["name"] == "tune":
            self.progress.start()
        else:
            self.progress.stop()


def _print(result: Any) -> None:
    """The tables that a person reads at the end."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for task in dict.fromkeys(row.task for row in result.users):
        table = Table(title=f"{task}: NLL per target token on test items", title_justify="left")
        filing = task == "filing"
        for name in (
            "user",
            "plain model",
            "own factors",
            "gain",
            "others' factors",
            *(("plain right", "own right", "chance") if filing else ()),
        ):
            table.add_column(name, justify="left" if name == "user" else "right")
        for row in result.of_task(task):
            cells = [row.name, f"{row.base_nll:.3f}", f"{row.personal_nll:.3f}", f"{100 * row.gain:.1f} %", f"{row.other_nll:.3f}"]
            if filing:
                cells += [f"{100 * value:.0f} %" for value in (row.base_accuracy, row.personal_accuracy, row.chance_accuracy)]
            table.add_row(*cells)
        console.print(table)
    figures, mixed = result.summary(), result.mixed_batch
    for task in dict.fromkeys(row.task for row in result.users):
        line = f"{task}: mean gain {figures[f'{task}.mean_gain_percent']:.1f} %"
        if f"{task}.mean_personal_accuracy" in figures:
            plain, own, chance = (100 * figures[f"{task}.mean_{name}_accuracy"] for name in ("base", "personal", "chance"))
            line += f"; right answers: plain {plain:.1f} %, own factors {own:.1f} %, chance {chance:.1f} %"
        console.print(line, highlight=False)
    console.print(
        f"mixed batch: {mixed.requests} streams of {mixed.users} users at once: {mixed.tokens_per_second:.0f} tokens/s with soft prompts, "
        f"{mixed.plain_tokens_per_second:.0f} without; factors at most {figures['max_factor_bytes'] / 1024:.1f} KiB a user and task",
        highlight=False,
    )
    console.print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in result.seconds.items()), highlight=False)
