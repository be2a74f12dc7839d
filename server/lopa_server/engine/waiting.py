"""Generate requests that have no place in the batch yet, and in which order they get one. Policy only: no tensor."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Names the next requests."""

    def push(self, request: WaitingRequest) -> None:
        """A request has arrived."""
        ...

    def candidates(self) -> Sequence[str]:
        """Ids of requests in the order in which they should be tried: the scheduler takes the first one that fits.

        Empty exactly when nobody waits. Repeated calls give the same until something changes.
        """
        ...

    def take(self, request_id: str) -> None:
        """Take out one of the candidates; it has a place now. Raises LookupError when it isn't one."""
        ...

    def remove(self, request_id: str) -> None:
        """Forget a request that gave up; unknown ids are ignored."""
        ...

    def charge(self, tenant: str, *, prompt_tokens: int, generated_tokens: int) -> None:
        """What a step has just computed for a tenant; what the prefix cache spared isn't charged."""
        ...

    def rank(self, tenant: str) -> tuple[float, int]:
        """The tenant with the smaller one goes first: what it was charged, over its weight, and when it was last."""
        ...

    def __len__(self) -> int: ...
