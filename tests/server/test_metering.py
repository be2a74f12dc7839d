"""Rates and quotas keep tenants to their share."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st
from lopa.v1 import catalog_pb2, inference_pb2
from lopa_server.app import ConfigError, ServerConfig, start_server
from lopa_server.identity.caller import DEVICE_SCOPES, Caller
from lopa_server.identity.config import AccessConfig
from lopa_server.identity.keys import KeyFile
from lopa_server.metering import usage
from lopa_server.metering.bucket import TokenBucket
from lopa_server.metering.limits import METRICS, Limits, TenantLimits, read_limits
from lopa_server.metering.meter import Meter, OverLimit
from lopa_server.metering.usage import UsageRecorder, UsageStore

from tests.server.client import Client, failure, pair

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
