"""The device's commands. Heavy imports happen inside: `lopa --help` must be fast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lopa.cli.connecting import open_client, open_persona, secret
from lopa.cli.output import fail, print_json, usage_error

if TYPE_CHECKING:
    from lopa.examples import Example
    from lopa.tuning import TuneReport

Address = Annotated[str, typer.Argument(metavar="ADDRESS", help="The server, HOST:PORT.", show_default=False)]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A user's folder.", show_default=False)]
PersonaName = Annotated[str, typer.Option("--persona", help="Which of the user's personas.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Tls = Annotated[bool, typer.Option("--tls", help="Connect with TLS; the environment names PEM files: LOPA_TLS_ROOTS, _KEY, _CHAIN.")]
ExampleFile = Annotated[
    Path,
    typer.Argument(
        metavar="EXAMPLES",
        help='JSON lines with "prompt" and "target", or "messages"; or plain text.',
        exists=True,
        dir_okay=False,
        show_default=False,
    ),
]


def info(address: Address, tls: Tls = False, as_json: Json = False) -> None:
    """Show what a server hosts: the model, its limits, its bundle."""
    with open_client(address, tls) as client:
        model = client.model
    if as_json:
        print_json(model)
        return
    rows = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "revision": model.revision,
        "hidden size": model.hidden_size,
        "context": f"{model.context_length} tokens",
        "features": ", ".join(model.features),
        "soft prompts": f"at most {model.limits.max_virtual_tokens} rows, as {', '.join(model.soft_prompt_dtypes)}",
        "bundle": f"{model.bundle_id} ({model.bundle_bytes / 1e6:.1f} MB)" if model.bundle_id else "none",
        "server": model.server_version,
    }
    for name, value in rows.items():
        print(f"{name:14}{value}")


def score(
    address: Address,
    examples: ExampleFile,
    personal: Annotated[Path | None, typer.Option(help="Measure as this user's folder has learnt.", show_default=False)] = None,
    persona: PersonaName = "default",
    tls: Tls = False,
    as_json: Json = False,
) -> None:
    """Measure how likely a file's targets are: nats per token, for the plain model or for a persona."""
    import lopa

    items = _read(examples)
    if not items:
        usage_error(f"{examples} holds no examples: there is nothing to measure")
    with open_client(address, tls) as client:
        if personal is None:
            scores = client.score([lopa.Pair(one.prompt, one.target, None, one.append_end, one.prefix) for one in items])
        else:
            scores = open_persona(client, personal, persona, plain=True).score(items)
    if as_json:
        print_json(scores)
        return
    tokens = sum(one.target_tokens for one in scores)
    print(f"{sum(one.nll_sum for one in scores) / tokens:.4f} nats per token over {len(scores)} examples, {tokens} tokens")


def tune(
    address: Address,
    folder: Folder,
    examples: ExampleFile,
    persona: PersonaName = "default",
    validation: Annotated[Path | None, typer.Option(help="A file to measure on; default: a fifth of them.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; default: the bundle's.", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples a step; default: the bundle's.", show_default=False)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: the bundle's.", show_default=False)] = None,
    placement: Annotated[
        Literal["front", "after_prefix"] | None, typer.Option(help="Of the soft prompt; default: as last tuned.", show_default=False)
    ] = None,
    early_stopping: Annotated[int, typer.Option(min=0, help="End after so many measurements without a better one; 0 never.")] = 0,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Steps of this call; it goes on the next time.", show_default=False)] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Time of this call.", show_default=False)] = None,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Message bytes of this call.", show_default=False)] = None,
    low_priority: Annotated[bool, typer.Option("--low-priority", help="Let other users go first.")] = False,
    keep_examples: Annotated[bool, typer.Option("--keep-examples", help="Keep them on this device for `lopa migrate`.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and the order.")] = 0,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to wait for a server that can't be reached.")] = 120.0,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this PNG file.", show_default=False)] = None,
    tls: Tls = False,
    as_json: Json = False,
) -> None:
    """Teach a persona from examples. Interrupted, the same command goes on where it stopped."""
    from lopa.tuning import TuneOptions

    if plot is not None and not plot.absolute().parent.is_dir():
        usage_error(f"--plot: there is no folder {plot.parent}")
    learn, measure = _read(examples), _read(validation) if validation else None
    given = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    options = TuneOptions(
        seed=seed,
        patience=patience,
        placement=placement,
        early_stopping=early_stopping,
        max_steps=max_steps,
        max_seconds=max_seconds,
        max_bytes=max_bytes,
        low_priority=low_priority,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[typeddict-item]
    )
    with open_client(address, tls) as client:
        who = open_persona(client, folder, persona)
        with _interruptible():
            report = who.tune(learn, validation=measure, progress=True, keep_examples=keep_examples, **options)
    if plot is not None:
        report.plot(plot)
    _tell(report, as_json=as_json)


def migrate(address: Address, folder: Folder, persona: PersonaName = "default", tls: Tls = False, as_json: Json = False) -> None:
    """Learn a persona's kept examples again, for the server's model of now. Interrupted, the same command goes on."""
    from lopa.progress_bar import tuning_bar

    with open_client(address, tls) as client:
        who = open_persona(client, folder, persona, plain=True)
        with _interruptible(), tuning_bar() as show:
            report = who.migrate(on_step=show)
    _tell(report, as_json=as_json)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        fail("stopped; every finished step is saved: run the same command again to go on", 130)


def _read(path: Path) -> list[Example]:
    from lopa.errors import TuningError
    from lopa.sources import read_examples

    try:
        return read_examples(path)
    except TuningError as error:
        usage_error(str(error))


def _tell(report: TuneReport, *, as_json: bool) -> None:
    """What a run gave."""
    if as_json:
        print_json(report)
        return
    change = f"validation loss {report.start_nll:.4f} -> {report.end_nll:.4f} nats per token"
    if report.resumable:
        print(f"stopped at step {report.steps} ({report.outcome}): run the same command again to go on")
    elif report.kept:
        begun = f", by way of the prior of {report.prior}" if report.prior else ""
        print(f"version {report.version} saved: {change}, {report.factor_bytes} bytes, {report.seconds:.1f} s{begun}")
    else:
        than = f"before ({report.start_nll:.4f} nats per token) and the plain model ({report.plain_nll:.4f})"
        print(f"nothing changed: no step was better than {than}")


def history(folder: Folder, persona: PersonaName = "default", as_json: Json = False) -> None:
    """List the versions of a persona's factors; * is the current one. Needs no server."""
    from lopa.folder import PersonaStore

    record = PersonaStore(folder, persona).record()
    if as_json:
        print_json(asdict(record))
        return
    for version in record.versions:
        mark = "*" if version.version == record.current else " "
        nll = "" if version.validation_nll is None else f"  validation {version.validation_nll:.4f}"
        print(f"{mark}{version.version:4}  {version.created}  {version.origin:5}  {version.size} bytes{nll}")


def rollback(
    folder: Folder,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1, help="As `lopa history` lists it.", show_default=False)],
    persona: PersonaName = "default",
) -> None:
    """Make another version of a persona's factors the current one. Nothing is lost. Needs no server."""
    from lopa.folder import PersonaStore

    chosen = PersonaStore(folder, persona, secret()).rollback(version)
    print(f"persona {persona} is at version {chosen.version} of {chosen.created}")
