"""The client against a scripted server: broken streams, lying receipts, a model that changes, TLS."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import lopa
import numpy as np
import pytest
from lopa.retry import RetryPolicy
from lopa.v1 import catalog_pb2, catalog_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc
from lopa.wire.tensors import soft_prompt_digest

SOFT = np.ones((2, 4), np.float32)
UNAVAILABLE = "unavailable"


class Scripted(catalog_pb2_grpc.CatalogServicer, inference_pb2_grpc.InferenceServicer):
    """Each Generate call plays one script: texts, or UNAVAILABLE where the connection breaks."""

    def __init__(self, *scripts: list[str]) -> None:
        self.scripts, self.calls = list(scripts), 0
        self.fingerprint, self.known_revision, self.revision = "ab" * 32, "1", "1"
        self.digest: bytes | None = None

    def GetModel(self, request: object, context: grpc.ServicerContext) -> catalog_pb2.ModelInfo:
        del request
        self.metadata = dict(context.invocation_metadata())
        self.peer = context.auth_context().get("x509_common_name")
        limits = catalog_pb2.Limits(max_pairs=8, max_message_bytes=1 << 20, max_virtual_tokens=64)
        return catalog_pb2.ModelInfo(fingerprint=self.fingerprint, revision=self.known_revision, hidden_size=4, limits=limits)

    def _receipt(self, soft: common_pb2.SoftPrompt) -> common_pb2.Receipt:
        digest = self.digest or soft_prompt_digest(soft)
        return common_pb2.Receipt(soft_prompt_sha256=digest, rows=soft.rows, offset=0, model_revision=self.revision)

    def Generate(self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[inference_pb2.GenerateResponse]:
        self.calls += 1
        for text in self.scripts.pop(0):
            if text is UNAVAILABLE:
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            yield inference_pb2.GenerateResponse(text=text, token_ids=[1])
        receipt = self._receipt(request.soft_prompt) if request.HasField("soft_prompt") else None
        yield inference_pb2.GenerateResponse(finish_reason=inference_pb2.FINISH_REASON_END, receipt=receipt)

    def Score(self, request: inference_pb2.ScoreRequest, context: object) -> inference_pb2.ScoreResponse:
        del context
        scores = [inference_pb2.PairScore(nll_sum=1, target_tokens=1, receipt=self._receipt(pair.soft_prompt)) for pair in request.pairs]
        return inference_pb2.ScoreResponse(scores=scores)


@contextmanager
def playing(servicer: Scripted, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    catalog_pb2_grpc.add_CatalogServicer_to_server(servicer, server)
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    port = server.add_secure_port("localhost:0", credentials) if credentials else server.add_insecure_port("localhost:0")
    server.start()
    try:
        yield f"localhost:{port}"
    finally:
        server.stop(None)


@contextmanager
def connected(servicer: Scripted) -> Iterator[lopa.Client]:
    config = lopa.ClientConfig(retry=RetryPolicy(attempts=3, initial=0.001))
    with playing(servicer) as address, lopa.connect(address, config=config) as client:
        yield client


def test_a_break_before_the_first_delta_is_tried_again() -> None:
    servicer = Scripted([UNAVAILABLE], [UNAVAILABLE], ["a", "b"])
    with connected(servicer) as client:
        assert client.generate("x").text == "ab"
    assert servicer.calls == 3


def test_a_break_after_the_first_delta_is_told() -> None:
    servicer = Scripted(["a", UNAVAILABLE], ["a", "b"])
    with connected(servicer) as client:
        stream = client.stream("x")
        assert next(stream).text == "a"
        with pytest.raises(lopa.Unavailable, match="gone"):
            next(stream)
    assert servicer.calls == 1


def test_an_empty_stream_is_no_generation() -> None:
    servicer = Scripted([])
    servicer.Generate = lambda *_: iter(())  # type: ignore[method-assign]
    with connected(servicer) as client, pytest.raises(lopa.ProtocolError, match="without a finish reason"):
        client.generate("x")


def test_a_lying_receipt_is_caught_end_to_end() -> None:
    servicer = Scripted(["a"])
    servicer.digest = b"\1" * 32
    with connected(servicer) as client:
        for call in (lambda: client.generate("x", soft_prompt=SOFT), lambda: client.score([lopa.Pair("x", "y", SOFT)])):
            with pytest.raises(lopa.ProtocolError, match="was not applied as it is"):
                call()


def test_a_restarted_server_of_another_version_is_asked_once_more() -> None:
    servicer = Scripted(["a"])
    with connected(servicer) as client:
        servicer.known_revision = servicer.revision = "2"
        assert client.score([lopa.Pair("x", "y", SOFT)])[0].nll == 1
        assert client.generate("x", soft_prompt=SOFT).text == "a" and client.model.revision == "2"
        servicer.revision = "3"
        with pytest.raises(lopa.ProtocolError, match="model revision"):
            client.score([lopa.Pair("x", "y", SOFT)])
        servicer.fingerprint = "cd" * 32
        with pytest.raises(lopa.ProtocolError, match="changed its model"):
            client.score([lopa.Pair("x", "y", SOFT)])


def test_a_token_goes_with_every_call_and_never_in_the_open() -> None:
    servicer, tokens = Scripted(["a"]), iter(["one", "two", "three"])
    with playing(servicer) as address, lopa.connect(address, token=lambda: next(tokens)) as client:
        assert servicer.metadata["authorization"] == "Bearer one"
        client.refresh()
        assert servicer.metadata["authorization"] == "Bearer two"
    for token, address in (("key", "example.com:443"), ("kéy", "localhost:1"), ("", "localhost:1")):
        with pytest.raises(lopa.InvalidRequest, match="token") as caught:
            lopa.connect(address, token=token)
        assert caught.value.field == "token" and (not token or token not in repr(caught.value))


def test_a_message_that_grpc_itself_refuses_is_told_with_its_limit() -> None:
    config = lopa.ClientConfig(max_message_bytes=100_000)
    with playing(Scripted()) as address, lopa.connect(address, config=config) as client:
        with pytest.raises(lopa.InvalidRequest) as refused:
            client.score([lopa.Pair("x" * 200_000, "y", SOFT)])
        assert (refused.value.field, refused.value.limit) == ("message", "100000") and int(refused.value.found) > 200_000


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for `name`, and its key."""
    key, path = folder / f"{name}.key.pem", folder / f"{name}.pem"
    names = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-keyout", str(key), "-out", str(path)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    return key, path


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with the openssl command")
def test_mutual_tls(tmp_path: Path) -> None:
    (key, own), (device_key, device) = certificate(tmp_path, "localhost"), certificate(tmp_path, "device")
    pair = [(key.read_bytes(), own.read_bytes())]
    identity = grpc.ssl_server_credentials(pair, root_certificates=device.read_bytes(), require_client_auth=True)
    servicer, config = Scripted(), lopa.ClientConfig(connect_timeout=60.0, retry=RetryPolicy(attempts=1))
    with playing(servicer, identity) as address:
        with lopa.connect(address, tls=lopa.Tls.from_files(roots=own, key=device_key, chain=device), token="key", config=config):
            assert servicer.peer == [b"device"] and servicer.metadata["authorization"] == "Bearer key"
        with pytest.raises(lopa.Unavailable):
            lopa.connect(address, tls=lopa.Tls.from_files(roots=own), config=config)
        for wrong in ({"roots": tmp_path / "none.pem"}, {"roots": own, "key": device_key}):
            with pytest.raises(lopa.InvalidRequest, match="tls"):
                lopa.connect(address, tls=lopa.Tls.from_files(**wrong), config=config)
        locked = tmp_path / "locked.pem"
        command = ["openssl", "rsa", "-in", str(device_key), "-aes128", "-passout", "pass:secret", "-out", str(locked)]
        subprocess.run(command, check=True, capture_output=True)
        (tmp_path / "cut.pem").write_bytes(own.read_bytes()[:300])
        (tmp_path / "text.pem").write_text("nothing")
        for part, content, told in [
            ("roots", "cut.pem", "certificate"),
            ("roots", "text.pem", "no certificate"),
            ("roots", device_key.name, "no certificate"),
            ("chain", "text.pem", "no certificate"),
            ("key", "text.pem", "no private key"),
            ("key", device.name, "no private key"),
            ("key", "locked.pem", "passphrase"),
            ("key", key.name, "doesn't belong"),
        ]:
            files = {"roots": own, "key": device_key, "chain": device, part: tmp_path / content}
            with pytest.raises(lopa.InvalidRequest, match=told) as refused:
                lopa.connect(address, tls=lopa.Tls.from_files(**files), config=config)
            assert refused.value.field == f"tls.{part}"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with the openssl command")
def test_tls(tmp_path: Path) -> None:
    """A certificate made here: with it as root the call passes, with the system's roots or without TLS it does not."""
    key, root = certificate(tmp_path, "localhost")
    identity = grpc.ssl_server_credentials([(key.read_bytes(), root.read_bytes())])
    config = lopa.ClientConfig(connect_timeout=60.0, retry=RetryPolicy(attempts=1))
    with playing(Scripted(), identity) as address:
        trusted = grpc.ssl_channel_credentials(root.read_bytes())
        with lopa.connect(address, tls=trusted, config=config) as client:
            assert client.model.hidden_size == 4
        for tls in (True, False):
            with pytest.raises(lopa.Unavailable):
                lopa.connect(address, tls=tls, config=config)
