"""What the commands print: results to standard output, progress and errors to standard error."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NoReturn

import typer


def fail(message: str, code: int = 1) -> NoReturn:
    """Print one line and exit."""
    print(f"lopa: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def note(message: str) -> None:
    """Say what the user may not expect, beside the output."""
    print(f"lopa: {message}", file=sys.stderr)


def usage_error(message: str) -> NoReturn:
    """Exit as typer does for wrong usage."""
    raise typer.BadParameter(message)


def print_json(value: Any) -> None:
    """One JSON document; dataclasses become objects."""
    print(json.dumps(value, indent=1, default=asdict, ensure_ascii=False))


@contextlib.contextmanager
def download_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in bytes that appears with the first report, and only in a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(title, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)
