"""Engines that crash or hang: everybody is answered, health says so, and the server comes back or says that it can't."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import lopa_server.supervisor
import lopa_server.warmup
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lopa.v1 import inference_pb2
from lopa_server.app import ServerConfig, start_server
from lopa_server.engine.base import Engine, EngineFailed
from lopa_server.engine.scheduler import Scheduler
from lopa_server.engine.torch_engine.config import TorchEngineConfig
from lopa_server.engine.torch_engine.layout import Piece
from lopa_server.engine.torch_engine.runner import ModelRunner

from tests.server.client import Client, failure, generate_request, pair, soft_prompt

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
LONG = generate_request(soft=soft_prompt(1), max_tokens=480)
NEXT_STEP, STEP = Scheduler.next_step, ModelRunner.step


def _health(channel: grpc.Channel) -> Iterator[int]:
    """The states that health goes through from now on."""
    return (reply.status for reply in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()))


def test_a_crashed_engine_answers_its_calls_and_comes_back(tiny_fm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_server(ServerConfig(fm=tiny_fm, threads=1)) as server, grpc.insecure_channel(server.address) as channel:
        client, health = Client(channel), _health(channel)
        tokens = client.tokens(generate_request(soft=soft_prompt(1)))
        assert next(health) == SERVING
        running = client.inference.Generate(LONG)
        next(running)
        crashes = iter([True])
        monkeypatch.setattr(Scheduler, "next_step", lambda self: 1 / 0 if next(crashes, False) else NEXT_STEP(self))
        lost = failure(lambda: list(running))
        assert (lost.code, lost.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING")
        assert lost.retry_seconds
        assert [next(health), next(health)] == [NOT_SERVING, SERVING]
        assert client.tokens(generate_request(soft=soft_prompt(1))) == tokens
        assert not server.app.engine.gave_up.is_set()


def test_a_new_engine_that_does_not_work_leaves_no_thread(tiny_fm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread would keep a whole model in memory, beside the one that serves."""
    warm_up, starts = lopa_server.warmup.warm_up, itertools.count()

    async def fail_the_second_time(engine: Engine) -> None:
        if next(starts) == 1:
            raise EngineFailed("not this one")
        await warm_up(engine)

    monkeypatch.setattr(lopa_server.warmup, "warm_up", fail_the_second_time)
    others = set(threading.enumerate())
    with start_server(ServerConfig(fm=tiny_fm, threads=1)) as server, grpc.insecure_channel(server.address) as channel:
        client, health = Client(channel), _health(channel)
        assert next(health) == SERVING
        crashes = iter([True])
        monkeypatch.setattr(Scheduler, "next_step", lambda self: 1 / 0 if next(crashes, False) else NEXT_STEP(self))
        assert failure(lambda: client.tokens(LONG)).reason == "ENGINE_RESTARTING"
        assert [next(health), next(health)] == [NOT_SERVING, SERVING]
        assert next(starts) == 3
        assert len([thread for thread in set(threading.enumerate()) - others if thread.name == "lopa-engine"]) == 1


