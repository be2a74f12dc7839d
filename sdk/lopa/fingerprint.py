"""The foundation model's fingerprint: what ties factors and bundles to one model."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = (".safetensors", ".bin")
NAMES = ("config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "spiece.model", "vocab.txt")


def fingerprint_folder(folder: Path) -> str:
    """SHA-256 over names, sizes and contents of a Hugging Face folder's configuration, weights and tokenizer: 64 hex digits.

    Raises:
        FileNotFoundError: the folder has no config.json.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    digest = hashlib.sha256(b"lopa.v1.FM\n")
    for path in sorted(folder.iterdir()):
        if path.is_file() and (path.suffix in SUFFIXES or path.name in NAMES):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
