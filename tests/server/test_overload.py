"""More work than the engine can do: who is served first, who is refused, and what they are told."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from lopa.v1 import catalog_pb2, catalog_pb2_grpc
from lopa_server.app import RunningServer, ServerConfig, start_server
from lopa_server.engine import admission
from lopa_server.engine.base import DeadlineTooShort, PairRequest, QueueFull
from lopa_server.engine.torch_engine.engine import TorchEngine
from lopa_server.limits import TrafficLimits
from lopa_server.ports import channel_options

from tests.server.client import Client, failure, generate_request
from tests.server.engines import collect, load, pair, run, stream


def test_a_flood_of_one_tenant_does_not_hold_up_another(tiny_fm: Path) -> None:
    """Two places, thirty requests of one tenant waiting; those of the other come last and are not served last."""

    async def scenario(engine: TorchEngine) -> list[str]:
        ended: list[str] = []

        async def ask(name: str, tenant: str) -> None:
            await collect(engine, stream(name, 1, max_tokens=8, tenant=tenant))
            ended.append(tenant)

        flood = [asyncio.create_task(ask(f"f{number}", "flood")) for number in range(30)]
        while not engine.stats().running:
            await asyncio.sleep(0)
        other = [asyncio.create_task(ask(f"o{number}", "other")) for number in range(3)]
        await asyncio.gather(*flood, *other)
        return ended

    ended = run(load(tiny_fm, max_batch=2), scenario)
    assert max(place for place, tenant in enumerate(ended) if tenant == "other") < 15


def test_an_engine_that_knows_its_pace_refuses_what_would_be_late(tiny_fm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "LEAST_MEASURED", 0.2)

    async def scenario(engine: TorchEngine) -> None:
        await asyncio.gather(*(collect(engine, stream(f"w{row}", row, max_tokens=100)) for row in range(8)))
        waiting = [asyncio.create_task(collect(engine, stream(f"r{number}", number, max_tokens=100))) for number in range(30)]
        await asyncio.sleep(0)
        with pytest.raises(DeadlineTooShort) as refused:
            await collect(engine, stream("late", 1, max_tokens=100, deadline=time.monotonic() + 0.01))
        assert refused.value.needed > 0.02
        in_time = stream("in time", 1, max_tokens=2, deadline=time.monotonic() + 600)
        assert len((await collect(engine, in_time)).tokens) == 2
        for task in waiting:
            task.cancel()

    run(load(tiny_fm, max_batch=8), scenario)


def test_pairs_that_would_be_too_many_are_refused(tiny_fm: Path) -> None:
    async def scenario(engine: TorchEngine) -> None:
        calls = [asyncio.create_task(engine.score([pair(number)] * 4)) for number in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as refused:
            await engine.score([PairRequest(pair(1).input, pair(1).target)])
        assert (refused.value.queue, refused.value.waiting, refused.value.limit) == ("pair queue", 8, 8)
        for call in calls:
            assert len(await call) == 4

    run(load(tiny_fm, max_waiting_pairs=8), scenario)


def test_a_late_deadline_is_told_on_the_wire(tiny_fm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_server(ServerConfig(fm=tiny_fm, threads=1)) as server, grpc.insecure_channel(server.address) as channel:
        client = Client(channel)
        monkeypatch.setattr(admission.Pace, "rate", 0.5)
        client.tokens(generate_request(max_tokens=4))
        refused = failure(lambda: list(client.inference.Generate(generate_request(max_tokens=400), timeout=5)))
        assert (refused.code, refused.reason, refused.field) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DEADLINE_TOO_SHORT", "deadline")
        assert float(refused.found) > float(refused.limit) and refused.retry_seconds is None
        assert list(client.inference.Generate(generate_request(max_tokens=2), timeout=60))[-1].usage.completion_tokens == 2


def test_the_queue_is_bounded_in_tokens(tiny_fm: Path) -> None:
    with start_server(ServerConfig(fm=tiny_fm, threads=1, max_batch=1, max_waiting_tokens=600)) as server, _channel(server) as channel:
        client = Client(channel)
        running = client.inference.Generate(generate_request(max_tokens=400))
        next(running)
        waiting = client.inference.Generate(generate_request(max_tokens=400))
        while not server.app.engine.stats().waiting:
            client.catalog.GetModel(catalog_pb2.GetModelRequest())
        refused = failure(lambda: client.tokens(generate_request(max_tokens=400)))
        assert (refused.reason, refused.limit) == ("QUEUE_FULL", "600") and refused.retry_seconds
        running.cancel()
        waiting.cancel()


def test_calls_that_pile_up_while_the_loop_is_busy_are_all_answered(tiny_fm: Path) -> None:
    """gRPC's own bound on calls that nobody has taken up yet is 1000, and what is beyond it gets a bare CANCELLED."""

    async def flood(address: str) -> Counter[str]:
        ends: Counter[str] = Counter()

        async def ask(stub: catalog_pb2_grpc.CatalogStub) -> None:
            try:
                await stub.GetModel(catalog_pb2.GetModelRequest(), timeout=120)
                ends["OK"] += 1
            except grpc.aio.AioRpcError as error:
                ends[error.code().name] += 1

        async with AsyncExitStack() as stack:
            own = [("grpc.use_local_subchannel_pool", 1)]
            channels = [await stack.enter_async_context(grpc.aio.insecure_channel(address, own)) for _ in range(4)]
            stubs = [catalog_pb2_grpc.CatalogStub(channel) for channel in channels]
            await asyncio.gather(*(channel.channel_ready() for channel in channels))
            await asyncio.gather(*(ask(stubs[number % 4]) for number in range(1600)))
        return ends

    with start_server(ServerConfig(fm=tiny_fm, threads=1, max_calls=2000)) as server:
        assert server._loop is not None
        server._loop.call_soon_threadsafe(time.sleep, 4.0)
        assert asyncio.run(flood(server.address)) == {"OK": 1600}


def test_calls_wait_for_a_loop_that_was_stopped_for_as_long_as_a_stream_may_live() -> None:
    """gRPC's own bound is 30 s. Longer stops are a matter of `benchmarks/trust.py --only fuzz`."""
    traffic = TrafficLimits()
    assert dict(channel_options(1, traffic))["grpc.server_max_unrequested_time_in_server"] >= traffic.stream_seconds


def _channel(server: RunningServer) -> grpc.Channel:
    return grpc.insecure_channel(server.address)
