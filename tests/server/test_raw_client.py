"""A client written from the .proto files alone: no `lopa`, no generated code, nothing but protoc, gRPC and the standard library."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_tools import protoc
from lopa_server.app import RunningServer

PROTO = Path(__file__).parents[2] / "proto"
FILES = ("common", "catalog", "inference", "tuning")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> descriptor_pool.DescriptorPool:
    """The wire as the .proto files describe it, compiled on the spot."""
    target = tmp_path_factory.mktemp("proto") / "lopa.binpb"
    sources = [f"lopa/v1/{name}.proto" for name in FILES]
    assert protoc.main(["protoc", f"-I{PROTO}", f"--descriptor_set_out={target}", "--include_imports", *sources]) == 0
    files = descriptor_pb2.FileDescriptorSet.FromString(target.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return pool


class RawClient:
    """Calls methods and builds messages by their full names."""

    def __init__(self, pool: descriptor_pool.DescriptorPool, channel: grpc.Channel) -> None:
        self._pool, self._channel = pool, channel

    def message(self, name: str, **fields: Any) -> Any:
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(f"lopa.v1.{name}"))(**fields)

    def call(self, service: str, method: str, request: Any) -> Any:
        """The reply, or the list of replies of a stream."""
        descriptor = self._pool.FindServiceByName(f"lopa.v1.{service}").methods_by_name[method]
        reply = message_factory.GetMessageClass(descriptor.output_type)
        kind = self._channel.unary_stream if descriptor.server_streaming else self._channel.unary_unary
        call = kind(f"/lopa.v1.{service}/{method}", lambda message: message.SerializeToString(), reply.FromString)
        result = call(request, timeout=60)
        return list(result) if descriptor.server_streaming else result


@pytest.fixture
def raw(pool: descriptor_pool.DescriptorPool, server: RunningServer) -> Iterator[RawClient]:
    with grpc.insecure_channel(server.address) as channel:
        yield RawClient(pool, channel)


def _soft_prompt(raw: RawClient, rows: int, hidden: int, placement: int) -> tuple[Any, bytes]:
    """A soft prompt of small numbers, and the digest that its receipt must show: DTYPE_F32 is 1."""
    values = [((7 * index) % 11 - 5) / 12 for index in range(rows * hidden)]
    data = struct.pack(f"<{len(values)}f", *values)
    message = raw.message("SoftPrompt", rows=rows, hidden=hidden, dtype=1, data=data, placement=placement)
    header = b"lopa.v1.SoftPrompt\n" + struct.pack("<4I", rows, hidden, 1, placement or 1)
    return message, hashlib.sha256(header + data).digest()


@pytest.mark.parametrize(("placement", "offset"), [(0, 0), (1, 0), (2, 3)])
def test_a_personal_stream(raw: RawClient, placement: int, offset: int) -> None:
    model = raw.call("Catalog", "GetModel", raw.message("GetModelRequest"))
    soft, digest = _soft_prompt(raw, 5, model.hidden_size, placement)
    request = raw.message(
        "GenerateRequest",
        prefix=raw.message("Prompt", tokens=raw.message("TokenIds", ids=[5, 6, 7])),
        prompt=raw.message("Prompt", text="def add("),
        sampling=raw.message("Sampling", max_tokens=9, ignore_end=True, logprobs=1),
        fm_fingerprint=model.fingerprint,
    )
    plain = raw.call("Inference", "Generate", request)
    request.soft_prompt.CopyFrom(soft)
    deltas = raw.call("Inference", "Generate", request)
    last = deltas[-1]
    assert (last.receipt.soft_prompt_sha256, last.receipt.rows, last.receipt.offset) == (digest, 5, offset)
    assert last.receipt.model_revision == model.revision
    assert last.finish_reason == 3 and last.usage.virtual_tokens == 5 and last.usage.completion_tokens == 9
    assert sum(len(delta.token_ids) for delta in deltas) == sum(len(delta.logprobs) for delta in deltas) == 9
    assert not plain[-1].HasField("receipt")
    assert [token for delta in plain for token in delta.token_ids] != [token for delta in deltas for token in delta.token_ids]


def test_a_step_of_tuning_lowers_the_loss(raw: RawClient) -> None:
    model = raw.call("Catalog", "GetModel", raw.message("GetModelRequest"))
    soft, digest = _soft_prompt(raw, 4, model.hidden_size, 1)
    prompt = raw.message("Prompt", text="class")
    target = raw.message("Target", text=" Point:", append_end=True)
    pair = raw.message("Pair", prompt=prompt, target=target, soft_prompt=soft)
    reply = raw.call("Tuning", "PromptGradients", raw.message("PromptGradientsRequest", pairs=[pair])).gradients[0]
    assert reply.receipt.soft_prompt_sha256 == digest
    count = 4 * model.hidden_size
    values, gradient = struct.unpack(f"<{count}f", soft.data), struct.unpack(f"<{count}f", reply.gradient.data)
    stepped = struct.pack(f"<{count}f", *(value - 0.02 * slope for value, slope in zip(values, gradient, strict=True)))
    pair.soft_prompt.data = stepped
    score = raw.call("Inference", "Score", raw.message("ScoreRequest", pairs=[pair])).scores[0]
    assert score.nll_sum < reply.nll_sum and score.target_tokens == reply.target_tokens


def test_reflection_lists_what_the_files_say(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        names = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {"lopa.v1.Catalog", "lopa.v1.Inference", "lopa.v1.Tuning", "grpc.health.v1.Health"} <= names
