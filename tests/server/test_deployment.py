"""The deployment files say what the command understands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from lopa_server.cli import serve

ROOT = Path(__file__).resolve().parents[2]


def _options() -> set[str]:
    """Of `lopa serve`."""
    app = typer.Typer()
    app.command()(serve)
    return {name for parameter in typer.main.get_command(app).params for name in parameter.opts}


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("deploy/lopa.service", r"(?<=\s)--[a-z-]+(?=\s)"),
        ("deploy/kubernetes/lopa.yaml", r"(?<=- )--[a-z-]+(?==)"),
        ("docs/operations.md", r"(?<=`)--[a-z-]+"),
        ("SECURITY.md", r"(?<=`)--[a-z-]+"),
    ],
)
def test_every_option_exists(file: str, pattern: str) -> None:
    used = set(re.findall(pattern, (ROOT / file).read_text(encoding="utf-8")))
    assert used
    assert used <= _options()


def test_containers_have_no_root_and_nothing_writable() -> None:
    manifest, container = (ROOT / "deploy/kubernetes/lopa.yaml").read_text(), (ROOT / "deploy/Containerfile").read_text()
    for line in ("runAsNonRoot: true", "readOnlyRootFilesystem: true", "allowPrivilegeEscalation: false", "drop: [ALL]"):
        assert line in manifest
    user = re.findall(r"^USER (\d+):\d+$", container, re.MULTILINE)
    assert user and user[-1] != "0" and f"runAsUser: {user[-1]}" in manifest
