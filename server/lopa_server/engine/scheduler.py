"""What the engine computes next. Policy only: it sees lengths, names and block numbers, never a tensor.

Two kinds of step:

- **tokens**: one forward pass for streams. Every decoding row reads one position; what is left of the step's budget
  reads pieces of prompts, so that a long prompt never stops the others. Beside a tenant that fills the batch, others' prompts go
  first (see `crowding`).
- **pairs**: one bounded micro-batch of likelihoods (see `pair_queue`).

Blocks are handed out as sequences grow. When the pool is empty, the request that came last gives all its blocks back and
is computed again later: admitted work never fails for want of room.

Interactive work goes first but no work starves (see `time_sharing`): when both kinds are waiting, interactive work gets
`interactive_share` of the time, measured. A micro-batch pauses for them: after about a step's time of its own they have steps of
theirs, in the middle of it. While streams run it is kept so small that at the measured pace none of the parts between which it
can pause takes longer than half a step of theirs, or it holds one pair.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lopa_server.engine.block_manager import BlockManager
from lopa_server.engine.crowding import Crowding
from lopa_server.engine.fair_queue import FairQueue
from lopa_server.engine.pair_queue import PairCost, PairKind, PairQueue, PairStep
from lopa_server.engine.sequences import SequenceState
from lopa_server.engine.time_sharing import TimeSharing
from lopa_server.engine.waiting import WaitingQueue, WaitingRequest

SMALLEST_STEP = 64
"""Positions. A device without memory for so few has none for anything."""


@dataclass(frozen=True)
class SchedulerLimits:
    """Bounds on one step and on what is in memory."""

    max_batch: int = 32
    """Streams that read or decode at the same time."""
    block_size: int = 8
    """Positions in one block of the pool: small, so that little of a sequence's last block is empty."""
    kv_positions: int = 1 << 20
    """Positions of the pool."""
    step_positions: int = 512
    """Positions in one step of streams."""
    pair_positions: int = 2048
    """Positions in one micro-batch of pairs, padding included; one pair alone may exceed it."""
    pair_targets: int = 1 << 14
    """Target tokens in one micro-batch: each costs a row of logits."""
    similar: float = 0.75
    """Pairs share a micro-batch when the shorter has at least this part of the longer's length."""
    interactive_share: float = 0.6
    """Interactive work's part of the time while pairs are waiting too; above 0, below 1. What a stream waits longer for its
    next token where pairs can pause: one step of its own times (1 - share) / share."""
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    """A tenant's share relative to others'; 1 for those who aren't listed."""

    def weight(self, tenant: str) -> float:
        """The tenant's share."""
        return self.tenant_weights.get(tenant, 1.0)

    @property
    def blocks(self) -> int:
        """Blocks of the pool."""
        return max(1, self.kv_positions // self.block_size)


@dataclass(frozen=True)
class TokenRow:
    """Positions start..start+count of one stream; `samples`: they are its last ones, and a token is chosen after them."""

    sequence: SequenceState
    start: int
    count: int
    samples: bool


@dataclass(frozen=True)
class TokenStep:
    """One forward pass for streams."""

    rows: tuple[TokenRow, ...]


Step = TokenStep | PairStep


class Scheduler:
    """Keeps what is waiting and running, and names the next step."""

    def __init__(self, limits: SchedulerLimits, waiting: WaitingQueue | None = None) -> None:
        self._limits = limits
        self.blocks = BlockManager(limits.blocks, limits.block_size)
        self._queue: WaitingQueue = FairQueue(limits.weight) if waiting is None else waiting
        self._known: dict[str, SequenceState] = {}
        """Everything that is not finished, by id."""
        self._running: dict[str, SequenceState] = {}
        """In order of admission."""
        self._preempted: deque[SequenceState] = deque()
        """They go before everybody who waits, the one that came first in front."""
        self._pairs = PairQueue(positions=limits.pair_positions, targets=limits.pair_targets, similar=limits.similar, weight=limits.weight)
        self._time = TimeSharing(limits.interactive_share)
        self._crowding = Crowding(limits.max_batch)
        self._holding = False
        """A micro-batch under way holds blocks of the pool."""
        self.preemptions = 0
        self.hit_tokens = 0
        """Prompt positions that the prefix cache spared."""

    @property
    def waiting(self) -> int:
        """Generate requests without a place in the batch."""
        return len(self._queue) + len(self._preempted)

    @property
    def running(self) -> int:
        """Rows in the batch, reading or decoding."""
        return len(self._running)

    @property
    def pairs_waiting(self) -> int:
        return len(self._pairs)

    @property
    def pairs_whole(self) -> int:
        """Pairs with a prefix that were computed whole, since the pool had no room for it."""
        return self._pairs.whole

    @property
    def kv_positions(self) -> int:
        """Positions that hold something in the blocks used."""
        size = self._limits.block_size
        return self.blocks.used * size - sum(len(row.table) * size - row.computed for row in self._running.values())

    def add(self, sequence: SequenceState) -> None:
        """A request that has just arrived."""
        self._known[sequence.id] = sequence
        self._queue.push(WaitingRequest(sequence.id, sequence.tenant, len(sequence.content), sequence.max_tokens))

    def add_pairs(self, job_id: str, kind: PairKind, costs: Sequence[PairCost], *, tenant: str = "", low_priority: bool = False) -> None:
        """A call's pairs; they are computed in any order and grouping. low_priority: whenever there are no others."""
        self._pairs.add(job_id, kind, costs, tenant=tenant, low_priority=low_priority)

    def remove(self, name: str, *, reliable: bool = True) -> None:
        """Forget a request or call in any state; its blocks are free at once. Unknown ids are ignored.

        reliable: whether what it computed may serve others as a prefix.
        """
        self._pairs.remove(name)
        sequence = self._known.pop(name, None)
        if sequence is None:
            return
        if not reliable:
            self.blocks.withdraw(sequence.table)
        sequence.leave(self.blocks)
        if self._running.pop(name, None) is None:
            self._queue.remove(name)
            self._preempted = deque(other for other in self._preempted if other is not sequence)

    def next_step(self) -> Step | None:
        """The next step, or None when there is nothing to do. What it names counts as computed."""
        interactive = bool(self._known)
        if self._pairs and (not interactive or self._time.pairs_turn):
            beside = self._time.positions_beside_streams(self._limits.pair_positions) if self._running else None
            step = self._pairs.next_step(self.blocks, beside)
            self._holding = any(row.table for row in step.rows)
            return step
        return self._token_step() if interactive else None

    def pauses_pairs(self, seconds: float) -> bool:
        """Whether a micro-batch that has had the device for so long since its last pause lets streams go first now."""
        return bool(self._known) and self._time.pauses(seconds)

    def pause_pairs(self, seconds: float) -> None:
        """A micro-batch pauses after so long: streams are owed their share of the time, and one step at least."""
        self._time.pause(seconds)

    def next_in_pause(self) -> TokenStep | None:
        """The next step of streams while a micro-batch pauses, or None when it goes on."""
        if not self._known or not self._time.goes_on_without_pairs():
            return None
        step = self._token_step()
        return step if step.rows else None

    def shrink(self, step: Step) -> None:
        """The device had no memory for this step: halve the positions of later ones of its kind, down to SMALLEST_STEP."""
        limits = self._limits
        if isinstance(step, TokenStep):
            self._limits = replace(limits, step_positions=max(min(SMALLEST_STEP, limits.step_positions), limits.step_positions // 2))
        else:
            self._limits = replace(limits, pair_positions=max(min(SMALLEST_STEP, limits.pair_positions), limits.pair_positions // 2))
            self._pairs.shrink(self._limits.pair_positions)

    def record(self, step: Step, seconds: float, part: float | None = None) -> None:
        """Tell how long a step took: the basis of sharing time.

        Of pairs, since their last pause, and the longest part in which they could not pause; by default all of it.
        """
        if isinstance(step, PairStep):
            self._time.pairs_took(step.kind, seconds, seconds if part is None else part, step.positions)
        else:
            self._time.streams_took(seconds)

    def end_pairs(self, step: PairStep, *, reliable: bool = True) -> None:
        """A micro-batch is over: its prefixes' blocks are free again. reliable: as in `remove`."""
        self._holding = False
        for row in step.rows:
            if not reliable:
                self.blocks.withdraw(row.table[row.cached // self._limits.block_size :])
            self.blocks.release(row.table)

    def _token_step(self) -> TokenStep:
        self._make_way()
        self._crowding.look(self._running.values(), (self._known[name].tenant for name in self._queue.candidates()))
        crowd = self._crowding.tenant
        if crowd is not None and self._crowding.gives_way(self._newcomer(crowd), self._running.values()):
            rows = self._rows(crowd, 0)
            if rows:
                return TokenStep(rows)
        return TokenStep(self._rows(crowd, self._crowding.allowance(self._limits.step_positions)))

    def _newcomer(self, crowd: str) -> SequenceState | None:
        """Whose prompt is read first, with a place in the batch now, if its tenant has had less than the crowd."""
        first = self._next_reader({}, admit=True)
        return first if first is not None and self._rank(first) < self._queue.rank(crowd) else None

    def _rows(self, crowd: str | None, allowance: int) -> tuple[TokenRow, ...]:
        """Every row that decodes, then pieces of prompts as the budget allows.

        allowance: positions of the crowd's prompts; 0: nothing of the crowd at all.
        """
        rows: dict[str, TokenRow] = {}
        budget = max(self._limits.step_positions, len(self._running) + 1)
        preemptions = self.preemptions
        decoding = deque(row for row in self._running.values() if row.left == 1 and (allowance or row.tenant != crowd))
        while budget:
            if decoding:
                sequence = decoding.popleft()
            else:
                found = self._next_reader(rows, admit=self.preemptions == preemptions, without=None if allowance else crowd)
                if found is None:
                    break
                sequence = found
            count = min(sequence.left, budget)
            if sequence.tenant == crowd and sequence.left > 1:
                count = min(count, allowance)
                allowance -= count
            if sequence.id in self._running and self._make_room(sequence, sequence.computed + count, rows):
                budget -= count
                rows[sequence.id] = self._row(sequence, count)
        return tuple(rows.values())

    def _next_reader(self, rows: Mapping[str, TokenRow], *, admit: bool, without: str | None = None) -> SequenceState | None:
        """Whose prompt is read next in this step: of those in the batch and, if they may be admitted, those who wait, the one whose
        tenant has had least. without: a tenant that is left out."""
        reading = (row for row in self._running.values() if row.left > 1 and row.id not in rows and row.tenant != without)
        reader = min(reading, key=self._rank, default=None)
        return (self._admit(reader, without) if admit else None) or reader

    def _rank(self, sequence: SequenceState) -> tuple[float, int]:
        return self._queue.rank(sequence.tenant)

    def _make_way(self) -> None:
        """In a full batch, a tenant that has had least and has no place gets one, of the tenant that has most of them.

        Others of its requests wait their turn: who has a place loses it to nobody who has one too, so that nobody is driven to and fro.
        """
        names = self._queue.candidates() if len(self._running) >= self._limits.max_batch else ()
        if not names:
            return
        waiting = self._known[names[0]]
        places = Counter(sequence.tenant for sequence in self._running.values())
        most = max(places, key=lambda tenant: places[tenant] / self._limits.weight(tenant))
        if not places[waiting.tenant] and places[most] > 1 and self._rank(waiting) < self._queue.rank(most):
            self._preempt(next(sequence for sequence in reversed(self._running.values()) if sequence.tenant == most))

    def _row(self, sequence: SequenceState, count: int) -> TokenRow:
        row = TokenRow(sequence, sequence.computed, count, samples=count == sequence.left)
        self._queue.charge(sequence.tenant, prompt_tokens=sequence.unpaid(count), generated_tokens=int(row.samples))
        sequence.advance(self.blocks, count)
        return row

    def _make_room(self, sequence: SequenceState, end: int, rows: dict[str, TokenRow]) -> bool:
        """Blocks for a running sequence up to `end`, if need be from those who came last. False: it lost its own."""
        missing = sequence.missing(self.blocks, end)
        while missing > self.blocks.free:
            victim = next(other for other in reversed(self._running.values()) if other.id not in rows)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.table += self.blocks.take(missing)
        return True

    def _preempt(self, sequence: SequenceState) -> None:
        self.preemptions += 1
        sequence.leave(self.blocks)
        del self._running[sequence.id]
        self._preempted.appendleft(sequence)

    def _admit(self, reader: SequenceState | None = None, without: str | None = None) -> SequenceState | None:
        """Give the next waiting request that fits a place; none, if a `reader` in the batch goes before it.

        Those who lost their blocks go before everybody whose tenant has not had less, and nobody passes them when they don't fit.
        """
        if len(self._running) >= self._limits.max_batch:
            return None
        names = list(self._queue.candidates())
        back = min(self._preempted, key=self._rank, default=None)
        if back is not None:
            names = [*(name for name in names if self._rank(self._known[name]) < self._rank(back)), back.id]
        name = next((name for name in names if self._known[name].tenant != without and self._fits(self._known[name])), None)
        if name is None or (reader is not None and self._rank(reader) <= self._rank(self._known[name])):
            return None
        sequence = self._known[name]
        if sequence is back:
            self._preempted.remove(sequence)
        else:
            self._queue.take(name)
        self._running[name] = sequence
        self.hit_tokens += sequence.adopt(self.blocks)
        return sequence

    def _fits(self, sequence: SequenceState) -> bool:
        """Whether there is room for all that is known of it, beside one more block for each row."""
        found = self.blocks.find(sequence.content.each_key(len(sequence.content) - 1))
        needed = sequence.missing(self.blocks, len(sequence.content)) - len(found) + self.blocks.idle(found)
        promised = sum(row.missing(self.blocks, len(row.content)) + 1 for row in self._running.values())
        alone = not self._running and not self._holding
        return alone or needed + promised <= self.blocks.free
