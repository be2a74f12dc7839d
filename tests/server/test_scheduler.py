"""The scheduling policy, without a model."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lopa_server.engine.base import InputSequence
from lopa_server.engine.content import Content
from lopa_server.engine.pair_queue import PairCost, PairKind, PairStep
from lopa_server.engine.scheduler import Scheduler, SchedulerLimits, Step, TokenStep
from lopa_server.engine.sequences import SequenceState

GRADIENTS, SCORE = PairKind.GRADIENTS, PairKind.SCORE
SIZE = 8


def _content(ids: tuple[int, ...], salt: bytes = b"") -> Content:
    return Content(salt, InputSequence((), None, ids), SIZE)


def _sequence(name: str, length: int, *, tokens: tuple[int, ...] | None = None, salt: bytes = b"", tenant: str = "") -> SequenceState:
    """A request of `length` positions of its own, or of the given ones."""
    ids = tuple(hash((name, place)) % 50_000 for place in range(length)) if tokens is None else tokens
    return SequenceState(name, _content(ids, salt), tenant, max_tokens=1000)


def _costs(*positions: int, targets: int = 1) -> list[PairCost]:
    return [PairCost(length, targets) for length in positions]


def _prefixed(shared: tuple[int, ...], rest: int, salt: bytes = b"") -> PairCost:
    return PairCost(len(shared) + rest, 1, len(shared), _content(shared, salt))


def _pair_step(scheduler: Scheduler) -> PairStep:
    step = scheduler.next_step()
    assert isinstance(step, PairStep)
    return step


def _named(step: PairStep) -> set[tuple[str, int]]:
    return {(row.job, row.index) for row in step.rows}


def _compute(scheduler: Scheduler, step: Step | None) -> None:
    """What the worker does with a step: rows that sample get a token, prefixes of pairs are given back."""
    if isinstance(step, PairStep):
        scheduler.end_pairs(step)
    elif step is not None:
        for row in step.rows:
            if row.samples:
                row.sequence.content.append(len(row.sequence.content))


def _token_step(scheduler: Scheduler) -> dict[str, tuple[int, int, bool]]:
    """Take a step of streams and compute it: (start, count, samples) by request."""
    step = scheduler.next_step()
    assert isinstance(step, TokenStep)
    _compute(scheduler, step)
    return {row.sequence.id: (row.start, row.count, row.samples) for row in step.rows}


def test_nothing_to_do() -> None:
    assert Scheduler(SchedulerLimits()).next_step() is None


def test_requests_join_in_order_and_at_most_a_batch() -> None:
    scheduler = Scheduler(SchedulerLimits(max_batch=2))
    for name in "abc":
        scheduler.add(_sequence(name, 10))
    assert _token_step(scheduler) == {"a": (0, 10, True), "b": (0, 10, True)}
    assert _token_step(scheduler) == {"a": (10, 1, True), "b": (10, 1, True)}
    scheduler.remove("a")
    assert _token_step(scheduler) == {"b": (11, 1, True), "c": (0, 10, True)}
    assert (scheduler.waiting, scheduler.running) == (0, 2)


def test_a_long_prompt_is_read_in_pieces_beside_those_who_decode() -> None:
    scheduler = Scheduler(SchedulerLimits(step_positions=16))
    scheduler.add(_sequence("short", 4))
    assert _token_step(scheduler) == {"short": (0, 4, True)}
    scheduler.add(_sequence("long", 40))
    steps = [_token_step(scheduler) for _ in range(3)]
    assert [step["long"] for step in steps] == [(0, 15, False), (15, 15, False), (30, 10, True)]
    assert [step["short"] for step in steps] == [(4, 1, True), (5, 1, True), (6, 1, True)]


def test_a_batch_larger_than_the_budget_still_decodes_in_every_step() -> None:
    scheduler = Scheduler(SchedulerLimits(step_positions=3))
    for number in range(4):
        scheduler.add(_sequence(f"r{number}", 1))
    for _ in range(4):
        _token_step(scheduler)
    assert len(_token_step(scheduler)) == 4


def test_a_full_pool_preempts_the_last_comer_who_is_the_first_to_return() -> None:
    scheduler = Scheduler(SchedulerLimits(kv_positions=8 * SIZE))
    for name in "ab":
        scheduler.add(_sequence(name, 3 * SIZE))
    assert set(_token_step(scheduler)) == {"a", "b"}
    seen = [set(_token_step(scheduler)) for _ in range(2 * SIZE)]
    assert seen[0] == {"a", "b"} and seen[-1] == {"a"} and scheduler.preemptions == 1
    scheduler.add(_sequence("late", 1))
    assert set(_token_step(scheduler)) == {"a"}
    scheduler.remove("a")
    start, count, samples = _token_step(scheduler)["b"]
    assert samples and start + count == 4 * SIZE + 1, "what b had generated was lost"


def _flooded(limits: SchedulerLimits, *, length: int = 10, waiting: int = 20) -> Scheduler:
    """All places and much of the queue taken by one tenant."""
    scheduler = Scheduler(limits)
    for number in range(limits.max_batch + waiting):
        scheduler.add(_sequence(f"flood{number}", length, tenant="flood"))
    return scheduler


def test_a_flood_makes_way_for_a_tenant_without_a_place() -> None:
    scheduler = _flooded(SchedulerLimits(max_batch=4))
    for _ in range(3):
        assert len(_token_step(scheduler)) == 4
    scheduler.add(_sequence("light", 10, tenant="light"))
    scheduler.add(_sequence("light too", 10, tenant="light"))
    step = _token_step(scheduler)
    assert step["light"] == (0, 10, True), "at once, in a full batch"
    assert set(step) == {"flood0", "flood1", "flood2", "light"} and scheduler.preemptions == 1
    for _ in range(10):
        assert "light too" not in _token_step(scheduler)
    assert scheduler.preemptions == 1, "one place, not more than a turn"
    scheduler.remove("light")
    assert _token_step(scheduler)["light too"] == (0, 10, True), "it had less than the flood that gave its place"
    scheduler.remove("light too")
    start, count, samples = _token_step(scheduler)["flood3"]
    assert samples and start + count == 13, "nothing that it had generated was lost"


def test_nobody_makes_way_for_a_tenant_that_had_as_much() -> None:
    """Two floods share the batch by turns; neither takes places from the other."""
    scheduler = _flooded(SchedulerLimits(max_batch=2))
    for number in range(20):
        scheduler.add(_sequence(f"other{number}", 10, tenant="other"))
    for _ in range(200):
        for name, (_, _, samples) in _token_step(scheduler).items():
            if samples and len(scheduler._known[name].content) >= 18:
                scheduler.remove(name)
        if not scheduler.waiting:
            break
    assert scheduler.preemptions <= 1 and not scheduler.waiting


def test_who_had_least_reads_its_prompt_first() -> None:
    """Long prompts of a flood are being read and take whole steps; a short one of somebody else is not behind them."""
    scheduler = _flooded(SchedulerLimits(max_batch=8, step_positions=32), length=1000, waiting=0)
    scheduler.remove("flood7")
    for _ in range(3):
        _token_step(scheduler)
    scheduler.add(_sequence("light", 20, tenant="light"))
    step = _token_step(scheduler)
    assert step["light"] == (0, 20, True) and sum(count for _, count, _ in step.values()) == 32


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=30), st.integers(1, 4))
def test_whatever_makes_way_everything_is_computed_once_and_in_full(work: list[tuple[str, int, int]], places: int) -> None:
    """Requests of three tenants that arrive while others run: each is read to its end and gets its tokens, and all blocks come back."""
    scheduler = Scheduler(SchedulerLimits(max_batch=places, step_positions=16, kv_positions=40 * SIZE))
    wanted = {f"r{number}": (tenant, length, tokens) for number, (tenant, length, tokens) in enumerate(work)}
    arriving, written = list(wanted), Counter[str]()
    for _ in range(3000):
        if arriving:
            name = arriving.pop()
            scheduler.add(_sequence(name, wanted[name][1], tenant=wanted[name][0]))
        elif not scheduler.waiting and not scheduler.running:
            break
        for name, (_, _, samples) in _token_step(scheduler).items():
            written[name] += samples
            if written[name] == wanted[name][2]:
                scheduler.remove(name)
        assert scheduler.running <= places
    assert written == {name: tokens for name, (_, _, tokens) in wanted.items()}
    assert scheduler.blocks.used == 0


def test_a_shared_prefix_is_computed_once_but_never_across_salts() -> None:
    system, scheduler = tuple(range(40)), Scheduler(SchedulerLimits())
    scheduler.add(_sequence("a", 0, tokens=(*system, 1, 2)))
    scheduler.add(_sequence("same step", 0, tokens=(*system, 3)))
    scheduler.add(_sequence("all known", 0, tokens=system))
    scheduler.add(_sequence("stranger", 0, tokens=system, salt=b"other"))
    starts = {name: start for name, (start, _, _) in _token_step(scheduler).items()}
    assert starts == {"a": 0, "same step": 40, "all known": 32, "stranger": 0}
    assert scheduler.hit_tokens == 72
    scheduler.remove("a")
    scheduler.remove("same step", reliable=False)
    scheduler.add(_sequence("later", 0, tokens=(*system, 1)))
    assert _token_step(scheduler)["later"][0] == 0, "a prefix was shared although it can't be relied upon"


def test_pairs_of_several_calls_share_a_micro_batch_by_length() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=400, similar=0.75))
    scheduler.add_pairs("a", GRADIENTS, _costs(100, 30))
    scheduler.add_pairs("b", GRADIENTS, _costs(95, 32, 80))
    scheduler.add_pairs("c", SCORE, _costs(100))
    assert _named(_pair_step(scheduler)) == {("a", 0), ("b", 0), ("b", 2)}
    assert _named(_pair_step(scheduler)) == {("a", 1), ("b", 1)}
    assert _named(_pair_step(scheduler)) == {("c", 0)}
    assert scheduler.next_step() is None


def test_a_call_with_many_pairs_does_not_hold_up_the_others() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=100))
    scheduler.add_pairs("many", GRADIENTS, _costs(*[100] * 50))
    scheduler.add_pairs("one", GRADIENTS, _costs(100))
    assert ("one", 0) in [pair for _ in range(2) for pair in _named(_pair_step(scheduler))]


def test_target_tokens_bound_a_micro_batch() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_targets=10))
    scheduler.add_pairs("a", GRADIENTS, _costs(10, 10, 10, targets=6))
    assert [len(_named(_pair_step(scheduler))) for _ in range(3)] == [1, 1, 1]


def test_interactive_work_gets_its_share_of_the_time_and_no_more() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=10, interactive_share=0.5))
    scheduler.add(_sequence("r", 1))
    scheduler.add_pairs("job", GRADIENTS, _costs(*[10] * 1000))
    spent = {PairStep: 0.0, TokenStep: 0.0}
    waits, wait = [], 0.0
    for _ in range(600):
        step: Step | None = scheduler.next_step()
        assert step is not None
        seconds = 0.3 if isinstance(step, PairStep) else 0.01
        spent[type(step)] += seconds
        _compute(scheduler, step)
        scheduler.record(step, seconds)
        wait = wait + seconds if isinstance(step, PairStep) else 0.0
        waits.append(wait)
    assert 0.45 < spent[TokenStep] / sum(spent.values()) < 0.55
    assert max(waits) < 0.31, "a row waited for more than one micro-batch"


def test_pairs_have_all_the_time_when_nobody_else_wants_it() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=10))
    scheduler.add_pairs("job", GRADIENTS, _costs(10, 10))
    done: set[tuple[str, int]] = set()
    for _ in range(2):
        step = _pair_step(scheduler)
        done |= _named(step)
        scheduler.record(step, 1.0)
    assert done == {("job", 0), ("job", 1)}


def test_removed_work_is_never_named_again() -> None:
    scheduler = Scheduler(SchedulerLimits())
    scheduler.add(_sequence("r", 10))
    scheduler.add_pairs("job", GRADIENTS, _costs(10))
    scheduler.remove("r")
    scheduler.remove("job")
    scheduler.remove("never there")
    assert scheduler.next_step() is None


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(50, 400))
def test_every_pair_is_computed_once_within_the_budget(lengths: list[int], budget: int) -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=budget))
    half = len(lengths) // 2
    jobs = {"a": lengths[:half], "b": lengths[half:]}
    for name, part in jobs.items():
        if part:
            scheduler.add_pairs(name, GRADIENTS, _costs(*part))
    seen = []
    while (step := scheduler.next_step()) is not None:
        assert isinstance(step, PairStep)
        longest = max(jobs[name][index] for name, index in _named(step))
        assert len(_named(step)) == 1 or longest * len(_named(step)) <= budget
        seen += _named(step)
    assert sorted(seen) == sorted((name, index) for name, part in jobs.items() for index in range(len(part)))


@pytest.mark.parametrize(("token_seconds", "pairs"), [(0.01, 1), (0.1, 1), (1.0, 5)])
def test_beside_streams_no_part_of_a_micro_batch_takes_longer_than_half_a_step_of_theirs(token_seconds: float, pairs: int) -> None:
    """At the measured pace of 0.1 s a pair in the longest part; alone, pairs fill the whole micro-batch."""
    scheduler = Scheduler(SchedulerLimits(pair_positions=640))
    scheduler.add_pairs("flood", GRADIENTS, _costs(*[64] * 40))
    alone = _pair_step(scheduler)
    assert len(alone.rows) == 10
    scheduler.record(alone, 2.0, 1.0)
    scheduler.add(_sequence("stream", 5))
    while not isinstance(step := scheduler.next_step(), PairStep):
        _compute(scheduler, step)
        assert step is not None
        scheduler.record(step, token_seconds)
    assert len(step.rows) == pairs
    scheduler.remove("stream")
    assert len(_pair_step(scheduler).rows) == 10


def test_a_micro_batch_pauses_after_a_step_s_time_for_one_step_at_least() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=640, interactive_share=0.5))
    scheduler.add_pairs("flood", GRADIENTS, _costs(*[64] * 40))
    _pair_step(scheduler)
    assert not scheduler.pauses_pairs(100.0), "nobody else wants the time"
    scheduler.add(_sequence("stream", 5))
    assert scheduler.pauses_pairs(0.0), "how long a step takes is not known yet"
    scheduler.pause_pairs(0.0)
    step = scheduler.next_in_pause()
    assert step is not None
    _compute(scheduler, step)
    scheduler.record(step, 0.1)
    assert scheduler.next_in_pause() is None
    assert not scheduler.pauses_pairs(0.09)
    assert scheduler.pauses_pairs(0.1)
    scheduler.pause_pairs(0.3)
    steps = 0
    while (step := scheduler.next_in_pause()) is not None:
        _compute(scheduler, step)
        scheduler.record(step, 0.1)
        steps += 1
    assert steps == 3
    scheduler.remove("stream")
    scheduler.pause_pairs(1.0)
    assert scheduler.next_in_pause() is None


def test_one_long_step_hardly_changes_when_a_micro_batch_pauses() -> None:
    scheduler = Scheduler(SchedulerLimits(interactive_share=0.5))
    scheduler.add(_sequence("stream", 5))
    for seconds in (0.1, 0.1, 5.0):
        step = scheduler.next_step()
        assert step is not None
        _compute(scheduler, step)
        scheduler.record(step, seconds)
    assert not scheduler.pauses_pairs(0.1)
    assert scheduler.pauses_pairs(0.13)


def test_streams_wait_for_blocks_that_a_paused_micro_batch_holds() -> None:
    scheduler, shared = Scheduler(SchedulerLimits(kv_positions=6 * SIZE)), tuple(range(4 * SIZE))
    scheduler.add_pairs("call", GRADIENTS, [_prefixed(shared, 6)])
    step = _pair_step(scheduler)
    scheduler.add(_sequence("stream", 4 * SIZE))
    scheduler.pause_pairs(1.0)
    assert scheduler.next_in_pause() is None
    scheduler.end_pairs(step)
    scheduler.record(step, 0.0)
    assert isinstance(scheduler.next_step(), TokenStep)


def test_a_pair_prefix_is_computed_once_and_its_last_block_may_be_half_full() -> None:
    scheduler, shared = Scheduler(SchedulerLimits()), tuple(range(21))
    costs = [_prefixed(shared, 6), _prefixed(shared, 7), _prefixed(shared, 6, salt=b"other"), _prefixed((*shared, 9), 6)]
    scheduler.add_pairs("a", GRADIENTS, costs)
    step = _pair_step(scheduler)
    assert {row.index: (row.cached, row.prefix) for row in step.rows} == {0: (0, 21), 1: (21, 21), 2: (0, 21), 3: (16, 22)}
    scheduler.end_pairs(step)
    assert scheduler.blocks.used == 0
    scheduler.add_pairs("again", GRADIENTS, costs)
    step = _pair_step(scheduler)
    assert all(row.cached == row.prefix for row in step.rows)
    scheduler.end_pairs(step, reliable=False)


def test_a_pair_without_room_for_its_prefix_is_computed_whole() -> None:
    scheduler = Scheduler(SchedulerLimits(kv_positions=4 * SIZE))
    scheduler.add(_sequence("r", 3 * SIZE))
    _token_step(scheduler)
    scheduler.add_pairs("a", GRADIENTS, [_prefixed(tuple(range(20)), 5)] * 3)
    assert [(row.prefix, row.table) for row in _pair_step(scheduler).rows] == [(0, ())]
    assert scheduler.pairs_whole == 1
    scheduler.remove("r")
    assert [row.prefix for row in _pair_step(scheduler).rows] == [20, 20]


def test_prefixes_to_compute_count_against_the_budget_and_cached_ones_do_not() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=160))
    costs = [_prefixed(tuple(range(start, start + 40)), 10) for start in range(0, 400, 40)]
    for sizes in ([3, 3, 3, 1], [10]):
        scheduler.add_pairs("a", GRADIENTS, costs)
        for size in sizes:
            step = _pair_step(scheduler)
            assert len(step.rows) == size
            scheduler.end_pairs(step)


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
            costs = [_prefixed(shared, self.random.randrange(2, 30)) for _ in range(self.random.randrange(1, 4))]
            self.scheduler.add_pairs(name, self.random.choice([GRADIENTS, SCORE]), costs)
            self.ends[name] = len(costs)
            return
        own = tuple(self.random.randrange(1000) for _ in range(self.random.randrange(1, 12)))
        salt = bytes([self.random.randrange(3)])
        self.scheduler.add(_sequence(name, 0, tokens=(*shared[: self.random.randrange(len(shared))], *own), salt=salt))
        self.ends[name] = self.random.randrange(1, 60)

    def leave(self, name: str, outcome: str) -> None:
        self.scheduler.remove(name, reliable=outcome != "failed")
        del self.ends[name]
        self.outcomes[outcome] += 1

    def step(self) -> None:
        step = self.scheduler.next_step()
        assert step is not None, "work is waiting, but there is no step"
        self.scheduler.record(step, self.random.random())
        _compute(self.scheduler, step)
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


def test_a_tenants_flood_of_pairs_delays_nobody_elses() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=100))
    for number in range(20):
        scheduler.add_pairs(f"flood{number}", GRADIENTS, _costs(*[100] * 5), tenant="flood")
    for _ in range(3):
        _pair_step(scheduler)
    scheduler.add_pairs("other", GRADIENTS, _costs(100, 100), tenant="other")
    steps = [_named(_pair_step(scheduler)) for _ in range(4)]
    assert sum(("other", index) in step for index in range(2) for step in steps) == 2


def test_pairs_of_low_priority_wait_for_the_others() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=200))
    scheduler.add_pairs("low", GRADIENTS, _costs(100, 100), low_priority=True)
    scheduler.add_pairs("normal", GRADIENTS, _costs(*[100] * 4))
    steps = [{name for name, _ in _named(_pair_step(scheduler))} for _ in range(3)]
    assert steps == [{"normal"}, {"normal"}, {"low"}]


def test_a_request_that_does_not_fit_yet_is_passed_by_one_that_does() -> None:
    scheduler = Scheduler(SchedulerLimits(kv_positions=8 * SIZE))
    scheduler.add(_sequence("running", 2 * SIZE))
    scheduler.next_step()
    scheduler.add(dataclasses.replace(_sequence("large", 7 * SIZE), tenant="a"))
    scheduler.add(dataclasses.replace(_sequence("small", SIZE), tenant="b"))
    assert set(_token_step(scheduler)) == {"small"}
    scheduler.remove("running")
    scheduler.remove("small")
    assert set(_token_step(scheduler)) == {"large"}
