"""Load tests of a running server, as its clients see it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lopa import event_loop
from lopa.cli.commands import Address, Json, Tls
from lopa.cli.output import usage_error

if TYPE_CHECKING:
    from lopa.bench.run import Progress
    from lopa.bench.workload import Range, Workload

bench = typer.Typer(help=__doc__, no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """With a single command typer would drop its name."""


@bench.command()
def serve(
    address: Address,
    concurrency: Annotated[int, typer.Option(min=1, help="Closed loop: requests under way at any time.")] = 32,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Open loop instead: requests per second on average.", show_default=False)
    ] = None,
    cv: Annotated[float, typer.Option(min=0.01, help="With --rate: coefficient of variation of the gaps; 1 is Poisson.")] = 1.0,
    requests: Annotated[int | None, typer.Option(min=1, help="Requests at most.", show_default=False)] = None,
    duration: Annotated[float | None, typer.Option(min=0.1, help="Seconds; default: 30 unless --requests is given.")] = None,
    users: Annotated[int, typer.Option(min=0, help="Distinct soft prompts; 0 asks the plain model.")] = 32,
    skew: Annotated[float, typer.Option(min=0, help="0: users take turns; above: user k has a weight of k^-skew.")] = 0.0,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each soft prompt.")] = 10,
    prefix_tokens: Annotated[int, typer.Option(min=0, help="Tokens that all requests share, before the soft prompt.")] = 0,
    prompt_tokens: Annotated[str, typer.Option(metavar="N or LOW-HIGH", help="Tokens of each prompt.")] = "54",
    new_tokens: Annotated[str, typer.Option(metavar="N or LOW-HIGH", help="Tokens to generate.")] = "64",
    timeout: Annotated[float, typer.Option(min=0.1, help="Deadline of each request in seconds.")] = 300.0,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    token_file: Annotated[Path | None, typer.Option(help="File with the API key or token.", exists=True, show_default=False)] = None,
    tls: Tls = False,
    as_json: Json = False,
) -> None:
    """Put load on a server and report throughput, latencies and errors. Prompts are random tokens."""
    from lopa.bench.run import run_load
    from lopa.bench.summary import lines, summarize
    from lopa.bench.workload import Workload
    from lopa.transport import Endpoint

    try:
        workload = Workload(
            concurrency=None if rate else concurrency,
            rate=rate,
            cv=cv,
            requests=requests,
            duration=duration or (None if requests else 30.0),
            users=users,
            skew=skew,
            rows=rows,
            prefix_tokens=prefix_tokens,
            prompt_tokens=_range(prompt_tokens, "--prompt-tokens"),
            new_tokens=_range(new_tokens, "--new-tokens"),
            timeout=timeout,
            seed=seed,
        )
        token = token_file.read_text().strip() if token_file else None
        endpoint = Endpoint.of(address, tls, token, max_bytes=64 << 20, keepalive=30.0)
        with _progress(workload) as show:
            result = event_loop.run(run_load(endpoint, workload, show))
    except ValueError as error:
        usage_error(str(error))
    summary = summarize(result)
    if as_json:
        print(json.dumps({"workload": asdict(workload), "summary": asdict(summary)}, indent=1))
        return
    print("\n".join(lines(summary)))


def _range(text: str, option: str) -> Range:
    """From "64" or "8-512"."""
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError:
        usage_error(f"{option} {text}: it must be a number or two, such as 64 or 8-512")


@contextmanager
def _progress(workload: Workload) -> Iterator[Progress]:
    """A bar over requests, or over time where only a duration ends the workload."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("load"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=workload.requests or workload.duration)

        def show(done: int, errors: int, tokens: int) -> None:
            elapsed = bar.tasks[task].elapsed or 0.0
            text = f"{done} requests, {tokens / max(elapsed, 1e-9):.0f} tokens/s" + (f", {errors} failed" if errors else "")
            bar.update(task, completed=done if workload.requests else elapsed, description=text)

        yield show
