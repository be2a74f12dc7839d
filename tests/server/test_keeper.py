"""`lopa serve --restart`: a server that dies is started again, one that was asked to end is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from lopa_server import keeper
from lopa_server.keeper import EXIT_BROKEN, keep_running

from tests.server.client import Client, generate_request

ENDS = """
import os, pathlib, signal, sys
starts = pathlib.Path(sys.argv[1])
starts.write_text(starts.read_text() + "x")
how = sys.argv[2:][min(len(starts.read_text()), len(sys.argv) - 2) - 1]
os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else sys.exit(int(how))
"""


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets a letter for every start."""
    monkeypatch.setattr(keeper, "PAUSE_SECONDS", 0.0)
    path = tmp_path / "starts"
    path.touch()
    return path


@pytest.mark.parametrize(
    ("ends", "code", "count"),
    [
        (["0"], 0, 1),
        (["1"], 1, 1),
        (["70", "killed", "0"], 0, 3),
        (["killed", "2"], 2, 2),
        (["70"], EXIT_BROKEN, keeper.RESTARTS + 1),
    ],
)
def test_only_a_crash_starts_it_again_and_not_for_ever(starts: Path, ends: list[str], code: int, count: int) -> None:
    assert keep_running([sys.executable, "-c", ENDS, str(starts), *ends]) == code
    assert len(starts.read_text()) == count


@pytest.mark.slow
@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(), reason="finds the child by /proc")
def test_a_killed_server_serves_again(tiny_fm: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "lopa.cli", "serve", "--restart", "--fm", str(tiny_fm), "--port", "0", "--threads", "1"]
    parent = subprocess.Popen([*command, "--ready-file", str(ready)], stdout=subprocess.PIPE, text=True, cwd=tmp_path)

    def tokens() -> list[int]:
        line = parent.stdout.readline()
        assert line.startswith("Serving")
        with grpc.insecure_channel(line.split()[-1]) as channel:
            return Client(channel).tokens(generate_request())

    try:
        first = tokens()
        (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        assert tokens() == first
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(60) == 0
    finally:
        parent.kill()
        parent.communicate()
    assert not ready.exists(), "it was the child's to remove"
