"""The engine in a process of its own: the same answers, and nothing of the server is lost with it."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import grpc
import msgspec
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lopa.v1 import inference_pb2, tuning_pb2
from lopa_server.app import ConfigError, RunningServer, ServerConfig, start_server
from lopa_server.engine import base
from lopa_server.engine.base import EngineError, EngineFailed, EngineStopped, QueueFull, UnsupportedModel, UnsupportedSchema
from lopa_server.engine.mailbox import Mailbox
from lopa_server.engine.pair_queue import PairKind
from lopa_server.engine.process import wire
from lopa_server.engine.process.engine import Link, ProcessEngine
from lopa_server.engine.process.failures import error_of, failed
from lopa_server.engine.torch_engine.config import TorchEngineConfig
from lopa_server.logs import ContentFreeFormatter

from tests.server import engines
from tests.server.client import Client, failure, generate_request, pair, soft_prompt

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
LONG = generate_request(soft=soft_prompt(1), max_tokens=480)
SCHEMA = '{"type": "object", "properties": {"size": {"type": "integer"}}, "required": ["size"], "additionalProperties": false}'
MARKER = "hippopotamus"
T = TypeVar("T")


@pytest.fixture(scope="module")
def apart(tiny_fm: Path) -> Iterator[RunningServer]:
    """A server whose engine has a process of its own."""
    with start_server(ServerConfig(fm=tiny_fm, threads=1, engine_process=True)) as running:
        yield running


@pytest.fixture
def far(apart: RunningServer) -> Iterator[Client]:
    with grpc.insecure_channel(apart.address) as channel:
        yield Client(channel)


def _pid(server: RunningServer) -> int:
    return server.app.engine.stats().pid


def _health(channel: grpc.Channel) -> Iterator[int]:
    """The states that health goes through from now on."""
    return (reply.status for reply in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()))


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.3, "top_p": 0.9, "seed": 7, "logprobs": 3},
        {"stop": ["a", "e"], "repetition_penalty": 1.3, "logit_bias": {5: 3.0}},
        {"json_schema": SCHEMA, "ignore_end": False, "max_tokens": 60},
    ],
)
def test_streams_are_the_same(client: Client, far: Client, sampling: dict[str, object]) -> None:
    request = generate_request("def area(", soft=soft_prompt(3), **sampling)
    assert _whole(far.generate(request)) == _whole(client.generate(request))


def _whole(deltas: list[inference_pb2.GenerateResponse]) -> tuple[object, ...]:
    """A stream, however it was cut into messages."""
    last = deltas[-1]
    logprobs = [(entry.chosen.token_id, entry.chosen.logprob, len(entry.alternatives)) for delta in deltas for entry in delta.logprobs]
    ids = [token for delta in deltas for token in delta.token_ids]
    return "".join(delta.text for delta in deltas), ids, logprobs, last.finish_reason, last.usage.SerializeToString()


def test_scores_and_gradients_are_the_same(client: Client, far: Client) -> None:
    pairs = [pair(seed) for seed in range(5)]
    scores = inference_pb2.ScoreRequest(pairs=pairs)
    assert [score.nll_sum for score in far.inference.Score(scores).scores] == [
        score.nll_sum for score in client.inference.Score(scores).scores
    ]
    gradients = tuning_pb2.PromptGradientsRequest(pairs=pairs)
    ours, theirs = (one.tuning.PromptGradients(gradients).gradients for one in (client, far))
    assert [entry.gradient.data for entry in theirs] == [entry.gradient.data for entry in ours]


def test_a_schema_that_cannot_be_followed_is_refused(far: Client) -> None:
    pattern = '{"type": "string", "pattern": "(a|b)*(c|d)*(((((e?)?)?)?)?)?(?!x)"}'
    refused = failure(lambda: far.generate(generate_request(json_schema=pattern)))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT and refused.field


def test_a_client_that_leaves_frees_its_row(apart: RunningServer, far: Client) -> None:
    call = far.inference.Generate(LONG)
    next(call)
    assert apart.app.engine.stats().running == 1
    call.cancel()
    for _ in range(200):
        far.inference.Score(inference_pb2.ScoreRequest(pairs=[pair()]))
        if apart.app.engine.stats().blocks_used == 0:
            return
    raise AssertionError("the row was never freed")


def test_a_killed_engine_answers_its_calls_and_comes_back(apart: RunningServer) -> None:
    with grpc.insecure_channel(apart.address) as channel:
        client, health = Client(channel), _health(channel)
        tokens = client.tokens(generate_request(soft=soft_prompt(1)))
        assert next(health) == SERVING
        running, before = client.inference.Generate(LONG), _pid(apart)
        next(running)
        os.kill(before, signal.SIGKILL)
        lost = failure(lambda: list(running))
        assert (lost.code, lost.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING")
        assert lost.retry_seconds
        assert [next(health), next(health)] == [NOT_SERVING, SERVING]
        assert client.tokens(generate_request(soft=soft_prompt(1))) == tokens
        assert _pid(apart) != before
        assert not apart.app.engine.gave_up.is_set()


def test_a_stuck_engine_is_ended_and_comes_back(tiny_fm: Path) -> None:
    config = ServerConfig(fm=tiny_fm, threads=1, step_seconds=5.0, engine_process=True)
    with start_server(config) as server, grpc.insecure_channel(server.address) as channel:
        client, health, stuck = Client(channel), _health(channel), _pid(server)
        assert next(health) == SERVING
        running = client.inference.Generate(LONG)
        next(running)
        os.kill(stuck, signal.SIGSTOP)
        assert failure(lambda: list(running)).reason == "ENGINE_RESTARTING"
        assert [next(health), next(health)] == [NOT_SERVING, SERVING]
        assert len(client.tokens(LONG)) == 480
        assert not server.app.engine.gave_up.is_set()
    assert not _alive(stuck)


def _alive(pid: int) -> bool:
    """It runs: neither gone nor a zombie that its parent has not asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_engine_ends_with_its_server(tiny_fm: Path, tmp_path: Path) -> None:
    """However that ends."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "lopa.cli", "serve", "--fm", str(tiny_fm), "--port", "0", "--threads", "1", "--metrics-port", "0"]
    with log.open("wb") as written:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=written, text=True)
    try:
        assert "Serving" in server.stdout.readline(), log.read_text()
        (engine,) = (int(pid) for tasks in Path(f"/proc/{server.pid}/task").glob("*/children") for pid in tasks.read_text().split())
        ended = os.pidfd_open(engine)
        server.kill()
        server.wait()
        assert select.select([ended], [], [], 60)[0], "it still runs"
    finally:
        server.kill()
        server.communicate()


def test_signals_for_the_server_leave_the_engine_to_it(apart: RunningServer, far: Client) -> None:
    """A terminal's Ctrl-C reaches both, and so does a service manager's SIGTERM."""
    before = _pid(apart)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(before, number)
        assert far.tokens(generate_request())
    assert _pid(apart) == before


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"fm": "no/such-model-here"}, FileNotFoundError, "no/such-model-here"),
        ({"device": "cuda:77"}, ConfigError, "cuda:77"),
        ({"device": "meta"}, UnsupportedModel, "meta"),
    ],
)
def test_what_cannot_be_loaded_is_said_as_in_one_process(
    tiny_fm: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str], kind: type[Exception], words: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(kind, match=words):
        start_server(ServerConfig(**{"fm": tiny_fm, "engine_process": True, **fields}))


def test_a_process_that_dies_while_it_loads_is_reported(tiny_fm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with pytest.raises(ChildProcessError, match="exit code 1"):
        start_server(ServerConfig(fm=tiny_fm, engine_process=True))


def test_a_broken_model_is_reported_in_its_own_words(tiny_fm: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_fm, broken)
    (broken / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ChildProcessError, match="can't be loaded: SafetensorError"):
        start_server(ServerConfig(fm=broken, engine_process=True))


def _run(fm: Path, scenario: Callable[[ProcessEngine], Awaitable[T]]) -> T:
    async def main() -> T:
        engine = await ProcessEngine.load(TorchEngineConfig(str(fm), threads=1))
        try:
            return await scenario(engine)
        finally:
            await engine.stop()

    return asyncio.run(main())


def test_whoever_waits_when_it_stops_is_told(tiny_fm: Path) -> None:
    async def scenario(engine: ProcessEngine) -> None:
        reading = asyncio.create_task(engines.collect(engine, engines.stream("long", 1, max_tokens=400)))
        scoring = asyncio.create_task(engine.score([engines.pair(1)]))
        while not engine.stats().generated_tokens:
            await asyncio.sleep(0)
        await scoring
        await engine.stop()
        with pytest.raises(EngineStopped):
            await reading
        with pytest.raises(EngineStopped):
            await engine.score([engines.pair(1)])

    _run(tiny_fm, scenario)


def test_mixed_work_is_as_it_is_alone(tiny_fm: Path) -> None:
    async def scenario(engine: ProcessEngine) -> None:
        requests = [engines.stream(f"r{n}", n, temperature=0.8, seed=n) for n in range(12)]
        alone = [await engines.collect(engine, request) for request in requests]
        together, results = await asyncio.gather(
            asyncio.gather(*(engines.collect(engine, request) for request in requests)),
            engine.prompt_gradients([engines.pair(n) for n in range(6)]),
        )
        assert [output.tokens for output in together] == [output.tokens for output in alone]
        assert all(np.isfinite(result.gradient).all() and result.gradient.flags.writeable for result in results)
        assert engine.stats().blocks_used == 0

    _run(tiny_fm, scenario)


def test_an_engine_that_does_not_read_is_not_written_to_without_end(tiny_fm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever cancels gives up its place, and what it sent still waits for the engine."""
    monkeypatch.setattr("lopa_server.engine.process.engine.MOST_UNSENT", 1 << 20)
    large = [dataclasses.replace(engines.pair(1, rows=400), target=engines.token_ids(2, 20))]

    async def scenario(engine: ProcessEngine) -> None:
        os.kill(engine.stats().pid, signal.SIGSTOP)
        with pytest.raises(QueueFull):
            for _ in range(1000):
                call = asyncio.create_task(engine.score(large))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                if call.done():
                    await call
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)

    _run(tiny_fm, scenario)


