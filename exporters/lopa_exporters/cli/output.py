"""What the exporter's commands print."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from lopa.bundle import Bundle

    from lopa_exporters.pipeline import ExportPlan, Made


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """Tell expected failures in one line and exit with 1."""
    from lopa.errors import BundleError

    from lopa_exporters.eval.sandbox import SandboxError
    from lopa_exporters.structure import ExportError

    try:
        yield
    except (ValueError, OSError, ExportError, BundleError, SandboxError) as error:
        typer.echo(f"lopa: {error}", err=True)
        raise typer.Exit(1) from error


class TerminalReporter:
    """Progress bars on standard error."""

    @contextlib.contextmanager
    def task(self, title: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
        """See `lopa_exporters.pipeline.Reporter`."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        counted: tuple[Any, ...] = (MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[words]}")) if total else ()
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), *counted, console=Console(stderr=True)
        ) as progress:
            task = progress.add_task(title, total=total, words="")
            yield lambda count, words: progress.update(task, advance=count, words=words)
            if total is None:
                progress.update(task, total=1, completed=1)


def show(made: Made, plan: ExportPlan) -> None:
    """What was made, as a table; and a loud note when nothing was learned."""
    from rich.console import Console

    from lopa_exporters.quality import rows_of

    rows = describe(made.bundle)
    if made.quality is not None:
        rows |= {f"quantized: {name}": value for name, value in rows_of(made.quality).items()}
        plan.out.with_name(f"{plan.out.name}.quality.json").write_text(made.quality.to_json(), encoding="utf-8")
    print_table(f"Bundle {made.bundle.manifest.id[:16]} in {made.bundle.folder}", rows)
    if plan.population is None and plan.trained is None and made.bundle.manifest.profile == "factors":
        Console(stderr=True).print(
            "[yellow]No population was given: the shared heads are random.[/] Users can tune over them; --population makes a better start.",
            highlight=False,
        )


def describe(bundle: Bundle) -> dict[str, str]:
    """A bundle's manifest for people."""
    manifest = bundle.manifest
    count = sum(math.prod(spec.shape) for spec in manifest.personal)
    size = sum(math.prod(spec.shape) * int(spec.dtype[1:]) // 8 for spec in manifest.personal)
    tuning = manifest.tuning
    return {
        "model": f"{manifest.fm.name}, hidden size {manifest.fm.hidden_size}, fingerprint {manifest.fm.fingerprint[:16]}",
        "encoder": f"{manifest.encoder.name}, {manifest.encoder.max_tokens} tokens, cut on the {manifest.encoder.truncation_side}",
        "method": f"{manifest.profile}, {manifest.composition}, m {manifest.rows}, r {manifest.rank}",
        "tuning": f"{tuning.steps} steps of {tuning.batch_size}, learning rate {tuning.learning_rate:g}, clip {tuning.clip:g}",
        **{name: f"{file.size:,} bytes" for name, file in manifest.files.items()},
        **{f"personal {spec.name}": f"{' x '.join(map(str, spec.shape))} {spec.dtype}" for spec in manifest.personal},
        "a user owns": f"{count:,} values, {size:,} bytes",
        "priors": ", ".join(f"{prior.name} (rate {prior.rate:g})" for prior in manifest.priors) or "none",
    }


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """Two columns. Values are printed as they are: "[/]" in one is no markup."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    Console().print(table)
