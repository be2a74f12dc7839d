"""Stopping, pausing and bounding a tuning run from outside: what a phone needs that gets hot, or loses its Wi-Fi."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from lopa.errors import TuningError
from lopa.protocol.flow import Flow, Signal, wait
from lopa.values import Traffic
from lopa.wire.tensors import ITEM_BYTES

if TYPE_CHECKING:
    from lopa.tuning import TuneConfig

Stopped = Literal["cancelled", "max_steps", "max_seconds", "max_bytes"]
"""Why a run ended before its time. It goes on with the next call."""
_ENVELOPE = 512
"""Bytes of a pair's message and of its answer beyond text and tensors, generously."""


class TuneControl:
    """The app's hand on a running `tune`, from any thread or from a callback.

    >>> control = lopa.TuneControl()
    >>> me.tune(examples, steps=9, control=control, on_step=lambda now: control.cancel()).steps
    1
    >>> me.tune(examples, steps=9).resumed_from
    1
    """

    def __init__(self) -> None:
        self.stop = Signal()
        self._go = Signal()
        self._go.set()

    def pause(self) -> None:
        """Hold the run after the step that is under way: from a callback, the one after the step that it was told of.

        The server keeps nothing for the run meanwhile.
        """
        self._go.clear()

    def resume(self) -> None:
        """Go on."""
        self._go.set()

    def cancel(self) -> None:
        """End the run now: a call under way is given up, every finished step is on disk, and the next `tune` goes on there."""
        self.stop.set()
        self._go.set()

    @property
    def paused(self) -> bool:
        return not self._go.is_set

    @property
    def cancelled(self) -> bool:
        return self.stop.is_set

    def hold(self, tell: Callable[[str], None]) -> Flow[None]:
        """Wait while paused."""
        if self.paused:
            tell("paused")
        while self.paused:
            yield from wait(None, self._go)


class Budget:
    """What one call of `tune` may use. A step that would go beyond is not begun; only retries of a failing network can."""

    def __init__(self, config: TuneConfig, traffic: Callable[[], Traffic]) -> None:
        self._config, self._traffic = config, traffic
        self._began = time.monotonic()
        self._step_began = self._began
        self._longest = 0.0
        self._start = traffic()
        self._steps = 0

    def step_begins(self) -> None:
        self._step_began = time.monotonic()

    def step_done(self) -> None:
        self._steps += 1
        self._longest = max(self._longest, time.monotonic() - self._step_began)

    def reached(self, next_bytes: Callable[[], int]) -> Stopped | None:
        """The bound that the next step would break, if it brings so many bytes and lasts as long as the longest so far.

        Raises:
            TuningError: the next step alone would break `max_bytes`, so that no call could take it.
        """
        config, used = self._config, self._traffic() - self._start
        if config.max_steps is not None and self._steps >= config.max_steps:
            return "max_steps"
        if config.max_seconds is not None and time.monotonic() - self._began + self._longest > config.max_seconds:
            return "max_seconds"
        if config.max_bytes is not None:
            needed = next_bytes()
            if needed > config.max_bytes:
                raise TuningError(f"max_bytes is {config.max_bytes}, and the next step alone may bring {needed} bytes")
            if used.sent_bytes + used.received_bytes + needed > config.max_bytes:
                return "max_bytes"
        return None


def pair_bytes(texts: Sequence[object], numbers: int, rows: int, dtypes: Sequence[int]) -> int:
    """Bytes of a pair both ways, at most: its texts, and (m, d) tensors of `numbers` values in `rows` rows, one for each dtype."""
    words = sum(len(text.encode()) if isinstance(text, str) else 5 * len(text) for text in texts if isinstance(text, str | list | tuple))
    return words + sum(numbers * ITEM_BYTES[dtype] + 4 * rows for dtype in dtypes) + _ENVELOPE
