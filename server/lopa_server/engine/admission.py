"""Whether a request may wait at all: a queue bounded in entries and tokens, shared by tenants, and deadlines that can still be met.

A refusal comes at once and says when to come back; waiting for nothing costs everybody. Those who are refused get turns, one
behind the other at the measured pace, so that they don't all come back for the one place that is free by then. Policy only: no
tensor, no clock of its own. Times are seconds on one monotonic clock.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from lopa_server.engine.base import DeadlineTooShort, QueueFull

HALF_LIFE = 10.0
"""Busy seconds after which a measurement counts half."""
LEAST_MEASURED = 5.0
"""Busy seconds that must have been seen before anything is estimated."""
STALE = 60.0
"""Seconds without anything to do, or without any news at all (a process that was stopped), after which nothing counts as measured. A
pessimistic estimate would refuse everything, and so never be corrected."""
READING = 0.05
"""Work of reading a token, where writing one is 1. Taken low, so that estimates err towards admitting."""
SLACK = 2.0
"""So many times the time that is left must be needed before a request is refused: estimates are no more exact than that."""
UNKNOWN_WAIT = 1.0
"""Seconds to come back after while nothing is measured."""
OVERBOOKED = 2.0
"""So many of those who are refused are told to come for each place: not all of them do."""
FURTHEST = 10.0
"""Turns are given at most so many times as far ahead as all that waits takes."""
JITTER = 0.25
"""Part of a wait by which it is made longer at random, so that those who were told the same don't come together."""


@dataclass(frozen=True)
class AdmissionLimits:
    """Bounds on what waits. What is being computed is not counted."""

    queue: str
    """Its name, for errors."""
    places: int
    """Entries that are computed at the same time; 0: one call at a time, as for pairs."""
    max_entries: int
    max_tokens: int
    """Tokens to read and to write at most, of all that waits."""
    share: float = 4.0
    """A tenant may take this many times what is still free, of entries and of tokens: 4 leaves a fifth of the queue to others
    however many one sends."""


@dataclass(frozen=True)
class Arrival:
    """What asks to be admitted."""

    tenant: str
    entries: int
    prompt_tokens: int
    text_tokens: int
    """Tokens that may be written at most."""
    deadline: float | None = None

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.text_tokens


@dataclass
class _Live:
    arrival: Arrival
    waiting: bool = True
    written: int = 0


@dataclass
class _Waiting:
    """Of a tenant."""

    entries: int = 0
    tokens: int = 0
    work: float = 0.0
    """If all that may be written is written."""


class Pace:
    """How much work a place gets done in a second, lately: decaying sums over busy time. Unit of work: writing a token."""

    def __init__(self) -> None:
        self.work = 0.0
        self.seconds = 0.0
        """Of all busy places together."""
        self._time: float | None = None
        self._idle = 0.0
        """Seconds since a place was busy."""

    def pass_time(self, now: float, busy: int) -> None:
        """Until now, so many places were busy."""
        elapsed = 0.0 if self._time is None else max(0.0, now - self._time)
        self._time = now
        self._idle = 0.0 if busy else self._idle + elapsed
        if max(elapsed, self._idle) > STALE:
            self.work = self.seconds = self._idle = 0.0
        elif busy:
            decay = 0.5 ** (elapsed / HALF_LIFE)
            self.work *= decay
            self.seconds = self.seconds * decay + busy * elapsed

    @property
    def rate(self) -> float | None:
        """Work a second and place; None until enough was seen."""
        return self.work / self.seconds if self.seconds >= LEAST_MEASURED and self.work else None


