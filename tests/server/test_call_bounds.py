"""Calls, connections and headers are bounded, whoever asks and whether or not they read."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import grpc
import pytest
from lopa.v1 import catalog_pb2, inference_pb2
from lopa_server.app import ServerConfig, start_server
from lopa_server.limits import TrafficLimits

from tests.server.client import Client, failure, generate_request, pair, take_apart

GET_MODEL = catalog_pb2.GetModelRequest()


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
