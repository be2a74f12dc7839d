"""What all tests have in common."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("lopa", deadline=None)
settings.load_profile("lopa")
"""No example is too slow: how long one takes says how busy the machine is."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with patient tests first, the most patient one before all: what begins last keeps everybody waiting."""
    patience: dict[Path, tuple[float, bool]] = {}
    for item in items:
        timeout = item.get_closest_marker("timeout")
        own = (float(timeout.args[0]) if timeout is not None else 0.0, item.get_closest_marker("slow") is not None)
        patience[item.path] = max(own, patience.get(item.path, own))
    items.sort(key=lambda item: patience[item.path], reverse=True)
