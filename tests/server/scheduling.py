"""Requests and pairs for the scheduling policy, and what a worker does with its steps."""

from __future__ import annotations

from lopa_server.engine.base import InputSequence
from lopa_server.engine.content import Content
from lopa_server.engine.pair_queue import PairCost, PairKind, PairStep
from lopa_server.engine.scheduler import Scheduler, Step, TokenStep
from lopa_server.engine.sequences import SequenceState

GRADIENTS, SCORE = PairKind.GRADIENTS, PairKind.SCORE
SIZE = 8


def content(ids: tuple[int, ...], salt: bytes = b"") -> Content:
    return Content(salt, InputSequence((), None, ids), SIZE)


def sequence(name: str, length: int, *, tokens: tuple[int, ...] | None = None, salt: bytes = b"", tenant: str = "") -> SequenceState:
    """A request of `length` positions of its own, or of the given ones."""
    ids = tuple(hash((name, place)) % 50_000 for place in range(length)) if tokens is None else tokens
    return SequenceState(name, content(ids, salt), tenant, max_tokens=1000)


def costs(*positions: int, targets: int = 1) -> list[PairCost]:
    return [PairCost(length, targets) for length in positions]


def prefixed(shared: tuple[int, ...], rest: int, salt: bytes = b"") -> PairCost:
    return PairCost(len(shared) + rest, 1, len(shared), content(shared, salt))


def pair_step(scheduler: Scheduler) -> PairStep:
    step = scheduler.next_step()
    assert isinstance(step, PairStep)
    return step


def named(step: PairStep) -> set[tuple[str, int]]:
    return {(row.job, row.index) for row in step.rows}


def compute(scheduler: Scheduler, step: Step | None) -> None:
    """What the worker does with a step: rows that sample get a token, prefixes of pairs are given back."""
    if isinstance(step, PairStep):
        scheduler.end_pairs(step)
    elif step is not None:
        for row in step.rows:
            if row.samples:
                row.sequence.content.append(len(row.sequence.content))


def token_step(scheduler: Scheduler) -> dict[str, tuple[int, int, bool]]:
    """Take a step of streams and compute it: (start, count, samples) by request."""
    step = scheduler.next_step()
    assert isinstance(step, TokenStep)
    compute(scheduler, step)
    return {row.sequence.id: (row.start, row.count, row.samples) for row in step.rows}
