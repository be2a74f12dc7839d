"""The scheduling policy under random load, without a model."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from lopa_server.engine.pair_queue import PairStep
from lopa_server.engine.scheduler import Scheduler, SchedulerLimits

from tests.server.scheduling import GRADIENTS, SCORE, SIZE, compute, prefixed, sequence


class _Load:
    """Random requests that come, grow, end, give up and are taken off, over a pool that is far too small for them."""

    def __init__(self, requests: int) -> None:
        self.random = random.Random(1)
        self.scheduler = Scheduler(SchedulerLimits(max_batch=48, kv_positions=60 * SIZE, step_positions=128, pair_positions=256))
        self.todo, self.ends, self.outcomes = requests, {}, Counter()
        self.prompts = [tuple(self.random.randrange(1000) for _ in range(self.random.randrange(8, 60))) for _ in range(40)]
        self.number = 0

    def arrive(self) -> None:
        self.number += 1
        name, shared = f"r{self.number}", self.random.choice(self.prompts)
        if self.random.random() < 0.1:
            costs = [prefixed(shared, self.random.randrange(2, 30)) for _ in range(self.random.randrange(1, 4))]
            self.scheduler.add_pairs(name, self.random.choice([GRADIENTS, SCORE]), costs)
            self.ends[name] = len(costs)
            return
        own = tuple(self.random.randrange(1000) for _ in range(self.random.randrange(1, 12)))
        salt = bytes([self.random.randrange(3)])
        self.scheduler.add(sequence(name, 0, tokens=(*shared[: self.random.randrange(len(shared))], *own), salt=salt))
        self.ends[name] = self.random.randrange(1, 60)

    def leave(self, name: str, outcome: str) -> None:
        self.scheduler.remove(name, reliable=outcome != "failed")
        del self.ends[name]
        self.outcomes[outcome] += 1

    def step(self) -> None:
        step = self.scheduler.next_step()
        assert step is not None, "work is waiting, but there is no step"
        self.scheduler.record(step, self.random.random())
        compute(self.scheduler, step)
        if self.random.random() < 0.01:
            for name in {row.job if isinstance(step, PairStep) else row.sequence.id for row in step.rows}:
                if name in self.ends:
                    self.leave(name, "failed")
            return
        done = [row.job for row in step.rows] if isinstance(step, PairStep) else [row.sequence.id for row in step.rows if row.samples]
        for name in done:
            if name in self.ends:
                self.ends[name] -= 1
                if not self.ends[name]:
                    self.leave(name, "done")

    def check(self) -> None:
        blocks, running = self.scheduler.blocks, self.scheduler._running.values()
        assert blocks.used + blocks.free == blocks.total
        assert blocks.used == len({block for row in running for block in row.table})


@pytest.mark.parametrize("requests", [4_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_block_leaks_and_no_request_is_stuck(requests: int) -> None:
    load = _Load(requests)
    while load.number < requests or load.ends:
        while load.number < requests and len(load.ends) < 120:
            load.arrive()
        load.step()
        if load.ends and load.random.random() < 0.1:
            load.leave(load.random.choice(list(load.ends)), "cancelled")
        if load.random.random() < 0.05:
            load.check()
    load.check()
    assert sum(load.outcomes.values()) == requests and min(load.outcomes.values()) > requests / 100
    assert load.scheduler.preemptions > requests / 1000 and load.scheduler.hit_tokens > 0
    assert load.scheduler.blocks.used == 0 == load.scheduler.waiting == load.scheduler.running == load.scheduler.pairs_waiting
