"""What the engine computes next. Policy only: it sees lengths and names, never a tensor, and is tested without a model.

Three kinds of step:

- **prefill**: read a piece of some prompts; a long prompt is read in several pieces, so that decoding goes on between them.
- **decode**: one token for every row of the batch.
- **pairs**: one bounded micro-batch of likelihoods, with or without gradients, of similar length, from any number of calls.

Interactive work (prefill, decode) goes first but no work starves: when both kinds are waiting, interactive work gets
`interactive_share` of the time, measured, and a single row never waits longer than one micro-batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

Name = TypeVar("Name")


@dataclass(frozen=True)
class SchedulerLimits:
    """Bounds on one step and on what is in memory."""

    max_batch: int = 32
    """Rows that read or decode at the same time."""
    kv_positions: int = 1 << 20
    """Positions of the key-value cache: rows times the longest row's reservation stays within it."""
    prefill_positions: int = 2048
    """Positions in one prefill step, padding included."""
    pair_positions: int = 2048
    """Positions in one micro-batch of pairs, padding included; one pair alone may exceed it."""
    pair_targets: int = 1 << 14
    """Target tokens in one micro-batch: each costs a row of logits."""
    similar: float = 0.75
    """Pairs share a micro-batch when the shorter has at least this part of the longer's length."""
    interactive_share: float = 0.5
    """Interactive work's part of the time while pairs are waiting too; above 0, below 1."""


class PairKind(Enum):
    SCORE = "score"
    GRADIENTS = "gradients"


@dataclass(frozen=True)
class PairCost:
    """What a pair needs: positions in all, and targets among them."""

    positions: int
    targets: int


@dataclass(frozen=True)
class Chunk:
    """Positions start..start+count of a request's input; `last`: then it starts to decode."""

    id: str
    start: int
    count: int
    last: bool


@dataclass(frozen=True)
class PrefillStep:
    chunks: tuple[Chunk, ...]
    admitted: tuple[str, ...]
    """Requests that got their place in the batch with this step, in order."""


@dataclass(frozen=True)
class DecodeStep:
    """One token for every decoding row."""


@dataclass(frozen=True)
class PairStep:
    """pairs: (job id, index in the job)."""

    kind: PairKind
    pairs: tuple[tuple[str, int], ...]


Step = PrefillStep | DecodeStep | PairStep


@dataclass
class _Stream:
    length: int
    reserve: int
    read: int = 0


@dataclass
class _Job:
    kind: PairKind
    costs: Sequence[PairCost]
    pending: deque[int] = field(default_factory=deque)


