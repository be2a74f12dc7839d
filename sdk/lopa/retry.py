"""When to try again: exponential backoff with full jitter, bounded in attempts and time.

Source: gRPC's retry policy (proposal A6) and "Exponential Backoff And Jitter" (M. Brooker, AWS Architecture Blog, 2015).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from lopa.errors import DeadlineExceeded, RemoteError, ResourceExhausted, Unavailable
from lopa.protocol.flow import Flow, Signal, wait

Result = TypeVar("Result")


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long. Delays are in seconds."""

    attempts: int = 4
    """Calls in all, the first one included; 1 never retries."""
    initial: float = 0.1
    """Upper bound of the first delay."""
    maximum: float = 5.0
    """Upper bound of any delay, the server's own wish included."""
    multiplier: float = 2.0
    """Each upper bound is this many times the one before."""

    def delay(self, failures: int, error: RemoteError, rng: random.Random) -> float | None:
        """Seconds to wait after the `failures`-th failure (from 1), or None to give up.

        The server's RetryInfo is a lower bound, with jitter on top; a wish beyond `maximum` is not waited for.
        """
        if failures >= self.attempts or not is_retryable(error):
            return None
        wish = error.retry_after or 0.0
        return None if wish > self.maximum else wish + self.backoff(failures, rng)

    def backoff(self, failures: int, rng: random.Random) -> float:
        """Full jitter: uniform between 0 and initial * multiplier^(failures - 1), at most `maximum`."""
        exponent = min(failures - 1, 64)
        return rng.uniform(0.0, min(self.maximum, self.initial * self.multiplier**exponent))


def is_retryable(error: RemoteError) -> bool:
    """Whether the same request can succeed later: no connection, or a full queue that says when to come back."""
    return isinstance(error, Unavailable) or (isinstance(error, ResourceExhausted) and error.retry_after is not None)


class Patience:
    """Goes on trying through outages, for a bounded time: a server that restarts is waited for."""

    def __init__(self, seconds: float, rng: random.Random, policy: RetryPolicy | None = None, *, stop: Signal | None = None) -> None:
        """seconds: how long one outage may last; 0 never waits. stop: ends a wait at once."""
        self._seconds = seconds
        self._rng = rng
        self._policy = policy or RetryPolicy()
        self._stop = stop

    def keep_trying(self, call: Callable[[], Flow[Result]], on_wait: Callable[[RemoteError], None]) -> Flow[Result]:
        """Call until it succeeds. `on_wait` is told each failure that is waited out.

        Raises:
            RemoteError: one that waiting can't help, or the last one when patience is over.
        """
        began, failures = 0.0, 0
        while True:
            try:
                return (yield from call())
            except RemoteError as error:
                failures += 1
                began = began if failures > 1 else time.monotonic()
                delay = (error.retry_after or 0.0) + self._policy.backoff(failures, self._rng)
                can_help = is_retryable(error) or isinstance(error, DeadlineExceeded)
                if not can_help or time.monotonic() + delay - began > self._seconds:
                    raise
                on_wait(error)
            yield from wait(delay, self._stop)
