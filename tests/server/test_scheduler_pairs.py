"""The scheduling policy for pairs, alone and beside streams, without a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lopa_server.engine.pair_queue import PairStep
from lopa_server.engine.scheduler import Scheduler, SchedulerLimits, Step, TokenStep

from tests.server.scheduling import GRADIENTS, SCORE, SIZE, compute, costs, named, pair_step, prefixed, sequence, token_step


def test_pairs_of_several_calls_share_a_micro_batch_by_length() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=400, similar=0.75))
    scheduler.add_pairs("a", GRADIENTS, costs(100, 30))
    scheduler.add_pairs("b", GRADIENTS, costs(95, 32, 80))
    scheduler.add_pairs("c", SCORE, costs(100))
    assert named(pair_step(scheduler)) == {("a", 0), ("b", 0), ("b", 2)}
    assert named(pair_step(scheduler)) == {("a", 1), ("b", 1)}
    assert named(pair_step(scheduler)) == {("c", 0)}
    assert scheduler.next_step() is None


def test_a_call_with_many_pairs_does_not_hold_up_the_others() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=100))
    scheduler.add_pairs("many", GRADIENTS, costs(*[100] * 50))
    scheduler.add_pairs("one", GRADIENTS, costs(100))
    assert ("one", 0) in [pair for _ in range(2) for pair in named(pair_step(scheduler))]


def test_more_pairs_than_are_looked_at_all_get_their_turn() -> None:
    """Calls as large as the service allows, and somebody else's behind them."""
    scheduler = Scheduler(SchedulerLimits(pair_positions=64 * 64))
    for number in range(6):
        scheduler.add_pairs(f"large{number}", GRADIENTS, costs(*[64] * 512), tenant="flood")
    pair_step(scheduler)
    scheduler.add_pairs("small", GRADIENTS, costs(200, 64), tenant="other")
    assert ("small", 0) in named(pair_step(scheduler))
    steps = []
    while (step := scheduler.next_step()) is not None:
        assert isinstance(step, PairStep)
        steps.append(named(step))
    assert sum(map(len, steps)) == 6 * 512 - 64 + 1


def test_target_tokens_bound_a_micro_batch() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_targets=10))
    scheduler.add_pairs("a", GRADIENTS, costs(10, 10, 10, targets=6))
    assert [len(named(pair_step(scheduler))) for _ in range(3)] == [1, 1, 1]


def test_interactive_work_gets_its_share_of_the_time_and_no_more() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=10, interactive_share=0.5))
    scheduler.add(sequence("r", 1))
    scheduler.add_pairs("job", GRADIENTS, costs(*[10] * 1000))
    spent = {PairStep: 0.0, TokenStep: 0.0}
    waits, wait = [], 0.0
    for _ in range(600):
        step: Step | None = scheduler.next_step()
        assert step is not None
        seconds = 0.3 if isinstance(step, PairStep) else 0.01
        spent[type(step)] += seconds
        compute(scheduler, step)
        scheduler.record(step, seconds)
        wait = wait + seconds if isinstance(step, PairStep) else 0.0
        waits.append(wait)
    assert 0.45 < spent[TokenStep] / sum(spent.values()) < 0.55
    assert max(waits) < 0.31, "a row waited for more than one micro-batch"


def test_pairs_have_all_the_time_when_nobody_else_wants_it() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=10))
    scheduler.add_pairs("job", GRADIENTS, costs(10, 10))
    done: set[tuple[str, int]] = set()
    for _ in range(2):
        step = pair_step(scheduler)
        done |= named(step)
        scheduler.record(step, 1.0)
    assert done == {("job", 0), ("job", 1)}


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(50, 400))
def test_every_pair_is_computed_once_within_the_budget(lengths: list[int], budget: int) -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=budget))
    half = len(lengths) // 2
    jobs = {"a": lengths[:half], "b": lengths[half:]}
    for name, part in jobs.items():
        if part:
            scheduler.add_pairs(name, GRADIENTS, costs(*part))
    seen = []
    while (step := scheduler.next_step()) is not None:
        assert isinstance(step, PairStep)
        longest = max(jobs[name][index] for name, index in named(step))
        assert len(named(step)) == 1 or longest * len(named(step)) <= budget
        seen += named(step)
    assert sorted(seen) == sorted((name, index) for name, part in jobs.items() for index in range(len(part)))


@pytest.mark.parametrize(("token_seconds", "pairs"), [(0.01, 1), (0.1, 1), (1.0, 5)])
def test_beside_streams_no_part_of_a_micro_batch_takes_longer_than_half_a_step_of_theirs(token_seconds: float, pairs: int) -> None:
    """At the measured pace of 0.1 s a pair in the longest part; alone, pairs fill the whole micro-batch."""
    scheduler = Scheduler(SchedulerLimits(pair_positions=640))
    scheduler.add_pairs("flood", GRADIENTS, costs(*[64] * 40))
    alone = pair_step(scheduler)
    assert len(alone.rows) == 10
    scheduler.record(alone, 2.0, 1.0)
    scheduler.add(sequence("stream", 5))
    while not isinstance(step := scheduler.next_step(), PairStep):
        compute(scheduler, step)
        assert step is not None
        scheduler.record(step, token_seconds)
    assert len(step.rows) == pairs
    scheduler.remove("stream")
    assert len(pair_step(scheduler).rows) == 10


