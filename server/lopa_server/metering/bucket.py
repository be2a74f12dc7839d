"""A token bucket: a rate with a burst, on a monotonic clock, so that changes of the wall clock neither fill nor freeze it."""

from __future__ import annotations

import time
from collections.abc import Callable


class TokenBucket:
    """Fills at `rate` a second up to `burst`. Taking more than there is puts it in debt, which has to fill up first."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst = rate, burst
        self._clock = clock
        self._level, self._at = burst, clock()

    @property
    def level(self) -> float:
        """What is in it now; negative: in debt."""
        now = self._clock()
        self._level = min(self.burst, self._level + (now - self._at) * self.rate)
        self._at = now
        return self._level

    def wait(self, amount: float) -> float:
        """Seconds until so much may be taken; 0.0: now. What is larger than the burst may go when the bucket is full."""
        missing = min(amount, self.burst) - self.level
        return max(0.0, missing / self.rate)

    def take(self, amount: float) -> None:
        """Take so much, whether it is there or not."""
        self._level = self.level - amount
