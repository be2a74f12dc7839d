"""`lopa export verify`, `inspect`, `mobile`, `sign` and `keygen`: for bundles that exist. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lopa_exporters.cli.output import describe, failing, print_table

BundleFolder = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a bundle.")]
KeyFile = Annotated[Path, typer.Option(help="File of the private key.")]


def verify(
    bundle: BundleFolder,
    key: Annotated[list[str] | None, typer.Option(help="Public key that must have signed it, in hex; any one of several.")] = None,
) -> None:
    """Check a bundle again: digests, signature, operators, and the graphs against each other and against numpy."""
    from lopa.bundle import Bundle
    from lopa.signing import check_signature

    from lopa_exporters.audit import Audit

    with failing():
        opened = Bundle.open(bundle)
        typer.echo(f"ok  digests: {len(opened.manifest.files)} files, id {opened.manifest.id}")
        if key:
            check_signature(opened.manifest, key)
            typer.echo("ok  signature: by a trusted key")
        for check in Audit(opened).run():
            typer.echo(f"ok  {check.name}: {check.found}")


def inspect(bundle: BundleFolder) -> None:
    """Show what a bundle holds: model, encoder, method, personal tensors, operators of each graph."""
    from lopa.bundle import Bundle

    from lopa_exporters.structure import check_structure

    with failing():
        opened = Bundle.open(bundle)
        rows = describe(opened)
        rows["signed"] = "yes" if opened.manifest.signature else "no"
        for name in opened.manifest.graphs:
            structure = check_structure(opened.path(f"{name}.onnx"))
            operators = sorted(structure.operators.items(), key=lambda entry: (-entry[1], entry[0]))
            listed = ", ".join(f"{count} {operator.removeprefix('::')}" for operator, count in operators)
            rows[f"{name}: opset {structure.opset}, IR {structure.ir_version}"] = f"{structure.constants:,} bytes of weights; {listed}"
    print_table(f"Bundle {opened.manifest.id}", rows)


def mobile(
    bundle: BundleFolder,
    out: Annotated[Path, typer.Option(help="New folder for encode.ort, compose.ort and so on.")],
) -> None:
    """Write a bundle's graphs in ORT format, for ONNX Runtime's smaller builds on phones."""
    from lopa.bundle import Bundle

    from lopa_exporters.mobile import convert

    with failing():
        for path in convert(Bundle.open(bundle), out):
            typer.echo(f"{path}: {path.stat().st_size:,} bytes")


def keygen(key: KeyFile) -> None:
    """Make an Ed25519 key: the private one goes to a new file that only you can read, the public one is printed."""
    from lopa_exporters.signing import create_key

    with failing():
        typer.echo(create_key(key))


def sign(bundle: BundleFolder, key: KeyFile) -> None:
    """Sign a bundle in its place. Its id stays; devices with the public key among their trusted keys take it, and no other."""
    from lopa_exporters.signing import sign_bundle

    with failing():
        signed = sign_bundle(bundle, key)
        typer.echo(f"signed {signed.manifest.id}")
