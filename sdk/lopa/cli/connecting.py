"""How commands reach a server and a persona. What must not stand in a command line comes from the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lopa.cli.output import download_bar, note

if TYPE_CHECKING:
    from lopa.client import Client
    from lopa.persona import Persona


def open_client(address: str, tls: bool) -> Client:
    """Connect with LOPA_TOKEN; with `tls` or LOPA_TLS_ROOTS also with the PEM files LOPA_TLS_ROOTS, LOPA_TLS_KEY and LOPA_TLS_CHAIN."""
    import lopa

    files = {name: Path(value) for name in ("roots", "key", "chain") if (value := os.environ.get(f"LOPA_TLS_{name.upper()}"))}
    return lopa.connect(address, tls=lopa.Tls.from_files(**files) if files else tls, token=os.environ.get("LOPA_TOKEN") or None)


def secret() -> str | None:
    """The passphrase of encrypted personas: LOPA_PASSPHRASE."""
    return os.environ.get("LOPA_PASSPHRASE") or None


def open_persona(client: Client, folder: Path, persona: str, *, plain: bool = False) -> Persona:
    """Open or create a persona, with a progress bar if its bundle must be fetched. plain: also one of another model or bundle."""
    with download_bar("fetching the bundle") as bar:
        opened = client.personal(folder, persona, secret=secret(), mismatch="plain" if plain else "refuse", progress=bar)
    if opened.plain:
        note(
            f"the plain model answers: persona {persona} belongs to another model or bundle; `lopa migrate` learns its kept examples again"
        )
    elif plain and opened.version == 1:
        note(f"persona {persona} in {folder} is not tuned: what answers is the bundle's start, often worse than the plain model")
    return opened
