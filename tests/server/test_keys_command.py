"""`lopa keys`: create, list, revoke."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lopa.cli import main
from lopa_server.identity.caller import DEVICE_SCOPES
from lopa_server.identity.keys import KeyFile, KeyFileError


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and output of a command line."""
    with pytest.raises(SystemExit) as ended:
        main(["keys", *arguments])
    return int(ended.value.code or 0), "".join(capsys.readouterr())


def test_a_key_is_made_listed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ["--file", str(tmp_path / "keys.json")]
    _, made = run(capsys, "create", "acme", "--scope", "generate", "--days", "30", "--json", *file)
    key = json.loads(made)
    found = KeyFile(tmp_path / "keys.json").find(key["key"])
    assert found is not None and (found.tenant, found.id) == ("acme", key["id"])
    _, listed = run(capsys, "list", *file)
    assert key["id"] in listed and "acme" in listed and key["key"] not in listed
    assert run(capsys, "revoke", key["id"], *file)[0] == 0
    assert run(capsys, "list", *file)[1] == ""
    code, told = run(capsys, "revoke", key["id"], *file)
    assert code == 1 and f"has no key {key['id']}" in told


@pytest.mark.parametrize("arguments", [("create", "no name"), ("create", "a", "--scope", "everything"), ("create", "a", "--days", "1e300")])
def test_wrong_arguments_are_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    assert run(capsys, *arguments, "--file", str(tmp_path / "keys.json"))[0] == 2
    assert list(tmp_path.glob("*.json")) == []


@pytest.mark.parametrize("content", ["", "[]", '{"version": 2, "keys": []}', '{"version": 1, "keys": [{"id": "a"}]}'])
def test_a_damaged_file_is_told_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    with pytest.raises(KeyFileError):
        KeyFile(path).create("acme", DEVICE_SCOPES, None)
    assert path.read_text() == content
