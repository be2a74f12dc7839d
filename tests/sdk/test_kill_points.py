"""Death at a random moment of saving, fetching and tuning: the folder opens, at most one step is lost, and everything can go on.

`benchmarks/kill_points.py` does the same a thousand times. (Real kills of real processes: test_resume.py.)
"""

from __future__ import annotations

import random
from pathlib import Path

import lopa
from lopa.bundle import Bundle
from lopa.folder import PersonaStore

from benchmarks.kill_points import fetching, saving, tuning
from tests.sdk.conftest import EXAMPLES, SETTINGS
from tests.sdk.test_cache import Shop, visit
from tests.sdk.test_folder import moved

POINTS = 30


def test_saving(bundle: Bundle, tmp_path: Path) -> None:
    tally = saving(bundle, tmp_path, POINTS, random.Random(0))
    assert (tally.points, tally.not_opened) == (POINTS, 0) and tally.completed
    store = PersonaStore(tmp_path, "default")
    with store.lock():
        store.append(moved(store, 1e-3), validation_nll=1.0)
    assert not list(tmp_path.rglob("*.tmp"))


def test_fetching(bundle: Bundle, tmp_path: Path) -> None:
    bundle.write_archive(tmp_path / "archive")
    shop = Shop(bundle, (tmp_path / "archive").read_bytes())
    with visit(shop, tmp_path / "cache") as client:
        tally = fetching(client, shop.bundle_id, tmp_path / "cache", POINTS, random.Random(1))
        assert (tally.points, tally.not_opened) == (POINTS, 0)
        assert client.bundle().manifest == bundle.manifest
    assert any(offset > 0 for offset in shop.offsets), "what an interrupted download left was used"
    assert {path.suffix for path in (tmp_path / "cache" / "bundles").iterdir()} <= {"", ".lock"}


def test_tuning(client: lopa.Client, tmp_path: Path) -> None:
    tally = tuning(client, tmp_path, POINTS, random.Random(2), EXAMPLES, SETTINGS)
    assert tally.points >= POINTS and tally.completed
    assert (tally.not_opened, tally.changed) == (0, 0) and tally.most_steps_lost <= 1
