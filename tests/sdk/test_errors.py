"""One exception tree: every gRPC status and every reason of the catalogue ends in it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from types import SimpleNamespace

import grpc
import lopa
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from lopa import errors, retry
from lopa.link import Link
from lopa.protocol.flow import GET_MODEL, Flow, Wait, drive
from lopa.retry import Patience, RetryPolicy, is_retryable
from lopa.session import Session
from lopa.transport import REASONS, STATUS, Endpoint
from lopa.v1 import catalog_pb2, catalog_pb2_grpc
from lopa.wire.errors import CATALOGUE, DOMAIN, Reason


class Failing(catalog_pb2_grpc.CatalogServicer):
    """Fails with the statuses it is given, one a call, then answers."""

    def __init__(self, *statuses: status_pb2.Status) -> None:
        self.statuses = list(statuses)
        self.calls = 0

    def GetModel(self, request: object, context: grpc.ServicerContext) -> catalog_pb2.ModelInfo:
        del request
        self.calls += 1
        if self.statuses:
            context.abort_with_status(rpc_status.to_status(self.statuses.pop(0)))
        return catalog_pb2.ModelInfo(name="answered")

    def FetchBundle(self, request: object, context: object) -> Iterator[catalog_pb2.BundleChunk]:
        raise NotImplementedError


@contextmanager
def failing(*statuses: status_pb2.Status, attempts: int = 1) -> Iterator[tuple[Failing, tuple[Link, Session]]]:
    """A real server on a free port, and a way to it."""
    servicer = Failing(*statuses)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    catalog_pb2_grpc.add_CatalogServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    address, retry = f"127.0.0.1:{port}", RetryPolicy(attempts=attempts, initial=0.001)
    link = Link(Endpoint(address))
    try:
        yield servicer, (link, Session(address, lopa.ClientConfig(retry=retry)))
    finally:
        link.close()
        server.stop(None)


def ask(way: tuple[Link, Session], timeout: float = 60.0) -> catalog_pb2.ModelInfo:
    link, session = way
    return link.run(session.call(GET_MODEL, catalog_pb2.GetModelRequest(), timeout))


def status(code: grpc.StatusCode, reason: Reason | None = None, retry: float | None = None) -> status_pb2.Status:
    message = status_pb2.Status(code=code.value[0], message="what is wrong")
    if reason is not None:
        metadata = {"field": "pairs[3].target", "limit": "7", "found": "9"}
        message.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason.value, domain=DOMAIN, metadata=metadata))
    if retry is not None:
        delay = Duration()
        delay.FromNanoseconds(int(retry * 1e9))
        message.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return message


def test_every_status_and_every_reason_is_mapped() -> None:
    assert set(STATUS) == set(grpc.StatusCode)
    assert set(REASONS) == set(Reason) == set(CATALOGUE)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_statuses_arrive_as_ours(code: grpc.StatusCode) -> None:
    with failing(status(code)) as (_, way), pytest.raises(STATUS[code], match="what is wrong") as caught:
        ask(way)
    assert isinstance(caught.value, lopa.LopaError) and isinstance(caught.value.__cause__, grpc.RpcError)
    assert caught.value.reason is None


@pytest.mark.parametrize("reason", list(Reason))
def test_reasons_arrive_as_ours(reason: Reason) -> None:
    with failing(status(CATALOGUE[reason].status, reason, 2.5)) as (_, way), pytest.raises(REASONS[reason]) as caught:
        ask(way)
    assert caught.value.reason is reason and str(caught.value) == "what is wrong"
    if isinstance(caught.value, lopa.InvalidRequest):
        assert (caught.value.field, caught.value.limit, caught.value.found) == ("pairs[3].target", "7", "9")
    else:
        assert caught.value.retry_after == 2.5


def test_a_reason_of_a_later_version_falls_back_to_its_status() -> None:
    message = status(grpc.StatusCode.NOT_FOUND)
    message.details.add().Pack(error_details_pb2.ErrorInfo(reason="FROM_THE_FUTURE", domain=DOMAIN))
    with failing(message) as (_, way), pytest.raises(lopa.NotFound) as caught:
        ask(way)
    assert caught.value.reason is None


def test_the_tree_is_as_drawn() -> None:
    drawn = [line.strip("│├└─ ").split() for line in (errors.__doc__ or "").splitlines() if line.startswith("    ")]
    names = {words[0] for words in drawn if words}
    kinds = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert names == kinds and names <= set(lopa.__all__)


@pytest.mark.parametrize(
    "fault",
    [
        status(grpc.StatusCode.UNAVAILABLE),
        status(grpc.StatusCode.UNAVAILABLE, Reason.DRAINING, 0.01),
        status(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL, 0.01),
    ],
)
def test_what_can_help_is_tried_again(fault: status_pb2.Status) -> None:
    with failing(fault, fault, attempts=3) as (servicer, way):
        assert ask(way).name == "answered"
    assert servicer.calls == 3


@pytest.mark.parametrize(
    "fault",
    [
        status(grpc.StatusCode.INVALID_ARGUMENT, Reason.OUT_OF_RANGE),
        status(grpc.StatusCode.INTERNAL, Reason.INTERNAL),
        status(grpc.StatusCode.RESOURCE_EXHAUSTED),
        status(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.MESSAGE_TOO_LARGE),
        status(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL, 3600.0),
        status(grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
def test_what_cannot_help_is_not_tried_again(fault: status_pb2.Status) -> None:
    with failing(fault, attempts=5) as (servicer, way), pytest.raises(lopa.RemoteError):
        ask(way)
    assert servicer.calls == 1


def test_attempts_and_time_are_bounded() -> None:
    fault = status(grpc.StatusCode.UNAVAILABLE)
    with failing(*[fault] * 9, attempts=3) as (servicer, way), pytest.raises(lopa.Unavailable):
        ask(way)
    assert servicer.calls == 3
    slow = status(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL, 5.0)
    with failing(*[slow] * 9, attempts=9) as (servicer, way), pytest.raises(lopa.ResourceExhausted):
        ask(way, timeout=4.9)
    assert servicer.calls == 1


def test_delays_grow_with_full_jitter_up_to_a_bound() -> None:
    policy, rng = RetryPolicy(attempts=20, initial=0.1, maximum=1.0), random.Random(0)
    bounds = [max(policy.backoff(failures, rng) for _ in range(300)) for failures in range(1, 8)]
    for failures, bound in enumerate(bounds, 1):
        limit = min(1.0, 0.1 * 2 ** (failures - 1))
        assert 0.9 * limit < bound <= limit
    delays = [policy.delay(1, lopa.ResourceExhausted("", retry_after=0.5), rng) for _ in range(100)]
    assert all(delay is not None and 0.5 <= delay <= 0.6 for delay in delays) and len(set(delays)) > 90
    assert not is_retryable(lopa.ServerError(""))


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, clock = [], [0.0]
    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def call() -> Flow[None]:
        calls.append(1)
        raise lopa.Unavailable("gone")
        yield

    def pass_time(step: Wait) -> None:
        clock[0] += step.seconds or 0.0

    waits: list[lopa.RemoteError] = []
    patience = Patience(0.1, random.Random(0), RetryPolicy(initial=0.01, maximum=0.02))
    with pytest.raises(lopa.Unavailable):
        drive(patience.keep_trying(call, waits.append), pass_time)
    assert len(calls) == len(waits) + 1 > 3 and clock[0] <= 0.1
