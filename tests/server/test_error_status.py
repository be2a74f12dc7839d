"""Every failure has its status: the catalogue is complete, and nothing private gets out."""

from __future__ import annotations

import logging
from pathlib import Path

import grpc
import lopa.wire
import lopa_server
import pytest
from google.rpc import error_details_pb2, status_pb2
from lopa.wire.errors import CATALOGUE, DOMAIN, Reason, WireError
from lopa_server.engine.base import EngineFailed, EngineStopped, QueueFull
from lopa_server.service.status import status_for


def _details(status: status_pb2.Status) -> dict[str, object]:
    """The details by type name."""
    kinds = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    found = {}
    for detail in status.details:
        for kind in kinds:
            message = kind()
            if detail.Unpack(message):
                found[kind.__name__] = message
    return found


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_status_and_details(reason: Reason) -> None:
    status = status_for(WireError(reason, "some.field", limit="7", found="9"))
    details = _details(status)
    info = details["ErrorInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (reason.value, DOMAIN)
    assert dict(info.metadata) == {"field": "some.field", "limit": "7", "found": "9"}
    assert status.code == CATALOGUE[reason].status.value[0] and status.message
    assert ("BadRequest" in details) == (CATALOGUE[reason].status is grpc.StatusCode.INVALID_ARGUMENT)


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_raised_somewhere(reason: Reason) -> None:
    folders = [Path(lopa_server.__file__).parent, Path(lopa.wire.__file__).parent]
    sources = [path for folder in folders for path in folder.rglob("*.py") if path.name != "errors.py"]
    assert any(f"WireError(Reason.{reason.name}" in path.read_text(encoding="utf-8") for path in sources)


def test_a_full_queue_names_the_time_to_come_back() -> None:
    status = status_for(QueueFull("pair queue", 90, 80, retry_after=2.5))
    details = _details(status)
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert details["RetryInfo"].retry_delay.ToNanoseconds() == 2_500_000_000
    assert details["ErrorInfo"].reason == "QUEUE_FULL" and "pair queue" in status.message


@pytest.mark.parametrize("error", [EngineStopped("x"), WireError(Reason.DRAINING), WireError(Reason.STARTING)])
def test_what_passes_by_itself_may_be_tried_again(error: Exception) -> None:
    status = status_for(error)
    assert status.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert _details(status)["RetryInfo"].retry_delay.ToNanoseconds() > 0


@pytest.mark.parametrize("error", [EngineFailed("secret /path"), ZeroDivisionError("secret /path"), OSError("secret /path")])
def test_detail_stays_in_the_log(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        status = status_for(error)
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert b"secret" not in status.SerializeToString()
    request_id = _details(status)["ErrorInfo"].metadata["found"]
    assert request_id in status.message and request_id in caplog.text and "secret" in caplog.text
