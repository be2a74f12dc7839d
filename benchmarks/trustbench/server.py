"""A `lopa serve` process of lopa-nano, as everybody runs it, with two tenants."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import _family
import grpc
from lopa.v1 import catalog_pb2, catalog_pb2_grpc
from lopa_server.identity.caller import DEVICE_SCOPES
from lopa_server.identity.keys import KeyFile

Metadata = tuple[tuple[str, str], ...]
START_SECONDS = 300


class NotServing(RuntimeError):
    """The server didn't start, or has ended."""


@dataclass
class Server:
    """A running server and its tenants' credentials."""

    process: subprocess.Popen[bytes]
    address: str
    metrics_port: int
    keys: dict[str, str]

    def as_tenant(self, tenant: str) -> Metadata:
        return (("authorization", f"Bearer {self.keys[tenant]}"),)

    def channel(self, *, private: bool = False) -> grpc.Channel:
        """private: a connection of its own."""
        return grpc.insecure_channel(self.address, [("grpc.use_local_subchannel_pool", int(private))])

    def send(self, number: signal.Signals) -> None:
        """To the server and its engine."""
        for pid in _family.members(self.process.pid):
            os.kill(pid, number)

    def resident_bytes(self) -> int:
        return _family.resident_bytes(self.process.pid)

    def cpu_seconds(self) -> float:
        """That all its threads and its engine's have used so far."""
        return _family.cpu_seconds(self.process.pid)

    def metric(self, name: str) -> float:
        """One sample without labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.split()[0] == name)

    def model(self) -> catalog_pb2.ModelInfo:
        with self.channel() as channel:
            info: catalog_pb2.ModelInfo = catalog_pb2_grpc.CatalogStub(channel).GetModel(
                catalog_pb2.GetModelRequest(), metadata=self.as_tenant("acme"), timeout=30
            )
            return info

    def wait_idle(self, seconds: float = 60.0) -> bool:
        """Until nothing runs or waits; whether that came true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not any(self.metric(name) for name in ("lopa_streams_running", "lopa_streams_waiting", "lopa_pairs_waiting")):
                return True
            time.sleep(0.1)
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment() -> dict[str, str]:
    """Of processes that import what this one can, wherever they are started."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def launch(folder: Path, port: int, options: Sequence[str] = ()) -> tuple[subprocess.Popen[bytes], Path]:
    """Start the command; the file appears with its address once it serves."""
    ready = folder / "address"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "lopa.cli", "serve", "--port", str(port), "--ready-file", str(ready), "--log-level", "warning"]
    with (folder / "server.log").open("ab") as log:
        return subprocess.Popen([*command, *options], stdout=log, stderr=log, cwd=folder, env=environment()), ready


def wait_ready(process: subprocess.Popen[bytes], ready: Path) -> str:
    """Its address. Raises NotServing."""
    end = time.monotonic() + START_SECONDS
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > end:
            raise NotServing(f"the server ended with {process.poll()}: see {ready.parent / 'server.log'}")
        time.sleep(0.05)
    return ready.read_text()


@contextlib.contextmanager
def beside(action: Callable[[], None], over: threading.Event) -> Iterator[None]:
    """Inside, `action` runs in a thread of its own; leaving sets `over`, which ends it, and waits for that."""
    thread = threading.Thread(target=action)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def running(folder: Path, *options: str) -> Iterator[Server]:
    """With API keys for the tenants acme and other."""
    folder.mkdir(parents=True, exist_ok=True)
    file, metrics_port = KeyFile(folder / "keys.json"), free_port()
    keys = {tenant: file.create(tenant, DEVICE_SCOPES, None)[1] for tenant in ("acme", "other")}
    process, ready = launch(folder, 0, ["--keys", str(folder / "keys.json"), "--metrics-port", str(metrics_port), *options])
    try:
        yield Server(process, wait_ready(process, ready), metrics_port, keys)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
