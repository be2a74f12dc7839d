"""One logic for two clients: flows say what to do, drivers do it.

A flow is a generator. It yields steps (ask the server, wait, work on this device), gets each step's result back, and
returns the answer. The synchronous `Link` carries steps out in the caller's thread, the asynchronous `AsyncLink` on an event loop;
neither knows what they are for. A step's error is raised inside the flow, so that `try`, `with` and `finally` mean what they always mean.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from google.protobuf.message import Message as ProtoMessage

from lopa.v1 import catalog_pb2, inference_pb2, tuning_pb2
from lopa.values import Traffic

Reply = TypeVar("Reply", bound=ProtoMessage)
Result = TypeVar("Result")


class Signal:
    """A flag between threads that wakes whoever waits for it."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], object]] = []

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        """Raise the flag and tell everybody who subscribed."""
        with self._lock:
            self._event.set()
            told = list(self._callbacks)
        for callback in told:
            callback()

    def clear(self) -> None:
        self._event.clear()

    def wait(self, seconds: float | None) -> None:
        """Until the flag is up or the time is over; None waits for ever."""
        self._event.wait(seconds)

    def subscribe(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Call back when the flag goes up, at once if it is up. What is returned ends the subscription."""
        with self._lock:
            self._callbacks.append(callback)
            already = self._event.is_set()
        if already:
            callback()

        def end() -> None:
            with self._lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)

        return end


class Meter:
    """Counts message bytes, for itself and for the meter above it. Safe between threads."""

    def __init__(self, parent: Meter | None = None) -> None:
        self._parent = parent
        self._lock = threading.Lock()
        self._traffic = Traffic()

    @property
    def traffic(self) -> Traffic:
        with self._lock:
            return self._traffic

    def add(self, *, sent: int = 0, received: int = 0, requests: int = 0) -> None:
        with self._lock:
            now = self._traffic
            self._traffic = Traffic(now.sent_bytes + sent, now.received_bytes + received, now.requests + requests)
        if self._parent is not None:
            self._parent.add(sent=sent, received=received, requests=requests)


@dataclass(frozen=True)
class Method(Generic[Reply]):
    """One method of the wire; its type says what it answers."""

    service: Literal["catalog", "inference", "tuning"]
    name: str


GET_MODEL: Method[catalog_pb2.ModelInfo] = Method("catalog", "GetModel")
FETCH_BUNDLE: Method[catalog_pb2.BundleChunk] = Method("catalog", "FetchBundle")
GENERATE: Method[inference_pb2.GenerateResponse] = Method("inference", "Generate")
SCORE: Method[inference_pb2.ScoreResponse] = Method("inference", "Score")
PROMPT_GRADIENTS: Method[tuning_pb2.PromptGradientsResponse] = Method("tuning", "PromptGradients")


class OpenStream(Protocol):
    """A server's stream whose first message has arrived, as its driver made it."""

    def close(self) -> None:
        """Cancel the call; harmless after its end."""
        ...


@dataclass(frozen=True)
class Ask:
    """One attempt at a unary call. Result: the reply. `stop` cancels it."""

    method: Method[Any]
    request: ProtoMessage
    timeout: float
    meter: Meter
    stop: Signal | None = None


class OpenCall(Protocol):
    """A unary call under way, as its driver made it."""

    def cancel(self) -> None:
        """Give it up; harmless after its end."""
        ...


@dataclass(frozen=True)
class Start:
    """As `Ask`, without waiting for the reply. Result: an OpenCall."""

    ask: Ask


@dataclass(frozen=True)
class Finish:
    """Wait for a call's reply, which is the result."""

    call: OpenCall


@dataclass(frozen=True)
class Open:
    """One attempt at a streaming call, up to its first message. Result: an OpenStream."""

    method: Method[Any]
    request: ProtoMessage
    timeout: float
    meter: Meter


@dataclass(frozen=True)
class Receive:
    """The stream's next message, None at its end."""

    stream: OpenStream


@dataclass(frozen=True)
class Wait:
    """For so many seconds, or until the signal; at least one of the two is given."""

    seconds: float | None
    until: Signal | None = None


@dataclass(frozen=True)
class Work:
    """Something that computes or waits for the disk. Result: the function's."""

    function: Callable[[], Any]


Step = Ask | Start | Finish | Open | Receive | Wait | Work
Flow = Generator[Step, Any, Result]


def work(function: Callable[[], Result]) -> Flow[Result]:
    """Run a function where it holds up nobody."""
    result: Result = yield Work(function)
    return result


Meanwhile = Callable[[], Flow[None]]
"""What a device does while a call is under way. Every attempt begins it, so the second time there may be nothing left to do."""


def wait(seconds: float | None, until: Signal | None = None) -> Flow[None]:
    """Wait; see `Wait`."""
    yield Wait(seconds, until)


def drive(flow: Flow[Result], perform: Callable[[Step], Any]) -> Result:
    """Carry a flow out in this thread; `perform` does one step."""
    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            step = flow.send(value) if error is None else flow.throw(error)
        except StopIteration as end:
            result: Result = end.value
            return result
        value, error = None, None
        try:
            value = perform(step)
        except BaseException as problem:  # whatever it is, the flow's own `finally` and `except` decide
            error = problem
