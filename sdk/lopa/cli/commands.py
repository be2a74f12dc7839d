"""The device's commands. Heavy imports happen inside: `lopa --help` must be fast."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from lopa.cli.output import download_bar, fail, print_json, tuning_bar, usage_error

Address = Annotated[str, typer.Argument(metavar="ADDRESS", help="The server, HOST:PORT.", show_default=False)]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A user's folder.", show_default=False)]
PersonaName = Annotated[str, typer.Option("--persona", help="Which of the user's personas.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Tls = Annotated[bool, typer.Option("--tls", help="Connect with TLS.")]


def info(address: Address, tls: Tls = False, as_json: Json = False) -> None:
    """Show what a server hosts: the model, its limits, its bundle."""
    import lopa

    with lopa.connect(address, tls=tls) as client:
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


def tune(
    address: Address,
    folder: Folder,
    examples: Annotated[
        Path,
        typer.Argument(
            metavar="EXAMPLES",
            help='JSON lines with "prompt" and "target" or "messages", or a plain text file.',
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ],
    persona: PersonaName = "default",
    validation: Annotated[
        Path | None, typer.Option(help="JSON lines to measure on; default: a fifth of the examples.", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; default: the bundle's.", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples a step; default: the bundle's.", show_default=False)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: the bundle's.", show_default=False)] = None,
    placement: Annotated[
        Literal["front", "after_prefix"] | None, typer.Option(help="Of the soft prompt; default: as last tuned.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and the order.")] = 0,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to wait for a server that can't be reached.")] = 120.0,
    tls: Tls = False,
    as_json: Json = False,
) -> None:
    """Teach a persona from examples. Interrupted, the same command goes on where it stopped."""
    import lopa
    from lopa.sources import read_examples
    from lopa.tuning import TuneOptions

    try:
        learn, measure = read_examples(examples), read_examples(validation) if validation else None
    except lopa.TuningError as error:
        usage_error(str(error))
    options: TuneOptions = {"seed": seed, "patience": patience, "placement": placement}
    if steps is not None:
        options["steps"] = steps
    if batch_size is not None:
        options["batch_size"] = batch_size
    if learning_rate is not None:
        options["learning_rate"] = learning_rate
    with lopa.connect(address, tls=tls) as client:
        with download_bar("fetching the bundle") as bar:
            who = client.personal(folder, persona, progress=bar)
        try:
            with tuning_bar() as show:
                report = who.tune(learn, validation=measure, on_step=show, **options)
        except KeyboardInterrupt:
            fail("stopped; every finished step is saved: run the same command again to go on", 130)
    if as_json:
        print_json(report)
        return
    change = f"validation loss {report.start_nll:.4f} -> {report.end_nll:.4f} nats per token"
    if report.kept:
        print(f"version {report.version} saved: {change}, {report.factor_bytes} bytes, {report.seconds:.1f} s")
    else:
        print(f"nothing changed: no step was better than before ({report.start_nll:.4f} nats per token)")


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

    chosen = PersonaStore(folder, persona).rollback(version)
    print(f"persona {persona} is at version {chosen.version} of {chosen.created}")
