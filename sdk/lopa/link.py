"""The synchronous connection: a channel, its stubs, and the driver that carries flows out in the caller's thread."""

from __future__ import annotations

import time
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message as ProtoMessage

from lopa.errors import Cancelled
from lopa.protocol.flow import Ask, Finish, Flow, Meter, Open, Receive, Start, Step, Wait, drive
from lopa.transport import Endpoint, translate
from lopa.v1.catalog_pb2_grpc import CatalogStub
from lopa.v1.inference_pb2_grpc import InferenceStub
from lopa.v1.tuning_pb2_grpc import TuningStub

Result = TypeVar("Result")
CLOSED = "this client is closed"


class Link:
    """A channel and its stubs. Safe between threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._closed = False
        options = endpoint.options()
        plain = grpc.Compression.NoCompression  # noise of tensors doesn't compress
        if endpoint.credentials is None:
            self._channel = grpc.insecure_channel(endpoint.address, options, compression=plain)
        else:
            self._channel = grpc.secure_channel(endpoint.address, endpoint.credentials, options, compression=plain)
        self._stubs: dict[str, Any] = {
            "catalog": CatalogStub(self._channel),
            "inference": InferenceStub(self._channel),
            "tuning": TuningStub(self._channel),
        }

    def close(self) -> None:
        """Close the channel; calls under way end as `Cancelled`."""
        self._closed = True
        self._channel.close()

    def run(self, flow: Flow[Result]) -> Result:
        """Carry a flow out and give its result.

        Raises:
            RemoteError: as `translate` says. Others: as the flow says.
        """
        return drive(flow, self._perform)

    def _perform(self, step: Step) -> Any:
        if isinstance(step, Ask | Start | Open) and self._closed:
            raise Cancelled(CLOSED)
        try:
            if isinstance(step, Ask):
                return self._start(step).reply()
            if isinstance(step, Start):
                return self._start(step.ask)
            if isinstance(step, Finish):
                return step.call.reply()  # type: ignore[attr-defined]
            if isinstance(step, Open):
                return self._open(step)
            if isinstance(step, Receive):
                return step.stream.receive()  # type: ignore[attr-defined]
        except grpc.RpcError as error:
            raise translate(error, address=self.endpoint.address) from error
        if isinstance(step, Wait):
            return step.until.wait(step.seconds) if step.until is not None else time.sleep(step.seconds or 0.0)
        return step.function()

    def _start(self, step: Ask) -> Call:
        method = getattr(self._stubs[step.method.service], step.method.name)
        step.meter.add(sent=step.request.ByteSize(), requests=1)
        return Call(method.future(step.request, timeout=step.timeout, metadata=self.endpoint.metadata()), step)

    def _open(self, step: Open) -> ReplyStream:
        method = getattr(self._stubs[step.method.service], step.method.name)
        step.meter.add(sent=step.request.ByteSize(), requests=1)
        return ReplyStream(method(step.request, timeout=step.timeout, metadata=self.endpoint.metadata()), step.meter)


class Call:
    """A unary call under way."""

    def __init__(self, future: Any, step: Ask) -> None:
        self._future, self._meter = future, step.meter
        self._unsubscribe = step.stop.subscribe(future.cancel) if step.stop is not None else lambda: None

    def reply(self) -> ProtoMessage:
        """Wait for it.

        Raises:
            Cancelled: the call was given up. RpcError: it failed.
        """
        try:
            reply: ProtoMessage = self._future.result()
        except grpc.FutureCancelledError as error:
            raise Cancelled("the call was cancelled") from error
        except BaseException:  # the caller's own interruption: nobody waits any more
            self._future.cancel()
            raise
        finally:
            self._unsubscribe()
        self._meter.add(received=reply.ByteSize())
        return reply

    def cancel(self) -> None:
        """Give it up; harmless after its end."""
        self._unsubscribe()
        self._future.cancel()


class ReplyStream:
    """A stream of replies whose first message has arrived."""

    def __init__(self, call: Any, meter: Meter) -> None:
        self._call, self._meter = call, meter
        self._first: ProtoMessage | None = self._read()

    def _read(self) -> ProtoMessage | None:
        reply: ProtoMessage | None = next(self._call, None)
        if reply is not None:
            self._meter.add(received=reply.ByteSize())
        return reply

    def receive(self) -> ProtoMessage | None:
        """The next reply, None at the end."""
        if self._first is None:
            return self._read()
        reply, self._first = self._first, None
        return reply

    def close(self) -> None:
        """Cancel the call."""
        self._call.cancel()
