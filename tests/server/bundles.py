"""A bundle whose files are arbitrary bytes: valid for whoever only stores and sends it."""

from __future__ import annotations

from pathlib import Path

from lopa.bundle import Bundle, digest_file
from lopa.manifest import FILES, MANIFEST, EncoderSpec, FMSpec, Manifest, TensorSpec


def write_bundle(folder: Path, *, fingerprint: str, rows: int = 4, hidden: int = 32) -> Bundle:
    """Write it; larger than two chunks of a download."""
    folder.mkdir(parents=True)
    for number, name in enumerate(FILES):
        (folder / name).write_bytes(bytes((number + index * index) % 251 for index in range(120_000)))
    manifest = Manifest(
        fm=FMSpec("tiny", fingerprint, hidden),
        encoder=EncoderSpec("tiny", 64),
        rows=rows,
        rank=1,
        composition="product",
        profile="factors",
        instance=(TensorSpec("u", (rows, 1)),),
        personal=(TensorSpec("a", (rows, 1)),),
        files={name: digest_file(folder / name) for name in FILES},
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.open(folder)
