"""Rates and quotas keep tenants to their share; usage is counted, kept, and holds nothing that anybody wrote."""

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
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st
from lopa.cli import main
from lopa.v1 import catalog_pb2, inference_pb2
from lopa_server.app import ConfigError, ServerConfig, start_server
from lopa_server.identity.caller import DEVICE_SCOPES, Caller
from lopa_server.identity.config import AccessConfig
from lopa_server.identity.keys import KeyFile
from lopa_server.limits import TrafficLimits
from lopa_server.metering import usage
from lopa_server.metering.bucket import TokenBucket
from lopa_server.metering.limits import METRICS, Limits, TenantLimits, read_limits
from lopa_server.metering.meter import Meter, OverLimit
from lopa_server.metering.usage import Usage, UsageError, UsageRecorder, UsageStore, today

from tests.server.client import Client, failure, generate_request, pair, soft_prompt, take_apart

GET_MODEL = catalog_pb2.GetModelRequest()
ACME, OTHER = (Caller(tenant, DEVICE_SCOPES, "test") for tenant in ("acme", "other"))


class Clock:
    """A monotonic clock that stands until told otherwise."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(st.floats(0.1, 1e4), st.floats(1, 1e5), st.lists(st.tuples(st.floats(0, 50), st.floats(0, 1e5)), max_size=60))
def test_no_bucket_gives_more_than_its_rate_and_one_burst(rate: float, burst: float, events: list[tuple[float, float]]) -> None:
    clock = Clock()
    bucket, taken, largest = TokenBucket(rate, burst, clock), 0.0, 0.0
    for pause, amount in events:
        clock.now += pause
        if not bucket.wait(amount):
            bucket.take(amount)
            taken, largest = taken + amount, max(largest, amount)
        elapsed = clock.now - 100.0
        assert taken <= (rate * elapsed + burst + max(0.0, largest - burst)) * (1 + 1e-9) + 1e-6
        wait = bucket.wait(amount)
        assert wait <= (min(amount, burst) - bucket.level) / rate + 1e-6 if wait else bucket.level >= min(amount, burst)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[default]\nrequests_per_secnd = 1", "no setting requests_per_secnd"),
        ("[default]\ntokens_per_day = 0", "must be a number above 0"),
        ('[tenants.acme]\nburst_seconds = "long"', r"\[tenants.acme\] burst_seconds"),
        ("[tenant.acme]\ntokens_per_day = 1", r"unknown table \[tenant\]"),
        ("default = 3", "must be a table"),
        ("[default", "can't read"),
    ],
)
def test_a_wrong_limits_file_ends_the_start(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "limits.toml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        ServerConfig(fm="x", tenant_limits=tmp_path / "limits.toml").check()


def test_tenants_are_held_to_their_own_limits(tmp_path: Path) -> None:
    path, clock = tmp_path / "limits.toml", Clock()
    path.write_text("[default]\ntokens_per_second = 10\n[tenants.other]\nburst_seconds = 100\nconcurrent_calls = 1")
    assert read_limits(path) == Limits(
        TenantLimits(tokens_per_second=10), {"other": TenantLimits(tokens_per_second=10, burst_seconds=100, concurrent_calls=1)}
    )

    async def use() -> None:
        meter = Meter(UsageRecorder(None), path, clock)
        call = meter.enter(ACME, "Score", 10)
        call.spend(tokens=90)
        call.generated(30)
        with pytest.raises(OverLimit) as refused:
            call.spend(tokens=10)
        assert refused.value.retry_after == pytest.approx(3.0), "20 of debt and 10 asked for, at 10 a second"
        with meter.open(OTHER):
            meter.enter(OTHER, "Score", 10).spend(tokens=1000)
            with pytest.raises(OverLimit, match="concurrent_calls"), meter.open(OTHER):
                pass
        clock.now += 3.0
        call.spend(tokens=10)
        path.write_text("[default]\ntokens_per_second = 1000")
        await meter.look_again()
        meter.enter(ACME, "Score", 10).spend(tokens=10_000)

    asyncio.run(use())


@pytest.mark.parametrize("metric", METRICS)
def test_every_rate_and_every_quota_holds(metric: str, tmp_path: Path) -> None:
    """Once as a rate of 5 a second with a burst of a second, once as 5 a day: the same amount fits once, and not twice."""
    path, clock = tmp_path / "limits.toml", Clock()

    def use(meter: Meter) -> None:
        call = meter.enter(ACME, "Score", 5 if metric == "bytes" else 0)
        if metric in ("tokens", "pairs"):
            call.spend(**{metric: 5})
        for _ in range(4 if metric == "requests" else 0):
            meter.enter(ACME, "Score", 0)

    for text, name in ((f"{metric}_per_second = 5\nburst_seconds = 1", f"{metric}_per_second"), (f"{metric}_per_day = 5",) * 2):
        path.write_text(f"[default]\n{text}")
        meter = Meter(UsageRecorder(None), path, clock)
        use(meter)
        with pytest.raises(OverLimit, match=name.partition(" =")[0]) as refused:
            use(meter)
        assert refused.value.daily == ("day" in name) and refused.value.retry_after > 0


def test_open_calls_outlast_a_change_of_limits(tmp_path: Path) -> None:
    path = tmp_path / "limits.toml"
    path.write_text("[default]\nconcurrent_calls = 1")
    meter = Meter(UsageRecorder(None), path)

    async def use() -> None:
        with meter.open(ACME):
            path.write_text("[default]\nconcurrent_calls = 2")
            await meter.look_again()
            with meter.open(ACME), pytest.raises(OverLimit), meter.open(ACME):
                pass
        assert meter.open_calls(ACME) == 0

    asyncio.run(use())


def test_a_refusal_names_the_quota_and_the_time_to_come_back(tiny_fm: Path, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    acme, other = ((("authorization", f"Bearer {keys.create(name, DEVICE_SCOPES, None)[1]}"),) for name in ("acme", "other"))
    (tmp_path / "limits.toml").write_text("[tenants.acme]\nrequests_per_second = 0.01\nburst_seconds = 200\npairs_per_day = 3")
    config = ServerConfig(fm=tiny_fm, threads=1, access=AccessConfig(keys=tmp_path / "keys.json"), tenant_limits=tmp_path / "limits.toml")
    with start_server(config) as server, grpc.insecure_channel(server.address) as channel:
        client, pairs = Client(channel), inference_pb2.ScoreRequest(pairs=[pair(), pair()])
        client.inference.Score(pairs, metadata=acme)
        with pytest.raises(grpc.RpcError) as refused:
            client.inference.Score(pairs, metadata=acme)
        quota, info = error_details_pb2.QuotaFailure(), error_details_pb2.ErrorInfo()
        for detail in rpc_status.from_call(refused.value).details:
            detail.Unpack(quota)
            detail.Unpack(info)
        assert (quota.violations[0].subject, quota.violations[0].quota_id) == ("tenant:acme", "pairs_per_day")
        assert (info.reason, info.metadata["limit"], info.metadata["found"]) == ("QUOTA_EXCEEDED", "3", "2")
        told = failure(lambda: client.catalog.GetModel(GET_MODEL, metadata=acme))
        assert (told.code, told.reason, told.field) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_EXCEEDED", "requests_per_second")
        assert 90 < told.retry_seconds <= 100
        for _ in range(5):
            client.inference.Score(pairs, metadata=other)


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


def test_a_call_ends_at_the_servers_bound(tiny_fm: Path) -> None:
    config = ServerConfig(fm=tiny_fm, threads=1, traffic=TrafficLimits(stream_seconds=0.05))
    with start_server(config) as server, grpc.insecure_channel(server.address) as channel:
        told = failure(lambda: Client(channel).generate(generate_request(max_tokens=490)))
        assert (told.code, told.reason, told.field) == (grpc.StatusCode.DEADLINE_EXCEEDED, "TIME_LIMIT", "Generate")


def test_a_client_that_does_not_read_holds_nothing_for_long(tiny_fm: Path) -> None:
    """Logprobs make the stream far longer than what gRPC takes in unread."""
    config = ServerConfig(fm=tiny_fm, threads=1, traffic=TrafficLimits(stream_seconds=2.0))
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 14)]
    with start_server(config) as server, grpc.insecure_channel(server.address, options) as channel:
        calls = [Client(channel).inference.Generate(generate_request(max_tokens=490, logprobs=20)) for _ in range(3)]
        for call in calls:
            next(call)
        began = time.monotonic()
        while server.app.engine.stats().running or time.monotonic() < began + 2.5:
            Client(channel).inference.Score(inference_pb2.ScoreRequest(pairs=[pair()]))
        for call in calls:
            with pytest.raises(grpc.RpcError) as ended:
                list(call)
            assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_client_that_stops_reading_loses_its_place_and_what_was_kept_for_it(tiny_fm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lopa_server.service.status.TELL_SECONDS", 0.5)
    config = ServerConfig(fm=tiny_fm, threads=1, traffic=TrafficLimits(stall_seconds=0.5))
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 14), ("grpc.use_local_subchannel_pool", 1)]
    with (
        start_server(config) as server,
        grpc.insecure_channel(server.address, options) as slow,
        grpc.insecure_channel(server.address) as channel,
    ):
        calls = [Client(slow).inference.Generate(generate_request(max_tokens=490, logprobs=20)) for _ in range(3)]
        for call in calls:
            next(call)
        end = time.monotonic() + 120
        while (server.app._gate._taken or server.app.engine.stats().running) and time.monotonic() < end:
            Client(channel).catalog.GetModel(GET_MODEL)
        assert server.app._gate._taken == 0, "although its status can't be sent"
        for call in calls:
            with pytest.raises(grpc.RpcError) as ended:
                list(call)
            told = take_apart(ended.value)
            assert (told.reason, told.field) == ("TIME_LIMIT", "reading")


def test_a_jump_of_the_wall_clock_changes_no_rate_and_moves_counting_to_another_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "limits.toml"
    path.write_text("[default]\ntokens_per_second = 1\nburst_seconds = 10\npairs_per_day = 3")
    day = [""]
    monkeypatch.setattr(usage, "today", lambda: day[0])
    monkeypatch.setattr(time, "time", lambda: {"2026-05-01": 1.0, "2026-05-09": 1e9, "2026-04-30": -1e9}.get(day[0], 0.0))
    recorder = UsageRecorder(UsageStore(tmp_path / "usage.sqlite"))
    meter = Meter(recorder, path, Clock())

    async def use() -> None:
        for turn, day[0] in enumerate(("2026-05-01", "2026-05-09", "2026-04-30")):
            call = meter.enter(ACME, "Score", 0)
            call.spend(pairs=3)
            with pytest.raises(OverLimit, match="pairs_per_day"):
                call.spend(pairs=1)
            if turn == 0:
                call.spend(tokens=10)
            with pytest.raises(OverLimit, match="tokens_per_second") as refused:
                call.spend(tokens=5)
            assert refused.value.retry_after == pytest.approx(5.0), "the bucket neither filled nor froze"
            await recorder.flush()
        await recorder.close()

    asyncio.run(use())
    stored = UsageStore(tmp_path / "usage.sqlite").read(tenant="acme")
    assert {key[0]: counted.pairs for key, counted in stored.items()} == {"2026-05-01": 3, "2026-05-09": 3, "2026-04-30": 3}


def test_connections_are_bounded(tiny_fm: Path) -> None:
    config, own = ServerConfig(fm=tiny_fm, threads=1, traffic=TrafficLimits(connections=2)), [("grpc.use_local_subchannel_pool", 1)]
    with start_server(config) as server, contextlib.ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(server.address, own)) for _ in range(3)]
        for channel in channels[:2]:
            assert Client(channel).catalog.GetModel(GET_MODEL).hidden_size == 32
        with pytest.raises(grpc.RpcError) as refused:
            Client(channels[2]).catalog.GetModel(GET_MODEL, timeout=20)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        channels[0].close()
        assert Client(channels[2]).catalog.GetModel(GET_MODEL, wait_for_ready=True, timeout=120).hidden_size == 32


def test_headers_are_bounded(tiny_fm: Path) -> None:
    with start_server(ServerConfig(fm=tiny_fm, threads=1)) as server, grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            Client(channel).catalog.GetModel(GET_MODEL, metadata=(("x-long", "x" * 40_000),))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert Client(channel).catalog.GetModel(GET_MODEL).hidden_size == 32