class Scheduler:
    """Keeps what is waiting and running, and names the next step."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._waiting: dict[str, _Stream] = {}
        self._reading: dict[str, _Stream] = {}
        self._decoding: dict[str, _Stream] = {}
        self._jobs: dict[str, _Job] = {}
        self._interactive_credit = 0.0
        """Seconds that interactive work may still take before pairs have their turn."""
        self._prefilled_last = False

    @property
    def waiting(self) -> int:
        """Generate requests without a place in the batch."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows in the batch, reading or decoding."""
        return len(self._reading) + len(self._decoding)

    @property
    def pairs_waiting(self) -> int:
        return sum(len(job.pending) for job in self._jobs.values())

    def add(self, request_id: str, length: int, reserve: int) -> None:
        """A request of `length` input positions that may grow to `reserve` positions."""
        self._waiting[request_id] = _Stream(length, reserve)

    def add_pairs(self, job_id: str, kind: PairKind, costs: Sequence[PairCost]) -> None:
        """A call's pairs; they are computed in any order and grouping."""
        self._jobs[job_id] = _Job(kind, costs, deque(range(len(costs))))

    def remove(self, request_id: str) -> None:
        """Forget a request or job in any state; unknown ids are ignored."""
        for table in (self._waiting, self._reading, self._decoding, self._jobs):
            table.pop(request_id, None)

    def next_step(self) -> Step | None:
        """The next step, or None when there is nothing to do. What it names counts as taken."""
        prefill_possible = bool(self._reading) or self._admissible()
        interactive = prefill_possible or bool(self._decoding)
        if self._jobs and (not interactive or self._interactive_credit <= 0):
            return self._pair_step()
        if prefill_possible and not (self._prefilled_last and self._decoding):
            self._prefilled_last = True
            return self._prefill_step()
        self._prefilled_last = False
        return DecodeStep() if self._decoding else None

    def record(self, step: Step, seconds: float) -> None:
        """Tell how long a step took: the basis of sharing time."""
        if isinstance(step, PairStep):
            share = self._limits.interactive_share
            self._interactive_credit = seconds * share / (1 - share)
        else:
            self._interactive_credit -= seconds

    def _admissible(self) -> bool:
        """Whether the first waiting request fits beside what is running."""
        if not self._waiting:
            return False
        first = next(iter(self._waiting.values()))
        return self._fits(first, self._running_streams())

    def _running_streams(self) -> list[_Stream]:
        return [*self._reading.values(), *self._decoding.values()]

    def _fits(self, stream: _Stream, running: Sequence[_Stream]) -> bool:
        if not running:
            return True
        rows = len(running) + 1
        longest = max(stream.reserve, *(other.reserve for other in running))
        return rows <= self._limits.max_batch and rows * longest <= self._limits.kv_positions

    def _admit(self) -> list[str]:
        """Give waiting requests a place in order of arrival, as long as they fit."""
        admitted, running = [], self._running_streams()
        for request_id, stream in list(self._waiting.items()):
            if not self._fits(stream, running):
                break
            running.append(stream)
            admitted.append(request_id)
            self._reading[request_id] = self._waiting.pop(request_id)
        return admitted

    def _prefill_step(self) -> PrefillStep:
        admitted = self._admit()
        left = {name: stream.length - stream.read for name, stream in self._reading.items()}
        budget = self._limits.prefill_positions
        anchor = next(iter(left))
        if left[anchor] >= budget:
            chosen = [anchor]
        else:
            fresh = self._reading[anchor].read == 0
            fellows = [name for name in left if (self._reading[name].read == 0) == fresh]
            chosen = _similar([(name, left[name]) for name in fellows], anchor, budget, self._limits.similar)
        chunks = []
        for name in chosen:
            stream, count = self._reading[name], min(left[name], budget)
            chunks.append(Chunk(name, stream.read, count, last=count == left[name]))
            stream.read += count
            if chunks[-1].last:
                self._decoding[name] = self._reading.pop(name)
        return PrefillStep(tuple(chunks), tuple(admitted))

    def _pair_step(self) -> PairStep:
        """The oldest job's next pair, and pairs of similar length from every job of its kind."""
        first_id, first = next(iter(self._jobs.items()))
        jobs = {name: job for name, job in self._jobs.items() if job.kind is first.kind}
        lengths = [((name, index), job.costs[index].positions) for name, job in jobs.items() for index in job.pending]
        chosen = _similar(lengths, (first_id, first.pending[0]), self._limits.pair_positions, self._limits.similar)
        chosen = self._within_targets(chosen)
        for name, index in chosen:
            jobs[name].pending.remove(index)
            if not jobs[name].pending:
                del self._jobs[name]
        self._rotate(first_id)
        return PairStep(first.kind, tuple(chosen))

    def _within_targets(self, pairs: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """The first pairs whose target tokens stay within the limit; at least one."""
        total = 0
        kept: list[tuple[str, int]] = []
        for name, index in pairs:
            total += self._jobs[name].costs[index].targets
            if kept and total > self._limits.pair_targets:
                break
            kept.append((name, index))
        return kept

    def _rotate(self, job_id: str) -> None:
        """Let the next job lead the next micro-batch, so that a call with many pairs doesn't hold up the others."""
        job = self._jobs.pop(job_id, None)
        if job is not None:
            self._jobs[job_id] = job


def _similar(lengths: Iterable[tuple[Name, int]], anchor: Name, budget: int, similar: float) -> list[Name]:
    """The anchor and the entries closest to its length, while count times the longest stays within the budget."""
    table = dict(lengths)
    size = table[anchor]
    chosen, longest, shortest = [anchor], size, size
    others = sorted((name for name in table if name != anchor), key=lambda name: abs(table[name] - size))
    for name in others:
        longest, shortest = max(longest, table[name]), min(shortest, table[name])
        if longest * (len(chosen) + 1) > budget or shortest < similar * longest:
            break
        chosen.append(name)
    return chosen
