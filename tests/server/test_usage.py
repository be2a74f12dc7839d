"""Usage is counted, kept whatever the database does, and holds nothing that anybody wrote."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import os
import pwd
import shutil
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from lopa.cli import main
from lopa.v1 import inference_pb2
from lopa_server.app import ConfigError, ServerConfig, start_server
from lopa_server.identity.caller import DEVICE_SCOPES, Caller
from lopa_server.metering import usage
from lopa_server.metering.meter import Meter, OverLimit
from lopa_server.metering.usage import Usage, UsageError, UsageRecorder, UsageStore, today

from tests.server.client import Client, generate_request, pair, soft_prompt

ACME = Caller("acme", DEVICE_SCOPES, "test")


def test_usage_is_counted_and_outlives_the_server(tiny_fm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, marker = tmp_path / "usage.sqlite", "zebra crossing"
    config = ServerConfig(fm=tiny_fm, threads=1, usage=place)
    request = generate_request(marker, soft=soft_prompt(1))
    for _ in range(2):
        with start_server(config) as server, grpc.insecure_channel(server.address) as channel:
            *_, last = Client(channel).generate(request)
            Client(channel).inference.Score(inference_pb2.ScoreRequest(pairs=[pair(), pair()]))
    usage = UsageStore(place).read(tenant="anonymous")
    generated = usage[(today(), "anonymous", "Generate")]
    read = last.usage.prompt_tokens + last.usage.virtual_tokens
    assert (generated.requests, generated.prompt_tokens, generated.generated_tokens) == (2, 2 * read, 24)
    assert generated.received_bytes == 2 * request.ByteSize()
    assert usage[(today(), "anonymous", "Score")].pairs == 4
    stored = place.read_bytes()
    assert marker.encode() not in stored and marker.split()[0].encode() not in stored
    with pytest.raises(SystemExit):
        main(["usage", str(place), "--from", today()])
    printed = capsys.readouterr().out
    assert f"{'Generate':8}" in printed and str(2 * read) in printed


def test_a_database_that_fails_loses_nothing(tmp_path: Path) -> None:
    store = UsageStore(tmp_path / "usage.sqlite")

    async def use() -> None:
        recorder = UsageRecorder(store)
        await recorder.start()
        recorder.add("acme", "Score", Usage(requests=1, pairs=3))
        with contextlib.closing(sqlite3.connect(tmp_path / "usage.sqlite")) as database:
            database.execute("alter table lopa_usage rename to hidden")
            await recorder.flush()
            recorder.add("acme", "Score", Usage(requests=1, pairs=4))
            assert recorder.used_today("acme") == Usage(requests=2, pairs=7)
            database.execute("alter table hidden rename to lopa_usage")
        await recorder.close()

    asyncio.run(use())
    assert UsageStore(tmp_path / "usage.sqlite").read() == {(today(), "acme", "Score"): Usage(requests=2, pairs=7)}


class _Silent:
    """A database that accepts, and answers when it is let go at the earliest."""

    name = "silent"

    def __init__(self) -> None:
        self.asked, self.go = threading.Event(), threading.Event()

    def add(self, _: object) -> None:
        self.asked.set()
        self.go.wait()


def test_a_database_that_does_not_answer_neither_keeps_the_server_nor_its_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lopa_server.metering.usage.CLOSE_SECONDS", 0.1)
    monkeypatch.setattr("lopa_server.metering.meter.FLUSH_SECONDS", 0.01)
    path, store = tmp_path / "limits.toml", _Silent()
    path.write_text("[default]\nconcurrent_calls = 1")

    async def use() -> None:
        recorder = UsageRecorder(None)
        meter = Meter(recorder, path)
        await meter.start()
        recorder._store = store
        meter.enter(ACME, "Score", 10)
        while not store.asked.is_set():
            await asyncio.sleep(0.01)
        meter.enter(ACME, "Score", 20)
        path.write_text("[default]\nconcurrent_calls = 2")
        with meter.open(ACME):
            while True:
                with contextlib.suppress(OverLimit), meter.open(ACME):
                    break
                await asyncio.sleep(0.01)
        await meter.close()

    try:
        asyncio.run(use())
    finally:
        store.go.set()
    (told,) = [record.getMessage() for record in caplog.records if "usage that is not in silent" in record.getMessage()]
    assert json.loads(told.partition(": ")[2])[0] == {
        "day": today(),
        "tenant": "acme",
        "kind": "Score",
        "requests": 2,
        "prompt_tokens": 0,
        "generated_tokens": 0,
        "pairs": 0,
        "received_bytes": 30,
        "sent_bytes": 0,
    }


def test_a_postgresql_server_that_accepts_and_says_nothing_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(usage.IMPATIENT, "connect_timeout", "2")
    word = "hush"
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UsageError, match="timeout") as told:
            UsageStore(f"postgresql://lopa:{word}@127.0.0.1:{silent.getsockname()[1]}/lopa")
        assert word not in str(told.value)


def test_a_place_that_cannot_hold_usage_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't keep usage"):
        start_server(ServerConfig(fm="x", usage=tmp_path / "missing" / "usage.sqlite"))
    with pytest.raises(UsageError) as told:
        UsageStore("postgresql://me:secret@127.0.0.1:1/nowhere")
    assert "secret" not in str(told.value)


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL server of this test's own; its URL."""
    programs = [
        shutil.which(name) or next(iter(sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None) for name in ("initdb", "postgres")
    ]
    if None in programs:
        pytest.skip("no PostgreSQL server on this machine")
    user = getpass.getuser()
    account = pwd.getpwnam("nobody" if user == "root" else user)
    os.chown(folder, account.pw_uid, account.pw_gid)
    drop = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if user == "root" else {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    subprocess.run(
        [programs[0], "-D", folder / "data", "-U", "lopa", "-A", "trust", "--no-sync"], check=True, capture_output=True, cwd="/", **drop
    )
    command = [programs[1], "-D", folder / "data", "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-k", folder]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd="/", **drop)
    try:
        for line in process.stderr:
            if "ready to accept connections" in line:
                break
        yield f"postgresql://lopa@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        process.communicate()


def test_usage_in_postgresql() -> None:
    with contextlib.ExitStack() as stack:
        folder = Path("/tmp") / f"lopa-postgres-{os.getpid()}"
        folder.mkdir()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        url = stack.enter_context(postgres(folder))
        one, two = UsageStore(url), UsageStore(url)
        for store in (one, two):
            store.add({(today(), "acme", "Score"): Usage(requests=1, pairs=2), (today(), "other", "Score"): Usage(requests=5)})
        assert one.read(tenant="acme") == {(today(), "acme", "Score"): Usage(requests=2, pairs=4)}
        one.close()
        two.close()