def test_what_is_aborted_before_the_engine_has_time_for_it_is_not_kept(tiny_fm: Path) -> None:
    intake = engines.load(tiny_fm).intake
    pairs = [engines.pair(1)]
    kept = weakref.ref(pairs[0].input.soft)
    intake.pairs("call", PairKind.SCORE, pairs, Mailbox())
    del pairs
    assert kept() is not None
    intake.abort("call")
    assert kept() is None


def test_only_the_engine_thread_shows_that_it_is_alive() -> None:
    """A report for a schema that is refused beside it is none of its doing."""

    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        reader, stream = await asyncio.open_unix_connection(sock=ours)
        link, engine = Link(reader, wire.MessageWriter(stream), 1), wire.MessageWriter((await asyncio.open_unix_connection(sock=theirs))[1])
        reading, mailbox, seen = asyncio.create_task(link.read()), Mailbox(), link.stats()
        link.stream(engines.stream("x", 1), mailbox)
        engine.write(wire.Report([failed("x", UnsupportedSchema("no"))], None))
        with pytest.raises(UnsupportedSchema):
            await mailbox.delta()
        assert link.stats() is seen
        engine.write(wire.Report([], base.EngineStats(steps=1)))
        while link.stats() is seen:
            await asyncio.sleep(0)
        assert link.stats().steps == 1
        engine.close()
        await reading

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "error",
    [UnsupportedSchema("too deep"), QueueFull("schema queue", 16, 16, 1.0), EngineStopped("over"), EngineFailed("a step failed")],
)
def test_errors_arrive_as_they_were(error: EngineError) -> None:
    there = _through(failed("x", error), wire.Failed)
    back = error_of(there)
    assert (type(back), str(back), vars(back).keys() - {"trace"}) == (type(error), str(error), vars(error).keys())


