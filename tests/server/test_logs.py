"""Whatever the level, the log holds nothing that a client sent."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from lopa.v1 import common_pb2 as pb
from lopa.v1 import inference_pb2
from lopa_server.app import ServerConfig, start_server
from lopa_server.engine.torch_engine.runner import ModelRunner
from lopa_server.identity.caller import DEVICE_SCOPES
from lopa_server.identity.config import AccessConfig
from lopa_server.identity.keys import KeyFile
from lopa_server.logs import ContentFreeFormatter

from tests.server.client import Client, generate_request, pair, soft_prompt
from tests.tiny import build_tiny_fm

MARKER = "hippopotamus"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Everything that all loggers say, as `lopa serve` writes it."""
    written, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(written), root.level
    handler.setFormatter(ContentFreeFormatter())
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield written
    root.removeHandler(handler)
    root.setLevel(level)


def _requests() -> Iterator[inference_pb2.GenerateRequest]:
    """Good and bad ones with the marker wherever text may stand."""
    yield generate_request(f"{MARKER} {MARKER}", soft=soft_prompt(1), stop=[MARKER])
    yield generate_request("x", stop=[MARKER * 100])
    yield inference_pb2.GenerateRequest(prompt=pb.Prompt(text="x"), prefix=pb.Prompt(text=MARKER), fm_fingerprint=MARKER)
    for role in ("user", "assistant", MARKER):
        chat = pb.Chat(messages=[pb.ChatMessage(role=role, content=MARKER)])
        yield inference_pb2.GenerateRequest(prompt=pb.Prompt(chat=chat), sampling=inference_pb2.Sampling(max_tokens=2))
    yield generate_request("x", json_schema=f'{{"type": "{MARKER}"}}')
    yield generate_request("x", json_schema=MARKER)


def test_the_log_holds_no_content(tmp_path: Path, log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    fm = build_tiny_fm(tmp_path / "chat", chat=True)
    step, outcomes = ModelRunner.step, []

    def call(client: Client, request: inference_pb2.GenerateRequest) -> None:
        try:
            client.generate(request)
            outcomes.append(grpc.StatusCode.OK)
        except grpc.RpcError as error:
            outcomes.append(error.code())

    with start_server(ServerConfig(fm=fm, threads=1)) as server, grpc.insecure_channel(server.address) as channel:
        client = Client(channel)
        for request in _requests():
            call(client, request)
        client.inference.Score(inference_pb2.ScoreRequest(pairs=[pair(prompt=pb.Prompt(text=MARKER), target=pb.Target(text=MARKER))]))
        with pytest.raises(grpc.RpcError):
            channel.unary_unary("/lopa.v1.Inference/Score", lambda data: data, None)(MARKER.encode())

        def fail(*_: object) -> None:
            raise ValueError(f"can't do {MARKER}") from KeyError(MARKER)

        monkeypatch.setattr(ModelRunner, "step", fail)
        call(client, generate_request(MARKER))
        monkeypatch.setattr(ModelRunner, "step", step)
    assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL} <= set(outcomes)
    written = log.getvalue()
    assert "ValueError" in written and "KeyError" in written and "test_logs.py" in written, "the trace itself is there"
    assert MARKER not in written


def test_credentials_are_not_logged(tiny_fm: Path, tmp_path: Path, log: io.StringIO) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    _, text = keys.create("acme", DEVICE_SCOPES, None)
    config = ServerConfig(fm=tiny_fm, threads=1, access=AccessConfig(keys=tmp_path / "keys.json"))
    with start_server(config) as server, grpc.insecure_channel(server.address) as channel:
        for credential in (text, text[:-1] + "~", f"{MARKER}.{MARKER}.{MARKER}"):
            call = Client(channel).inference.Generate(generate_request(), metadata=(("authorization", f"Bearer {credential}"),))
            try:
                list(call)
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert text.split("_", 2)[2] not in log.getvalue() and MARKER not in log.getvalue()