def test_a_micro_batch_pauses_after_a_step_s_time_for_one_step_at_least() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=640, interactive_share=0.5))
    scheduler.add_pairs("flood", GRADIENTS, costs(*[64] * 40))
    pair_step(scheduler)
    assert not scheduler.pauses_pairs(100.0), "nobody else wants the time"
    scheduler.add(sequence("stream", 5))
    assert scheduler.pauses_pairs(0.0), "how long a step takes is not known yet"
    scheduler.pause_pairs(0.0)
    step = scheduler.next_in_pause()
    assert step is not None
    compute(scheduler, step)
    scheduler.record(step, 0.1)
    assert scheduler.next_in_pause() is None
    assert not scheduler.pauses_pairs(0.09)
    assert scheduler.pauses_pairs(0.1)
    scheduler.pause_pairs(0.3)
    steps = 0
    while (step := scheduler.next_in_pause()) is not None:
        compute(scheduler, step)
        scheduler.record(step, 0.1)
        steps += 1
    assert steps == 3
    scheduler.remove("stream")
    scheduler.pause_pairs(1.0)
    assert scheduler.next_in_pause() is None


def test_streams_wait_for_blocks_that_a_paused_micro_batch_holds() -> None:
    scheduler, shared = Scheduler(SchedulerLimits(kv_positions=6 * SIZE)), tuple(range(4 * SIZE))
    scheduler.add_pairs("call", GRADIENTS, [prefixed(shared, 6)])
    step = pair_step(scheduler)
    scheduler.add(sequence("stream", 4 * SIZE))
    scheduler.pause_pairs(1.0)
    assert scheduler.next_in_pause() is None
    scheduler.end_pairs(step)
    scheduler.record(step, 0.0)
    assert isinstance(scheduler.next_step(), TokenStep)


def test_a_pair_prefix_is_computed_once_and_its_last_block_may_be_half_full() -> None:
    scheduler, shared = Scheduler(SchedulerLimits()), tuple(range(21))
    costs = [prefixed(shared, 6), prefixed(shared, 7), prefixed(shared, 6, salt=b"other"), prefixed((*shared, 9), 6)]
    scheduler.add_pairs("a", GRADIENTS, costs)
    step = pair_step(scheduler)
    assert {row.index: (row.cached, row.prefix) for row in step.rows} == {0: (0, 21), 1: (21, 21), 2: (0, 21), 3: (16, 22)}
    scheduler.end_pairs(step)
    assert scheduler.blocks.used == 0
    scheduler.add_pairs("again", GRADIENTS, costs)
    step = pair_step(scheduler)
    assert all(row.cached == row.prefix for row in step.rows)
    scheduler.end_pairs(step, reliable=False)


def test_a_pair_without_room_for_its_prefix_is_computed_whole() -> None:
    scheduler = Scheduler(SchedulerLimits(kv_positions=4 * SIZE))
    scheduler.add(sequence("r", 3 * SIZE))
    token_step(scheduler)
    scheduler.add_pairs("a", GRADIENTS, [prefixed(tuple(range(20)), 5)] * 3)
    assert [(row.prefix, row.table) for row in pair_step(scheduler).rows] == [(0, ())]
    assert scheduler.pairs_whole == 1
    scheduler.remove("r")
    assert [row.prefix for row in pair_step(scheduler).rows] == [20, 20]


def test_prefixes_to_compute_count_against_the_budget_and_cached_ones_do_not() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=160))
    costs = [prefixed(tuple(range(start, start + 40)), 10) for start in range(0, 400, 40)]
    for sizes in ([3, 3, 3, 1], [10]):
        scheduler.add_pairs("a", GRADIENTS, costs)
        for size in sizes:
            step = pair_step(scheduler)
            assert len(step.rows) == size
            scheduler.end_pairs(step)


def test_a_tenants_flood_of_pairs_delays_nobody_elses() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=100))
    for number in range(20):
        scheduler.add_pairs(f"flood{number}", GRADIENTS, costs(*[100] * 5), tenant="flood")
    for _ in range(3):
        pair_step(scheduler)
    scheduler.add_pairs("other", GRADIENTS, costs(100, 100), tenant="other")
    steps = [named(pair_step(scheduler)) for _ in range(4)]
    assert sum(("other", index) in step for index in range(2) for step in steps) == 2


def test_pairs_of_low_priority_wait_for_the_others() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=200))
    scheduler.add_pairs("low", GRADIENTS, costs(100, 100), low_priority=True)
    scheduler.add_pairs("normal", GRADIENTS, costs(*[100] * 4))
    steps = [{name for name, _ in named(pair_step(scheduler))} for _ in range(3)]
    assert steps == [{"normal"}, {"normal"}, {"low"}]