def test_the_log_has_the_engines_trace_without_its_message() -> None:
    try:
        raise ValueError(MARKER)
    except ValueError as error:
        message = failed("x", error)
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(ContentFreeFormatter())
    try:
        raise error_of(_through(message, wire.Failed))
    except EngineFailed as error:
        handler.emit(logging.LogRecord("x", logging.ERROR, "", 0, "failed", (), (type(error), error, error.__traceback__)))
    assert "test_the_log_has_the_engines_trace" in written.getvalue() and "builtins.ValueError" in written.getvalue()
    assert MARKER not in written.getvalue()


def _through(message: object, kind: object) -> object:
    """What arrives of a message."""
    encoded = msgspec.msgpack.encode(message, enc_hook=wire.to_plain)
    return msgspec.msgpack.decode(encoded, type=kind, dec_hook=wire.from_plain)


FLOATS = st.floats(allow_nan=False)
IDS = st.lists(st.integers(0, 1 << 20), max_size=5).map(tuple)
ROWS = arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 4)), elements=st.floats(width=32, allow_nan=False))
INPUTS = st.builds(base.InputSequence, IDS, st.none() | ROWS, IDS)
SAMPLING = st.builds(
    base.SamplingParams,
    max_tokens=st.integers(1, 1 << 20),
    temperature=FLOATS,
    seed=st.integers(0, (1 << 64) - 1),
    stop=st.lists(st.text(), max_size=3).map(tuple),
    logit_bias=st.lists(st.tuples(st.integers(0, 1 << 20), FLOATS), max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
    json_schema=st.none() | st.text(),
)
LOGPROBS = st.builds(base.TokenLogprobs, st.builds(base.Logprob, st.integers(0, 1 << 20), FLOATS))
DELTAS = st.builds(base.Delta, st.text(), IDS, st.lists(LOGPROBS, max_size=2).map(tuple), st.none() | st.sampled_from(list(base.Finish)))
REQUESTS = st.builds(
    base.GenerateRequest, st.text(), INPUTS, SAMPLING, tenant=st.text(), deadline=st.none() | FLOATS, cache_salt=st.binary()
)
COMMANDS = (
    st.builds(wire.StreamCommand, REQUESTS)
    | st.builds(wire.PairsCommand, st.text(), st.sampled_from(PairKind), st.lists(st.builds(base.PairRequest, INPUTS, IDS), max_size=3))
    | st.builds(wire.AbortCommand, st.text())
)
RESULTS = st.builds(base.PairResult, FLOATS, st.integers(0, 1 << 20), st.none() | ROWS)
EVENTS = st.builds(wire.Said, st.text(), DELTAS) | st.builds(wire.Measured, st.text(), st.lists(RESULTS, max_size=3))
REPORTS = st.builds(wire.Report, st.lists(EVENTS, max_size=4), st.builds(base.EngineStats, running=st.integers(0, 99)))


@given(COMMANDS)
def test_commands_arrive_as_they_were(command: wire.Command) -> None:
    assert repr(_through(command, wire.Command)) == repr(command)


@given(REPORTS)
def test_reports_arrive_as_they_were(report: wire.Report) -> None:
    assert repr(_through(report, wire.Report)) == repr(report)