def test_a_server_that_stops_while_its_engine_is_loaded_again_waits_for_that_last(
    tiny_fm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process lives on, and a load that it doesn't know of would meet its next one; everything else is closed before."""
    load, loading, go_on, loaded = lopa_server.warmup._torch_engine, threading.Event(), threading.Event(), threading.Event()

    def slow(settings: TorchEngineConfig) -> object:
        loading.set()
        go_on.wait(60)
        engine = load(settings)
        loaded.set()
        return engine

    ready = tmp_path / "ready"
    server = start_server(ServerConfig(fm=tiny_fm, threads=1, ready_file=ready))
    with grpc.insecure_channel(server.address) as channel:
        monkeypatch.setattr(lopa_server.warmup, "_torch_engine", slow)
        crashes = iter([True])
        monkeypatch.setattr(Scheduler, "next_step", lambda self: 1 / 0 if next(crashes, False) else NEXT_STEP(self))
        assert failure(lambda: Client(channel).tokens(LONG)).reason == "ENGINE_RESTARTING"
        assert loading.wait(60)
    with ThreadPoolExecutor() as others:
        stopped = others.submit(server.stop)
        while ready.exists():
            assert not stopped.done()
        assert not stopped.done()
        go_on.set()
        stopped.result(60)
        assert loaded.is_set()


def test_an_engine_that_cannot_come_back_is_given_up(tiny_fm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_server(ServerConfig(fm=tiny_fm, threads=1)) as server, grpc.insecure_channel(server.address) as channel:
        health, attempts, tried = _health(channel), itertools.count(), threading.Event()
        next(health)

        def crash(scheduler: Scheduler) -> None:
            if next(attempts) == lopa_server.supervisor.RESTARTS:
                tried.set()
            raise ZeroDivisionError(scheduler)

        monkeypatch.setattr(Scheduler, "next_step", crash)
        assert failure(lambda: Client(channel).tokens(LONG)).reason == "ENGINE_RESTARTING"
        assert next(health) == NOT_SERVING
        assert tried.wait(60)
        refused = failure(lambda: Client(channel).tokens(LONG))
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING")
        while not server.app.engine.gave_up.is_set():
            assert failure(lambda: Client(channel).tokens(LONG)).reason == "ENGINE_RESTARTING"


def test_a_stuck_step_answers_its_calls_and_gives_the_engine_up(tiny_fm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, release = threading.Event(), threading.Event()

    def hang(*arguments: object, **named: object) -> object:
        stuck.set()
        release.wait(60)
        return STEP(*arguments, **named)

    config = ServerConfig(fm=tiny_fm, threads=1, step_seconds=1.0)
    with start_server(config) as server, grpc.insecure_channel(server.address) as channel:
        health, client = _health(channel), Client(channel)
        next(health)
        monkeypatch.setattr(ModelRunner, "step", hang)
        try:
            with ThreadPoolExecutor() as callers:
                stream = callers.submit(failure, lambda: client.tokens(LONG))
                assert stuck.wait(60)
                scores = callers.submit(failure, lambda: client.inference.Score(inference_pb2.ScoreRequest(pairs=[pair()])))
                assert {call.result(60).reason for call in (stream, scores)} == {"ENGINE_RESTARTING"}
            assert next(health) == NOT_SERVING
            assert server.app.engine.stuck
            while not server.app.engine.gave_up.is_set():
                assert failure(lambda: client.tokens(LONG)).reason == "ENGINE_RESTARTING"
        finally:
            release.set()


def test_an_idle_engine_is_not_taken_for_a_stuck_one(tiny_fm: Path) -> None:
    looks = threading.Semaphore(0)
    with start_server(ServerConfig(fm=tiny_fm, threads=1, step_seconds=0.4)) as server:
        engine = server.app.engine._engine
        nudge = engine.nudge
        engine.nudge = lambda: (nudge(), looks.release())
        for _ in range(3 * lopa_server.supervisor.LOOKS):
            assert looks.acquire(timeout=60)
        assert not server.app.engine.stuck


def test_a_step_without_memory_fails_alone_and_makes_later_ones_smaller(tiny_fm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def scarce(runner: ModelRunner, pieces: list[Piece], *rest: object) -> object:
        sizes.append(sum(piece.count for piece in pieces))
        if sizes[-1] > 100:
            raise torch.OutOfMemoryError("no memory")
        return STEP(runner, pieces, *rest)

    long = generate_request("x" * 300, max_tokens=4)
    with start_server(ServerConfig(fm=tiny_fm, threads=1, step_positions=256)) as server, grpc.insecure_channel(server.address) as channel:
        client = Client(channel)
        expected = client.tokens(long)
        monkeypatch.setattr(ModelRunner, "step", scarce)
        other = generate_request("y" * 300, max_tokens=4)
        outcomes = [_tokens_or_code(client, other) for _ in range(3)]
        assert outcomes[:2] == [grpc.StatusCode.INTERNAL] * 2, "256 positions, then 128"
        assert isinstance(outcomes[2], list) and max(sizes[-5:]) <= 64
        assert client.tokens(long) == expected
        assert server.app.engine.stats().out_of_memory == 2


def _tokens_or_code(client: Client, request: inference_pb2.GenerateRequest) -> list[int] | grpc.StatusCode:
    try:
        return client.tokens(request)
    except grpc.RpcError as error:
        return error.code()
