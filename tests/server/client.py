"""A plain gRPC client for tests: stubs, short ways to write requests, and errors taken apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from lopa.v1 import catalog_pb2_grpc, inference_pb2, inference_pb2_grpc, tuning_pb2_grpc
from lopa.v1 import common_pb2 as pb
from lopa.wire.tensors import soft_prompt_message

HIDDEN = 32
"""d of the tiny model."""


class Client:
    """Every stub over one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.catalog = catalog_pb2_grpc.CatalogStub(channel)
        self.inference = inference_pb2_grpc.InferenceStub(channel)
        self.tuning = tuning_pb2_grpc.TuningStub(channel)

    def generate(self, request: inference_pb2.GenerateRequest) -> list[inference_pb2.GenerateResponse]:
        """All deltas."""
        return list(self.inference.Generate(request, timeout=60))

    def tokens(self, request: inference_pb2.GenerateRequest) -> list[int]:
        """All token ids."""
        return [token for delta in self.generate(request) for token in delta.token_ids]


def rows(seed: int, count: int = 4, hidden: int = HIDDEN) -> np.ndarray:
    """(count, hidden) float32 rows that steer the tiny model."""
    return (np.random.default_rng(seed).standard_normal((count, hidden)) * 0.4).astype(np.float32)


def soft_prompt(seed: int, count: int = 4, **fields: Any) -> pb.SoftPrompt:
    """A soft prompt; `fields` overwrite what a correct one has."""
    message = soft_prompt_message(rows(seed, count))
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def generate_request(text: str = "def add(", *, soft: pb.SoftPrompt | None = None, **sampling: Any) -> inference_pb2.GenerateRequest:
    """A request for 12 tokens unless `sampling` says otherwise; the end token doesn't end it."""
    sampling = {"max_tokens": 12, "ignore_end": True, **sampling}
    return inference_pb2.GenerateRequest(prompt=pb.Prompt(text=text), soft_prompt=soft, sampling=inference_pb2.Sampling(**sampling))


def pair(seed: int = 0, **fields: Any) -> pb.Pair:
    """A pair with a soft prompt; `fields` overwrite."""
    texts = {"prompt": pb.Prompt(text="def"), "target": pb.Target(text=" add(a, b)")}
    parts = {**texts, "soft_prompt": soft_prompt(seed), **fields}
    return pb.Pair(**{name: part for name, part in parts.items() if part is not None})


@dataclass(frozen=True)
class Failure:
    """A failed call, taken apart."""

    code: grpc.StatusCode
    message: str
    reason: str
    field: str
    limit: str
    found: str
    violations: tuple[str, ...]
    """Fields named by google.rpc.BadRequest."""
    retry_seconds: float | None


def failure(call: Callable[[], object]) -> Failure:
    """What a call fails with; AssertionError when it doesn't."""
    try:
        call()
    except grpc.RpcError as error:
        return take_apart(error)
    raise AssertionError("the call succeeded")


def take_apart(error: grpc.RpcError) -> Failure:
    """The google.rpc details of an error."""
    status = rpc_status.from_call(error)
    if status is None:
        raise AssertionError(f"no google.rpc.Status in {error}")
    info, request, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    seconds = None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(request)
        if detail.Unpack(retry):
            seconds = retry.retry_delay.ToNanoseconds() / 1e9
    violations = tuple(violation.field for violation in request.field_violations)
    metadata = info.metadata
    return Failure(error.code(), status.message, info.reason, metadata["field"], metadata["limit"], metadata["found"], violations, seconds)
