"""The engine's time, shared between steps of streams and micro-batches of pairs. Policy only: it is told what things took."""

from __future__ import annotations

from lopa_server.engine.pair_queue import PairKind

SMOOTHING = 0.2
"""Weight of the newest step in a running mean."""
OUTLIER = 2.0
"""A step counts as so many times the usual one at most: one that reads prompts says little about the next."""
PART_OF_STEP = 0.5
"""What a micro-batch can't be interrupted in takes this part of a step of streams at most, unless it is a single pair."""


class TimeSharing:
    """While both kinds are waiting, streams get their share of the time, measured."""

    def __init__(self, share: float) -> None:
        """share: of streams, above 0, below 1."""
        self._ratio = share / (1 - share)
        """Seconds of streams for each second of pairs."""
        self._credit = 0.0
        """Seconds that streams may still take before pairs have their turn."""
        self._step_seconds = 0.0
        """How long a step of streams takes: a running mean."""
        self._part_pace: dict[PairKind, float] = {}
        """Seconds a position that the longest part of a micro-batch takes, likewise; by kind, once measured."""
        self._owed = False
        """Streams have a step to come before pairs go on."""

    @property
    def pairs_turn(self) -> bool:
        """Streams have had their share."""
        return self._credit <= 0

    def pauses(self, seconds: float) -> bool:
        """Whether a micro-batch that has had the device for so long since its last pause lets streams go first now."""
        return seconds >= self._step_seconds / self._ratio

    def pause(self, seconds: float) -> None:
        """A micro-batch pauses after so long: streams are owed their share of the time, and one step at least."""
        self._credit, self._owed = seconds * self._ratio, True

    def goes_on_without_pairs(self) -> bool:
        """Whether streams have another step before a micro-batch that pauses goes on; what they are owed is given with it."""
        owed, self._owed = self._owed, False
        return owed or self._credit > self._step_seconds / 2

    def pairs_took(self, kind: PairKind, seconds: float, part: float, positions: int) -> None:
        """A micro-batch is over; the seconds since its last pause, and of the longest part in which it couldn't pause."""
        self._credit = seconds * self._ratio
        if positions:
            pace = part / positions
            self._part_pace[kind] = _mean(self._part_pace.get(kind, pace), pace)

    def streams_took(self, seconds: float) -> None:
        """A step of streams is over."""
        self._credit -= seconds
        usual = self._step_seconds or seconds
        self._step_seconds = _mean(usual, min(seconds, OUTLIER * usual))

    def positions_beside_streams(self, most: int) -> int:
        """Positions of pairs whose parts take about half as long as one step of streams; the slower kind's pace counts. `most`: while
        nothing is measured."""
        slowest = max(self._part_pace.values(), default=0.0)
        return int(self._step_seconds * PART_OF_STEP / slowest) if slowest else most


def _mean(mean: float, value: float) -> float:
    """A running mean that follows changes within some ten steps."""
    return mean + SMOOTHING * (value - mean)
