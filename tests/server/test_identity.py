"""Nobody gets in without credentials, and credentials open only what they say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from lopa.v1 import catalog_pb2, inference_pb2, tuning_pb2
from lopa.v1 import common_pb2 as pb
from lopa_server.app import RunningServer, ServerConfig, start_server
from lopa_server.identity.caller import DEVICE_SCOPES, Scope, cache_salt
from lopa_server.identity.config import AccessConfig
from lopa_server.identity.keys import KeyFile
from lopa_server.identity.methods import OPEN, REQUIRED

from tests.server.client import Client, Failure, failure, generate_request, pair, soft_prompt, take_apart

GET_MODEL = catalog_pb2.GetModelRequest()
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


def bearer(credential: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {credential}"),)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    return KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")


@pytest.fixture(scope="module")
def key(key_file: KeyFile) -> str:
    """A device's key."""
    return key_file.create("acme", DEVICE_SCOPES, None)[1]


@pytest.fixture(scope="module")
def guarded(tiny_fm: Path, key_file: KeyFile, key: str) -> Iterator[RunningServer]:
    """A server that wants API keys."""
    del key
    with start_server(ServerConfig(fm=tiny_fm, threads=1, access=AccessConfig(keys=key_file._path))) as running:
        yield running


@pytest.fixture
def channel(guarded: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(guarded.address) as opened:
        yield opened


def _served(channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]) -> list[str]:
    """Full names of the services that reflection lists."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    (reply,) = stub.ServerReflectionInfo(asked, metadata=metadata)
    return [service.name for service in reply.list_services_response.service]


def _call(channel: grpc.Channel, method: object, metadata: tuple[tuple[str, str], ...] = ()) -> object:
    """Call any method of any service with an empty request, by its descriptor."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    kind = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[(method.client_streaming, method.server_streaming)]
    call = kind(path, lambda message: message.SerializeToString(), GetMessageClass(method.output_type).FromString)
    request = GetMessageClass(method.input_type)()
    reply = call(iter([request]) if method.client_streaming else request, metadata=metadata, timeout=20)
    return next(reply) if method.server_streaming else reply


def _all_methods(channel: grpc.Channel, key: str) -> Iterator[tuple[str, object]]:
    pool = descriptor_pool.Default()
    for service in _served(channel, bearer(key)):
        for method in pool.FindServiceByName(service).methods:
            yield f"/{service}/{method.name}", method


@pytest.mark.parametrize("metadata", [(), bearer("lopa_0000000000000000_nothing"), bearer(""), (("authorization", "Basic YTpi"),)])
def test_no_rpc_of_any_service_answers_a_stranger(channel: grpc.Channel, key: str, metadata: tuple[tuple[str, str], ...]) -> None:
    refused = {}
    for path, method in _all_methods(channel, key):
        if path in OPEN:
            assert _call(channel, method).status == health_pb2.HealthCheckResponse.SERVING
            continue
        refused[path] = failure(lambda method=method: _call(channel, method, metadata))
    assert {"/lopa.v1.Inference/Generate", "/lopa.v1.Tuning/PromptGradients", "/grpc.health.v1.Health/Watch"} <= set(refused)
    assert {told.code for told in refused.values()} == {UNAUTHENTICATED}
    assert {told.reason for told in refused.values()} == {"INVALID_CREDENTIALS" if metadata else "NO_CREDENTIALS"}


def test_every_rpc_has_its_scope_written_down(channel: grpc.Channel, key: str) -> None:
    assert {path for path, _ in _all_methods(channel, key)} <= set(REQUIRED) | OPEN


def test_a_key_opens_what_its_scopes_say(channel: grpc.Channel, key_file: KeyFile) -> None:
    client, only = Client(channel), bearer(key_file.create("acme", frozenset({Scope.SCORE}), None)[1])
    assert client.inference.Score(inference_pb2.ScoreRequest(pairs=[pair()]), metadata=only).scores
    assert client.catalog.GetModel(GET_MODEL, metadata=only).hidden_size == 32
    calls = {
        "generate": lambda: next(client.inference.Generate(generate_request(), metadata=only)),
        "tune": lambda: client.tuning.PromptGradients(tuning_pb2.PromptGradientsRequest(pairs=[pair()]), metadata=only),
        "fetch": lambda: next(client.catalog.FetchBundle(catalog_pb2.FetchBundleRequest(), metadata=only)),
    }
    for scope, call in calls.items():
        told = failure(call)
        assert (told.code, told.reason, told.limit) == (grpc.StatusCode.PERMISSION_DENIED, "MISSING_SCOPE", scope)
        assert scope in told.message


