"""Generate requests that have no place in the batch yet, and in which order they get one. Policy only: no tensor."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class WaitingRequest:
    """What an order may depend on."""

    id: str
    tenant: str
    """Whose request it is; empty where nobody is told apart."""
    prompt_tokens: int
    """Positions of the input, soft rows included."""
    max_tokens: int
    """Tokens that it may generate."""


class WaitingQueue(Protocol):
    """Names the next request. The scheduler takes it as soon as it fits, and never looks behind it."""

    def push(self, request: WaitingRequest) -> None:
        """A request has arrived."""
        ...

    def peek(self) -> str | None:
        """Id of the request whose turn it is, None when nobody waits. Repeated calls give the same until something changes."""
        ...

    def pop(self) -> str:
        """Take out the request that `peek` names; it has a place now. Raises LookupError when nobody waits."""
        ...

    def remove(self, request_id: str) -> None:
        """Forget a request that gave up; unknown ids are ignored."""
        ...

    def charge(self, tenant: str, *, prompt_tokens: int, generated_tokens: int) -> None:
        """What a step has just computed for a tenant; what the prefix cache spared isn't charged."""
        ...

    def __len__(self) -> int: ...


class ArrivalOrder:
    """First come, first served."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, WaitingRequest] = OrderedDict()

    def push(self, request: WaitingRequest) -> None:
        self._requests[request.id] = request

    def peek(self) -> str | None:
        return next(iter(self._requests), None)

    def pop(self) -> str:
        return self._requests.popitem(last=False)[0]

    def remove(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def charge(self, tenant: str, *, prompt_tokens: int, generated_tokens: int) -> None:
        """Who had how much doesn't change the order of arrival."""

    def __len__(self) -> int:
        return len(self._requests)
