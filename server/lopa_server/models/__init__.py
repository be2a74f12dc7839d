"""The embedded default: lopa-nano and its bundle."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def nano_folder() -> Path:
    """lopa-nano as a Hugging Face folder."""
    return _HERE / "lopa_nano"


def nano_bundle_folder() -> Path:
    """The bundle that devices use with lopa-nano."""
    return _HERE / "lopa_nano_bundle"
