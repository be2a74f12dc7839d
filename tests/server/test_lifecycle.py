"""Starting, cancelling, draining, ending."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import lopa_server.warmup
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lopa.fingerprint import fingerprint_folder
from lopa.v1 import catalog_pb2, inference_pb2
from lopa_server.app import ConfigError, RunningServer, ServerConfig, start_server
from lopa_server.engine.base import Engine, UnsupportedModel
from lopa_server.limits import ServiceLimits
from lopa_server.service.servicers import write

from tests.server.bundles import write_bundle
from tests.server.client import Client, failure, generate_request, pair, soft_prompt, take_apart
from tests.tiny import build_tiny_fm

LONG = generate_request(soft=soft_prompt(1), max_tokens=480)
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def _until_free(server: RunningServer, client: Client) -> None:
    """A call that takes the engine through a step, until the batch is empty: no clock, but an end."""
    for _ in range(200):
        client.inference.Score(inference_pb2.ScoreRequest(pairs=[pair()]))
        if server.app.engine.stats().blocks_used == 0:
            return
    raise AssertionError("the row was never freed")


def test_a_client_that_leaves_frees_its_row(server: RunningServer, client: Client) -> None:
    made = server.app.engine.stats().generated_tokens
    call = client.inference.Generate(LONG)
    next(call)
    assert server.app.engine.stats().running == 1
    call.cancel()
    _until_free(server, client)
    assert server.app.engine.stats().generated_tokens - made < 480


def test_a_lost_connection_frees_its_rows(server: RunningServer, client: Client) -> None:
    made = server.app.engine.stats().generated_tokens
    with grpc.insecure_channel(server.address) as channel:
        calls = [Client(channel).inference.Generate(LONG) for _ in range(3)]
        for call in calls:
            next(call)
        assert server.app.engine.stats().running == 3
    _until_free(server, client)
    assert server.app.engine.stats().generated_tokens - made < 3 * 480


def test_a_deadline_frees_its_row(tiny_fm: Path) -> None:
    """On a server of its own, which has not measured its pace yet: with one it would refuse at once."""
    with start_server(ServerConfig(fm=tiny_fm, threads=1)) as server, grpc.insecure_channel(server.address) as channel:
        client = Client(channel)
        with pytest.raises(grpc.RpcError) as missed:
            list(client.inference.Generate(LONG, timeout=0.05))
        assert missed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        _until_free(server, client)


def _drain(server: RunningServer, seconds: float, channel: grpc.Channel) -> threading.Thread:
    """Start draining and wait until health says so."""
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    next(watch)
    thread = threading.Thread(target=server.stop, args=(seconds,))
    thread.start()
    assert next(watch).status == NOT_SERVING
    watch.cancel()
    return thread


def test_draining_lets_running_streams_finish_and_refuses_new_calls(tiny_fm: Path) -> None:
    server = start_server(ServerConfig(fm=tiny_fm, threads=1))
    with grpc.insecure_channel(server.address) as channel:
        client = Client(channel)
        calls = [client.inference.Generate(LONG) for _ in range(8)]
        tokens = [list(next(call).token_ids) for call in calls]
        draining = _drain(server, 60, channel)
        refused = failure(lambda: client.tokens(LONG))
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert refused.retry_seconds
        for call, seen in zip(calls, tokens, strict=True):
            seen += [token for delta in call for token in delta.token_ids]
        assert [len(seen) for seen in tokens] == [480] * 8
        draining.join(60)
        assert not draining.is_alive()


def test_the_drain_bound_ends_what_still_runs(tiny_fm: Path) -> None:
    server = start_server(ServerConfig(fm=tiny_fm, threads=1))
    with grpc.insecure_channel(server.address) as channel:
        calls = [Client(channel).inference.Generate(LONG) for _ in range(8)]
        for call in calls:
            next(call)
        _drain(server, 0, channel).join(60)
        with pytest.raises(grpc.RpcError) as ended:
            list(calls[0])
        assert take_apart(ended.value).reason == "DRAINING"
    server.stop()


def test_sigterm_ends_the_command_after_its_streams(tiny_fm: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "lopa.cli", "serve", "--fm", str(tiny_fm), "--port", "0", "--threads", "1"]
    process = subprocess.Popen([*command, "--ready-file", str(ready)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("Serving llama on 127.0.0.1:"), line + process.stderr.read()
        address = ready.read_text()
        assert address == line.split()[-1]
        with grpc.insecure_channel(address) as channel:
            call = Client(channel).inference.Generate(LONG)
            tokens = list(next(call).token_ids)
            process.send_signal(signal.SIGTERM)
            tokens += [token for delta in call for token in delta.token_ids]
        assert len(tokens) == 480
        assert process.wait(60) == 0
        assert not ready.exists()
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_calls_are_refused_until_the_warm_up_is_done(tiny_fm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    warm_up = lopa_server.warmup.warm_up

    def look(server: RunningServer) -> None:
        with grpc.insecure_channel(server.address) as channel:
            seen.append(health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status)
            seen.append(failure(lambda: Client(channel).tokens(LONG)).reason)
            seen.append(failure(lambda: Client(channel).catalog.GetModel(catalog_pb2.GetModelRequest())).reason)

    async def observed(engine: Engine) -> None:
        await asyncio.to_thread(look, server)
        await warm_up(engine)

    monkeypatch.setattr(lopa_server.warmup, "warm_up", observed)
    server = RunningServer(ServerConfig(fm=tiny_fm, threads=1))
    server.start()
    server.stop()
    assert seen == [NOT_SERVING, "STARTING", "STARTING"]


def test_a_full_queue_is_told_with_a_time_to_come_back(tiny_fm: Path) -> None:
    config = ServerConfig(fm=tiny_fm, threads=1, max_batch=1, max_waiting=1)
    with start_server(config) as server, grpc.insecure_channel(server.address) as channel:
        client = Client(channel)
        running = client.inference.Generate(LONG)
        next(running)
        waiting = client.inference.Generate(LONG)
        while not server.app.engine.stats().waiting and running.is_active():
            client.inference.Score(inference_pb2.ScoreRequest(pairs=[pair()]))
        refused = failure(lambda: client.tokens(LONG))
        assert (refused.code, refused.reason, refused.limit) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "1")
        assert refused.retry_seconds
        assert sum(len(delta.token_ids) for delta in waiting) == 480


def test_calls_beyond_the_bound_are_refused(tiny_fm: Path) -> None:
    with start_server(ServerConfig(fm=tiny_fm, threads=1, max_calls=2)) as server, grpc.insecure_channel(server.address) as channel:
        client = Client(channel)
        calls = [client.inference.Generate(LONG) for _ in range(2)]
        counts = [len(next(call).token_ids) for call in calls]
        refused = failure(lambda: client.catalog.GetModel(catalog_pb2.GetModelRequest()))
        assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS")
        assert (refused.found, refused.limit) == ("2", "2") and refused.retry_seconds
        probe = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert probe.status == health_pb2.HealthCheckResponse.SERVING
        assert [count + sum(len(delta.token_ids) for delta in call) for count, call in zip(counts, calls, strict=True)] == [480] * 2


def test_a_failed_start_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lopa.cli", "serve", "--fm", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert "config.json" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_ready_file_that_cannot_be_written_ends_the_server(tiny_fm: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match=r"can't write the ready file .*taken"):
        start_server(ServerConfig(fm=tiny_fm, threads=1, ready_file=tmp_path / "taken"))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert {thread for thread in threading.enumerate() if thread.name.startswith("lopa-")} <= before


def test_a_failed_start_leaves_another_servers_ready_file(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    ready.write_text("127.0.0.1:7070")
    with pytest.raises(FileNotFoundError):
        start_server(ServerConfig(fm=tmp_path / "none", ready_file=ready))
    assert ready.read_text() == "127.0.0.1:7070"


def test_the_command_is_listed_without_torch() -> None:
    code = "import sys, lopa_server.cli, lopa_server.config; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False False\n"


def _other_model(tmp_path: Path, tiny_fm: Path) -> ServerConfig:
    return ServerConfig(fm=tiny_fm, bundle=write_bundle(tmp_path / "bundle", fingerprint="0" * 64).folder)


def _many_rows(tmp_path: Path, tiny_fm: Path) -> ServerConfig:
    bundle = write_bundle(tmp_path / "bundle", fingerprint=fingerprint_folder(tiny_fm), rows=70)
    return ServerConfig(fm=tiny_fm, bundle=bundle.folder)


def _damaged(tmp_path: Path, tiny_fm: Path) -> ServerConfig:
    bundle = write_bundle(tmp_path / "bundle", fingerprint=fingerprint_folder(tiny_fm))
    (bundle.folder / "encode.onnx").write_bytes(b"changed")
    return ServerConfig(fm=tiny_fm, bundle=bundle.folder)


BAD_STARTS: dict[str, tuple[Callable[[Path, Path], ServerConfig], type[Exception], str]] = {
    "another model's bundle": (_other_model, ConfigError, "was made for tiny"),
    "a bundle of too many rows": (_many_rows, ConfigError, "max_virtual_tokens is 64"),
    "a damaged bundle": (_damaged, ConfigError, "encode.onnx"),
    "no model": (lambda tmp, _: ServerConfig(fm=tmp), ConfigError, "config.json"),
    "no such model": (lambda tmp, _: ServerConfig(fm=tmp / "none"), FileNotFoundError, "none"),
    "everybody may connect": (lambda _, fm: ServerConfig(fm=fm, host="0.0.0.0"), ConfigError, "insecure"),
    "no batch": (lambda _, fm: ServerConfig(fm=fm, max_batch=0), ConfigError, "max_batch"),
    "no rows": (lambda _, fm: ServerConfig(fm=fm, limits=ServiceLimits(max_virtual_tokens=0)), ConfigError, "max_virtual_tokens"),
    "no folder for the ready file": (lambda tmp, fm: ServerConfig(fm=fm, ready_file=tmp / "no" / "f"), ConfigError, "there is no folder"),
    "no such device": (lambda _, fm: ServerConfig(fm=fm, device="cuda:99"), ConfigError, "cuda:99"),
    "no device at all": (lambda _, fm: ServerConfig(fm=fm, device="gpu"), ConfigError, "cuda:<number>"),
    "unknown dtype": (lambda _, fm: ServerConfig(fm=fm, dtype="float8"), ConfigError, "float8"),
}


@pytest.mark.parametrize("name", BAD_STARTS)
def test_a_server_that_would_be_wrong_does_not_start(name: str, tiny_fm: Path, tmp_path: Path) -> None:
    make, error, text = BAD_STARTS[name]
    with pytest.raises(error, match=text):
        start_server(make(tmp_path, tiny_fm))


def test_a_taken_port_is_an_error(server: RunningServer, tiny_fm: Path) -> None:
    with pytest.raises(ConfigError, match="can't listen"):
        start_server(ServerConfig(fm=tiny_fm, port=int(server.address.rpartition(":")[2])))


def test_an_architecture_that_batches_wrongly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    fm = build_tiny_fm(tmp_path)
    forward = LlamaModel.forward

    def deaf(self: LlamaModel, *arguments: object, **inputs: object) -> object:
        return forward(self, *arguments, **{**inputs, "position_ids": None})

    monkeypatch.setattr(LlamaModel, "forward", deaf)
    with pytest.raises(UnsupportedModel, match="logits differ"):
        start_server(ServerConfig(fm=fm))


def test_the_thread_that_loaded_the_model_is_gone(tiny_fm: Path) -> None:
    """Its OpenMP threads would slow every step of the engine's own thread down."""
    with start_server(ServerConfig(fm=tiny_fm, threads=1)):
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("lopa-load")]


def test_a_write_that_fails_because_the_client_left_is_no_error_of_ours() -> None:
    """gRPC's own exception, as `context.write` raises it now and then when a connection dies in the middle of a message."""

    class Gone:
        async def write(self, _: object) -> None:
            raise grpc.aio.InternalError("Failed ExecuteBatch")

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(write(catalog_pb2.BundleChunk(), Gone()))
