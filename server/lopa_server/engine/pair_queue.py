"""Pairs of Score and PromptGradients that wait, and which of them are computed together. Policy only: no tensor.

What stands in front of a pair's soft rows depends on nobody's factors. Its keys and values are computed without a
gradient, once, in blocks of the pool, where the prefix cache keeps them: the next step of the same tuning run then pays
for the soft rows and what follows them only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import TypeVar

from lopa_server.engine.block_manager import BlockManager
from lopa_server.engine.content import Content, blocks_for

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


@dataclass
class _Job:
    kind: PairKind
    costs: Sequence[PairCost]
    pending: dict[int, None]


class PairQueue:
    """Calls with the pairs that are still to be computed."""

    def __init__(self, *, positions: int, targets: int, similar: float) -> None:
        """Bounds as in `SchedulerLimits`: pair_positions, pair_targets, similar."""
        self._positions, self._targets, self._similar = positions, targets, similar
        self._jobs: dict[str, _Job] = {}
        self.whole = 0
        """Pairs with a prefix that were computed whole, since the pool had no room for it."""

    def __len__(self) -> int:
        return sum(len(job.pending) for job in self._jobs.values())

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def add(self, job_id: str, kind: PairKind, costs: Sequence[PairCost]) -> None:
        """A call's pairs; they are computed in any order and grouping."""
        self._jobs[job_id] = _Job(kind, costs, dict.fromkeys(range(len(costs))))

    def remove(self, job_id: str) -> None:
        """Forget a call; unknown ids are ignored."""
        self._jobs.pop(job_id, None)

    def next_step(self, blocks: BlockManager) -> PairStep:
        """The oldest call's next pair, and pairs of similar length from every call of its kind. There must be one."""
        first_id, first = next(iter(self._jobs.items()))
        jobs = {name: job for name, job in self._jobs.items() if job.kind is first.kind}
        waiting = (((name, index), job.costs[index].rest) for name, job in jobs.items() for index in job.pending)
        anchor = (first_id, next(iter(first.pending)))
        chosen = similar_lengths(islice(waiting, CANDIDATES), anchor, self._positions, self._similar)
        rows = self._with_prefixes(self._within_targets(chosen), blocks)
        for row in rows:
            job = self._jobs[row.job]
            del job.pending[row.index]
            if not job.pending:
                del self._jobs[row.job]
        self._rotate(first_id)
        return PairStep(first.kind, tuple(rows))

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

    def _with_prefixes(self, pairs: Sequence[tuple[str, int]], blocks: BlockManager) -> list[PairRow]:
        """Blocks for the prefixes, as far as the pool and the budget of positions go; at least one pair."""
        rows: list[PairRow] = []
        left = self._positions - sum(self._jobs[name].costs[index].rest for name, index in pairs)
        for name, index in pairs:
            cost = self._jobs[name].costs[index]
            if cost.content is None or not cost.prefix:
                rows.append(PairRow(name, index))
                continue
            row = _with_prefix(name, index, cost, cost.content, blocks, left if rows else None)
            if row is None and rows:
                break
            if row is None:
                self.whole += 1
                return [PairRow(name, index)]
            left -= row.prefix - row.cached
            rows.append(row)
        return rows

    def _rotate(self, job_id: str) -> None:
        """Let the next job lead the next micro-batch, so that a call with many pairs doesn't hold up the others."""
        job = self._jobs.pop(job_id, None)
        if job is not None:
            self._jobs[job_id] = job


def _with_prefix(name: str, index: int, cost: PairCost, content: Content, blocks: BlockManager, left: int | None) -> PairRow | None:
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
    return PairRow(name, index, tuple(table), cost.prefix, cached)


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
