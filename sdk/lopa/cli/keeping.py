"""`lopa move` and `lopa bundle`: what lies on this device. No server is needed, except to fetch."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from lopa.cli.commands import Address, Folder, Json, PersonaName, Tls
from lopa.cli.connecting import open_client
from lopa.cli.output import download_bar, print_json

move = typer.Typer(help="Take a persona to another device: export it to a file, import it there.", no_args_is_help=True)
bundle = typer.Typer(help="Bundles on this device: fetch, list, clean.", no_args_is_help=True)
Archive = Annotated[Path, typer.Argument(metavar="FILE", help="The exported persona.", show_default=False)]


@move.command("export")
def export_(folder: Folder, file: Archive, persona: PersonaName = "default") -> None:
    """Write a persona, its versions and its unfinished run to one file. An encrypted persona stays encrypted."""
    import lopa

    lopa.open_personal(folder, persona).export(file)
    print(f"persona {persona} is in {file}, {file.stat().st_size} bytes")


@move.command("import")
def import_(
    file: Archive,
    folder: Folder,
    persona: Annotated[str | None, typer.Option("--persona", help="Its new name; default: its own.", show_default=False)] = None,
) -> None:
    """Put an exported persona into a user's folder."""
    import lopa

    name = lopa.import_persona(file, folder, persona)
    print(f"persona {name} is in {folder}, at version {lopa.open_personal(folder, name).version}")


@bundle.command()
def fetch(address: Address, tls: Tls = False) -> None:
    """Download a server's bundle, or find that it is here already."""
    with open_client(address, tls) as client, download_bar("fetching the bundle") as bar:
        found = client.bundle(progress=bar)
    print(f"{found.manifest.id}  {found.folder}")


@bundle.command("list")
def list_(as_json: Json = False) -> None:
    """List the bundles in the cache and when each was last used."""
    from lopa.cache import list_bundles

    entries = list_bundles()
    if as_json:
        print_json([{**entry.__dict__, "folder": str(entry.folder)} for entry in entries])
        return
    for entry in entries:
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d")
        print(f"{entry.bundle_id}  {entry.size / 1e6:8.1f} MB  used {used}  {entry.made_for or 'incomplete'}")


@bundle.command()
def clean(days: Annotated[float, typer.Option(min=0, help="Remove what was not used for so many days; 0 removes all.")] = 90.0) -> None:
    """Remove bundles that nobody used for a while, and downloads that were given up. They are fetched again when needed."""
    from lopa.cache import clean_bundles

    gone = clean_bundles(days)
    print(f"{len(gone)} removed, {sum(entry.size for entry in gone) / 1e6:.1f} MB")