def test_what_a_stranger_sends_is_never_decoded(channel: grpc.Channel) -> None:
    method = channel.unary_stream("/lopa.v1.Inference/Generate", lambda data: data, None)
    assert failure(lambda: next(method(b"\xff" * 1000))).reason == "NO_CREDENTIALS"


def _told(channel: grpc.Channel, credential: str) -> Failure | None:
    """What GetModel says to a credential; None when it answers."""
    try:
        Client(channel).catalog.GetModel(GET_MODEL, metadata=bearer(credential))
    except grpc.RpcError as error:
        return take_apart(error)
    return None


def test_keys_come_go_and_expire_without_a_restart(channel: grpc.Channel, key_file: KeyFile, key: str) -> None:
    made, text = key_file.create("newcomer", DEVICE_SCOPES, None)
    _, expired = key_file.create("latecomer", DEVICE_SCOPES, datetime.now(UTC) - timedelta(seconds=1))
    assert _told(channel, text) is None
    assert _told(channel, expired).reason == "EXPIRED_CREDENTIALS"
    assert _told(channel, expired[:-1] + "~").reason == "INVALID_CREDENTIALS", "only who knows the secret is told more"
    key_file.revoke(made.id)
    assert _told(channel, text).reason == "INVALID_CREDENTIALS"
    assert _told(channel, key) is None


def test_a_damaged_key_file_changes_nothing(channel: grpc.Channel, key_file: KeyFile, key: str) -> None:
    whole = key_file._path.read_bytes()
    try:
        key_file._path.write_bytes(whole[:-10])
        assert _told(channel, key) is None
    finally:
        key_file._path.write_bytes(whole)


def test_secrets_are_nowhere_in_the_key_file(key_file: KeyFile, key: str) -> None:
    content = key_file._path.read_text()
    assert key.split("_", 2)[2] not in content and key.split("_")[1] in content
    assert key_file._path.stat().st_mode & 0o777 == 0o600


def test_the_health_port_answers_liveness_and_nothing_else(tiny_fm: Path, key_file: KeyFile, key: str) -> None:
    del key
    config = ServerConfig(fm=tiny_fm, threads=1, access=AccessConfig(keys=key_file._path), health_port=0)
    with start_server(config) as server, grpc.insecure_channel(server.app.health_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        for call in (lambda: next(stub.Watch(health_pb2.HealthCheckRequest())), lambda: Client(channel).catalog.GetModel(GET_MODEL)):
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_tenants_have_salts_of_their_own() -> None:
    secret = os.urandom(32)
    salts = {cache_salt(secret, tenant) for tenant in ("a", "b", "anonymous")}
    assert len(salts) == 3 and all(len(salt) == 32 for salt in salts)
    assert cache_salt(secret, "a") in salts and cache_salt(os.urandom(32), "a") not in salts


def test_what_one_tenant_asked_is_no_cached_prefix_for_another(guarded: RunningServer, channel: grpc.Channel, key_file: KeyFile) -> None:
    """The same request over the wire: whose it is decides what it finds in the cache, for streams and for pairs."""
    asked = generate_request("def shared(): return 1\n" * 3, max_tokens=1)
    again = pair(prefix=pb.Prompt(text="import shared\n" * 4), soft_prompt=soft_prompt(1, placement=pb.PLACEMENT_AFTER_PREFIX))
    client, found = Client(channel), []
    for tenant in ("one", "one", "two"):
        caller = bearer(key_file.create(tenant, DEVICE_SCOPES, None)[1])
        before = guarded.app.engine.stats()
        list(client.inference.Generate(asked, metadata=caller))
        client.inference.Score(inference_pb2.ScoreRequest(pairs=[again]), metadata=caller)
        now = guarded.app.engine.stats()
        found.append((now.prefix_hit_tokens > before.prefix_hit_tokens, now.pair_prefix_hit_tokens > before.pair_prefix_hit_tokens))
    assert found == [(False, False), (True, True), (False, False)]
