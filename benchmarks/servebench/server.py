"""Our server as everybody runs it: a `lopa serve` process, reached over gRPC."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import _family
from lopa.transport import Endpoint
from peers.process import PeerFailed, continue_group, stop_group

START_SECONDS = 180
POOL_MIB = 1024
"""Key-value pool: small enough that the loads before it have touched all of it when memory per user is measured."""


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    address: str
    metrics_port: int

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.address)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Let it run inside, and stop it afterwards."""
        continue_group(self.process)
        try:
            yield
        finally:
            stop_group(self.process)

    def resident_bytes(self) -> int:
        """Memory of server and engine that is in RAM."""
        return _family.resident_bytes(self.process.pid)

    def metrics(self) -> dict[str, float]:
        """Every sample of the metrics page, by name with labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line and not line.startswith("#")}


@contextlib.contextmanager
def running_server(fm: Path, folder: Path, max_batch: int, threads: int) -> Iterator[Server]:
    """Raises PeerFailed when it doesn't serve in time."""
    ready, log, metrics_port = folder / "address", folder / "server.log", free_port()
    command = [sys.executable, "-m", "lopa.cli", "serve", "--fm", str(fm), "--dtype", "bfloat16", "--port", "0", "--ready-file", str(ready)]
    command += ["--max-batch", str(max_batch), "--threads", str(threads), "--metrics-port", str(metrics_port)]
    command += ["--kv-memory-mib", str(POOL_MIB)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise PeerFailed(f"lopa serve did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        yield Server(process, ready.read_text().strip(), metrics_port)
    finally:
        with contextlib.suppress(ProcessLookupError):
            continue_group(process)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """One that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
