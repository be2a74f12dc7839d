"""The demo as a stranger runs it: the shipped model and bundle, processes for server and devices, figures and picture at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lopa.bundle import Bundle
from lopa.fingerprint import fingerprint_folder
from lopa_server.models import nano_bundle_folder, nano_folder

USER_FIELDS = {"name", "task", "base_nll", "personal_nll", "other_nll", "base_accuracy", "personal_accuracy", "factor_bytes"}
USER_FIELDS |= {"tune_seconds", "sent_bytes", "received_bytes"}


@pytest.mark.slow
def test_demo_writes_figures_and_picture(tmp_path: Path) -> None:
    figures, picture = tmp_path / "demo.json", tmp_path / "demo.png"
    command = [sys.executable, "-m", "lopa.cli", "demo", "--users", "2", "--steps", "20", "--json", str(figures), "--plot", str(picture)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads(figures.read_text())
    assert len(document["users"]) == 4
    for row in document["users"]:
        assert set(row) >= USER_FIELDS
        assert row["factor_bytes"] <= 32 * 1024
        assert row["personal_nll"] < row["base_nll"]
        assert row["sent_bytes"] > 0
        assert row["received_bytes"] > 0
    assert set(document["mixed_batch"]) >= {"users", "tokens_per_second", "plain_tokens_per_second"}
    assert document["fm"]["fingerprint"] == fingerprint_folder(nano_folder())
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_shipped_bundle_is_whole_and_fits_the_shipped_model() -> None:
    bundle = Bundle.open(nano_bundle_folder())
    assert bundle.manifest.fm.fingerprint == fingerprint_folder(nano_folder())
    assert (nano_folder() / "model.safetensors").stat().st_size <= 20_000_000
