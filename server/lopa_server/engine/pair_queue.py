"""Pairs of Score and PromptGradients that wait, and which of them are computed together. Policy only: no tensor.

What stands in front of a pair's soft rows depends on nobody's factors. Its keys and values are computed without a
gradient, once, in blocks of the pool, where the prefix cache keeps them: the next step of the same tuning run then pays
for the soft rows and what follows them only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import TypeVar

from lopa_server.engine.block_manager import BlockManager
from lopa_server.engine.content import Content, blocks_for
from lopa_server.engine.fair_queue import FairQueue
from lopa_server.engine.waiting import WaitingRequest

Name = TypeVar("Name")
CANDIDATES = 2048
"""Waiting pairs that are looked at for one micro-batch."""


class PairKind(Enum):
    SCORE = "score"
    GRADIENTS = "gradients"


@dataclass(frozen=True)
class PairCost:
    """What a pair needs: positions in all, targets among them, and the prefix that can be computed apart."""

    positions: int
    targets: int
    prefix: int = 0
    content: Content | None = None
    """What stands in the prefix; None where there is none."""

    @property
    def rest(self) -> int:
        """Positions behind the prefix."""
        return self.positions - self.prefix


@dataclass(frozen=True)
class PairRow:
    """One pair of a micro-batch. Without a table it is computed whole."""

    job: str
    index: int
    table: tuple[int, ...] = ()
    """The prefix's blocks, held until the step is over."""
    prefix: int = 0
    """Positions in them."""
    cached: int = 0
    """Positions of them that are computed already."""


@dataclass(frozen=True)
class PairStep:
    """One bounded micro-batch of likelihoods, with or without gradients, from any number of calls."""

    kind: PairKind
    rows: tuple[PairRow, ...]
    positions: int = 0
    """Positions that it computes, padding not counted."""


@dataclass
class _Job:
    kind: PairKind
    costs: Sequence[PairCost]
    pending: dict[int, None]
    tenant: str
    low_priority: bool


class PairQueue:
    """Calls with the pairs that are still to be computed."""

    def __init__(self, *, positions: int, targets: int, similar: float, weight: Callable[[str], float] | None = None) -> None:
        """Bounds as in `SchedulerLimits`: pair_positions, pair_targets, similar. weight: as in `FairQueue`."""
        self._positions, self._targets, self._similar = positions, targets, similar
        self._jobs: dict[str, _Job] = {}
        self._turns = {low_priority: FairQueue(weight) for low_priority in (False, True)}
        """Whose call leads the next micro-batch; those of low priority when there are no others."""
        self.whole = 0
        """Pairs with a prefix that were computed whole, since the pool had no room for it."""

    def __len__(self) -> int:
        return sum(len(job.pending) for job in self._jobs.values())

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def shrink(self, positions: int) -> None:
        """Later micro-batches hold so many positions at most."""
        self._positions = positions

    def add(self, job_id: str, kind: PairKind, costs: Sequence[PairCost], *, tenant: str = "", low_priority: bool = False) -> None:
        """A call's pairs; they are computed in any order and grouping."""
        self._jobs[job_id] = _Job(kind, costs, dict.fromkeys(range(len(costs))), tenant, low_priority)
        self._turns[low_priority].push(WaitingRequest(job_id, tenant, sum(cost.positions for cost in costs), 0))

    def remove(self, job_id: str) -> None:
        """Forget a call; unknown ids are ignored."""
        job = self._jobs.pop(job_id, None)
        if job is not None:
            self._turns[job.low_priority].remove(job_id)

    def next_step(self, blocks: BlockManager, most: int | None = None) -> PairStep:
        """A pair of the call whose turn it is, and pairs of similar length from every call of its kind. There must be one.

        most: positions in this micro-batch, where that is less than what the queue's own limit allows; one pair alone may exceed it.
        Each tenant is charged for what it gets, so that the one that has had least leads the next micro-batch.
        """
        first_id = (self._turns[False].candidates() or self._turns[True].candidates())[0]
        first = self._jobs[first_id]
        alike = (first.kind, first.low_priority)
        others = {name: job for name, job in self._jobs.items() if (job.kind, job.low_priority) == alike}
        jobs = {first_id: first} | others  # its own pairs in front: they are among the candidates, however many wait
        waiting = (((name, index), job.costs[index].rest) for name, job in jobs.items() for index in job.pending)
        anchor = (first_id, next(iter(first.pending)))
        budget = self._positions if most is None else min(most, self._positions)
        chosen = similar_lengths(islice(waiting, CANDIDATES), anchor, budget, self._similar)
        rows = self._with_prefixes(self._within_targets(chosen), blocks, budget)
        computed = 0
        turns = self._turns[first.low_priority]
        for row in rows:
            job = self._jobs[row.job]
            fresh = job.costs[row.index].positions - row.cached
            computed += fresh
            turns.charge(job.tenant, prompt_tokens=fresh, generated_tokens=0)
            del job.pending[row.index]
            if not job.pending:
                self.remove(row.job)
        if first_id in self._jobs:
            turns.rotate(first_id)
        return PairStep(first.kind, tuple(rows), computed)

    def _within_targets(self, pairs: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """The first pairs whose target tokens stay within the limit; at least one."""
        total = 0
        kept: list[tuple[str, int]] = []
        for name, index in pairs:
            total += self._jobs[name].costs[index].targets
            if kept and total > self._targets:
                break
            kept.append((name, index))
        return kept

    def _with_prefixes(self, pairs: Sequence[tuple[str, int]], blocks: BlockManager, left: int) -> list[PairRow]:
        """Blocks for the prefixes, as far as the pool and the budget of positions go; at least one pair."""
        rows: list[PairRow] = []
        for name, index in pairs:
            cost = self._jobs[name].costs[index]
            left -= cost.rest
            bare = PairRow(name, index)
            row = bare if cost.content is None else _with_prefix(bare, cost, cost.content, blocks, left if rows else None)
            if row is None and not rows:
                self.whole += 1
                return [bare]
            if row is None:
                break
            left -= row.prefix - row.cached
            rows.append(row)
        return rows


def _with_prefix(row: PairRow, cost: PairCost, content: Content, blocks: BlockManager, left: int | None) -> PairRow | None:
    """Hold blocks for a prefix; None when the pool has no room, or more than `left` positions would have to be computed."""
    size = blocks.block_size
    keys = content.keys_to(cost.prefix)
    found = blocks.find(keys)
    cached = min(cost.prefix, len(found) * size)
    needed = blocks_for(cost.prefix, size) - len(found)
    if needed > blocks.free - blocks.idle(found) or (left is not None and cost.prefix - cached > left):
        return None
    blocks.share(found)
    table = [*found, *blocks.take(needed)]
    for block, key in zip(table[len(found) :], keys[len(found) :], strict=True):
        blocks.publish(block, key)
    return PairRow(row.job, row.index, tuple(table), cost.prefix, cached)


def similar_lengths(lengths: Iterable[tuple[Name, int]], anchor: Name, budget: int, similar: float) -> list[Name]:
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