class Admission:
    """Everything between its arrival and its end. Used from one thread."""

    def __init__(self, limits: AdmissionLimits, weights: Mapping[str, float] | None = None, rng: random.Random | None = None) -> None:
        """weights: as in `FairQueue`; 1 for those who aren't listed. rng: for the jitter."""
        self._limits = limits
        self._weights = weights or {}
        self._live: dict[str, _Live] = {}
        self._entries = 0
        self._waiting: dict[str, _Waiting] = {}
        """By tenant."""
        self._all = _Waiting()
        """Their sum."""
        self._turns: dict[str, float] = {}
        """When the one of a tenant who was refused last is to come back."""
        self._look_at = 0.0
        """When turns that are over are forgotten next."""
        self._rng = random.Random() if rng is None else rng
        self._pace = Pace()
        self._written, self._allowed = 0.0, 0.0
        """Tokens written and allowed, of requests that have ended, the last ones counting most."""

    def enter(self, name: str, arrival: Arrival, now: float) -> None:
        """Let it wait.

        Raises:
            QueueFull: too much waits, or too much of this tenant. DeadlineTooShort: it would not be done in time.
        """
        self._pace.pass_time(now, self._busy)
        self._check_room(arrival, now)
        self._check_deadline(arrival, now)
        self._live[name] = _Live(arrival)
        self._entries += arrival.entries
        self._move(arrival, 1)

    def check_room(self, tenant: str, now: float) -> None:
        """Whether the smallest request of a tenant could wait; nothing is entered. Raises QueueFull."""
        self._pace.pass_time(now, self._busy)
        self._check_room(Arrival(tenant, 1, 1, 0), now)

    def progress(self, name: str, tokens: int, now: float) -> None:
        """It has a place, its prompt is read, and so many more tokens were written."""
        self._pace.pass_time(now, self._busy)
        live = self._live[name]
        if live.waiting:
            live.waiting = False
            self._move(live.arrival, -1)
            self._pace.work += READING * live.arrival.prompt_tokens
        live.written += tokens
        self._pace.work += tokens

    def leave(self, name: str, now: float, *, finished: bool) -> None:
        """It has ended: finished, or given up; unknown names are ignored."""
        self._pace.pass_time(now, self._busy)
        live = self._live.pop(name, None)
        if live is None:
            return
        self._entries -= live.arrival.entries
        if live.waiting:
            self._move(live.arrival, -1)
        elif finished:
            self._written = 0.95 * self._written + live.written
            self._allowed = 0.95 * self._allowed + live.arrival.text_tokens

    @property
    def waiting_tokens(self) -> int:
        """Tokens to read and to write, of all that waits."""
        return self._all.tokens

    def expected_wait(self, arrival: Arrival) -> float | None:
        """Seconds until it gets a place; None while nothing is measured.

        Tenants are served by weight, so of what others have waiting at most as much as its own turn takes goes first.
        """
        if self._entries + arrival.entries <= self._limits.places:
            return 0.0
        before = self._of(arrival.tenant).work
        turn = (before + self._work(arrival)) / self._weight(arrival.tenant)
        others = (min(one.work, turn * self._weight(tenant)) for tenant, one in self._waiting.items() if tenant != arrival.tenant)
        return self._seconds_for(self._written_part * (before + sum(others)))

    @property
    def _busy(self) -> int:
        return min(self._entries, max(1, self._limits.places)) if self._live else 0

    @property
    def _written_part(self) -> float:
        """How much of the work allowed is really done. Nothing is known at first, and then nothing is held against anybody."""
        return self._written / self._allowed if self._allowed else float(not self._limits.places)

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def _work(self, arrival: Arrival) -> float:
        return READING * arrival.prompt_tokens + arrival.text_tokens

    def _of(self, tenant: str) -> _Waiting:
        return self._waiting.get(tenant) or _Waiting()

    def _move(self, arrival: Arrival, sign: int) -> None:
        own = self._waiting.setdefault(arrival.tenant, _Waiting())
        for waiting in (own, self._all):
            waiting.entries += sign * arrival.entries
            waiting.tokens += sign * arrival.tokens
            waiting.work += sign * self._work(arrival)
        if not own.entries:
            del self._waiting[arrival.tenant]
        if not self._waiting:
            self._all = _Waiting()

    def _check_room(self, arrival: Arrival, now: float) -> None:
        limits, own = self._limits, self._of(arrival.tenant)
        over = self._entries + arrival.entries - limits.places
        waits = max(0, self._entries - limits.places)
        if over > limits.max_entries and self._live:
            raise self._full("", waits, limits.max_entries, over - limits.max_entries, arrival, now)
        if over <= 0 or not self._all.tokens:
            return
        mine, allowed = over - (self._all.entries - own.entries), int(limits.share * (limits.max_entries - waits))
        if mine > allowed:
            raise self._full(" (of one tenant)", own.entries, allowed, mine - allowed, arrival, now)
        entries_a_token = self._all.entries / self._all.tokens
        excess = self._all.tokens + arrival.tokens - limits.max_tokens
        if excess > 0:
            raise self._full(" (tokens)", self._all.tokens, limits.max_tokens, excess * entries_a_token, arrival, now)
        allowed = int(limits.share * (limits.max_tokens - self._all.tokens))
        excess = own.tokens + arrival.tokens - allowed
        if excess > 0:
            raise self._full(" (tokens of one tenant)", own.tokens, allowed, excess * entries_a_token, arrival, now)

    def _full(self, what: str, waiting: int, limit: int, excess: float, arrival: Arrival, now: float) -> QueueFull:
        """excess: entries of average size that must have gone first."""
        average = self._seconds_for(self._written_part * self._all.work / max(1, self._all.entries))
        seconds = UNKNOWN_WAIT if average is None else self._turn(arrival, excess, average, now)
        return QueueFull(f"{self._limits.queue}{what}", waiting, limit, seconds * (1 + JITTER * self._rng.random()))

    def _turn(self, arrival: Arrival, excess: float, average: float, now: float) -> float:
        """Seconds until there is room again, behind those of the tenant who were refused before and are still to come.

        average: seconds that an entry takes. Tenants have turns of their own, and the places that get free between them.
        """
        if now >= self._look_at:
            self._look_at = now + 1.0
            self._turns = {tenant: turn for tenant, turn in self._turns.items() if turn > now}
        first = now + excess * average
        furthest = max(first, now + FURTHEST * average * self._all.entries)
        turn = min(max(first, self._turns.get(arrival.tenant, 0.0)), furthest)
        crowd = len(self._turns.keys() | {arrival.tenant})
        self._turns[arrival.tenant] = turn + crowd * arrival.entries * average / OVERBOOKED
        return turn - now

    def _seconds_for(self, work: float) -> float | None:
        """How long all places together take; None while nothing is measured."""
        return None if self._pace.rate is None else work / (self._pace.rate * max(1, self._limits.places))

    def _check_deadline(self, arrival: Arrival, now: float) -> None:
        if arrival.deadline is None or self._pace.rate is None:
            return
        wait = self.expected_wait(arrival) or 0.0
        own = self._written_part * self._work(arrival) / self._pace.rate
        left = arrival.deadline - now
        if wait + own > SLACK * left:
            raise DeadlineTooShort(wait + own, left, retry_after=wait if own <= SLACK * left else None)
