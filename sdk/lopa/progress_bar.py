"""The progress bar of a tuning run, for a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lopa.tuning import TuneProgress


@contextlib.contextmanager
def tuning_bar(then: Callable[[TuneProgress], None] | None = None) -> Iterator[Callable[[TuneProgress], None]]:
    """A bar over optimizer steps with the losses beside it, on standard error and only in a terminal.

    then: called with the same progress afterwards.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("tuning"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("encoding and measuring", total=None)

        def show(now: TuneProgress) -> None:
            parts = [f"loss {now.loss:.3f}"] if now.loss is not None else []
            if now.validation_nll is not None:
                parts.append(f"validation {now.validation_nll:.3f} (before: {now.start_nll:.3f})")
            if now.waiting:
                parts = [f"waiting: {now.waiting}"]
            bar.update(task, completed=now.step, total=now.steps, description=", ".join(parts))
            if then is not None:
                then(now)

        yield show
