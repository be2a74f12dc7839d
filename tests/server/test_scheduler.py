"""The scheduling policy for requests, without a model."""

from __future__ import annotations

import dataclasses
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from lopa_server.engine.scheduler import Scheduler, SchedulerLimits

from tests.server.scheduling import GRADIENTS, SIZE, compute, costs, sequence, token_step


def test_nothing_to_do() -> None:
    assert Scheduler(SchedulerLimits()).next_step() is None


def test_requests_join_in_order_and_at_most_a_batch() -> None:
    scheduler = Scheduler(SchedulerLimits(max_batch=2))
    for name in "abc":
        scheduler.add(sequence(name, 10))
    assert token_step(scheduler) == {"a": (0, 10, True), "b": (0, 10, True)}
    assert token_step(scheduler) == {"a": (10, 1, True), "b": (10, 1, True)}
    scheduler.remove("a")
    assert token_step(scheduler) == {"b": (11, 1, True), "c": (0, 10, True)}
    assert (scheduler.waiting, scheduler.running) == (0, 2)


def test_a_long_prompt_is_read_in_pieces_beside_those_who_decode() -> None:
    scheduler = Scheduler(SchedulerLimits(step_positions=16))
    scheduler.add(sequence("short", 4))
    assert token_step(scheduler) == {"short": (0, 4, True)}
    scheduler.add(sequence("long", 40))
    steps = [token_step(scheduler) for _ in range(3)]
    assert [step["long"] for step in steps] == [(0, 15, False), (15, 15, False), (30, 10, True)]
    assert [step["short"] for step in steps] == [(4, 1, True), (5, 1, True), (6, 1, True)]


def test_a_batch_larger_than_the_budget_still_decodes_in_every_step() -> None:
    scheduler = Scheduler(SchedulerLimits(step_positions=3))
    for number in range(4):
        scheduler.add(sequence(f"r{number}", 1))
    for _ in range(4):
        token_step(scheduler)
    assert len(token_step(scheduler)) == 4


def test_a_full_pool_preempts_the_last_comer_who_is_the_first_to_return() -> None:
    scheduler = Scheduler(SchedulerLimits(kv_positions=8 * SIZE))
    for name in "ab":
        scheduler.add(sequence(name, 3 * SIZE))
    assert set(token_step(scheduler)) == {"a", "b"}
    seen = [set(token_step(scheduler)) for _ in range(2 * SIZE)]
    assert seen[0] == {"a", "b"} and seen[-1] == {"a"} and scheduler.preemptions == 1
    scheduler.add(sequence("late", 1))
    assert set(token_step(scheduler)) == {"a"}
    scheduler.remove("a")
    start, count, samples = token_step(scheduler)["b"]
    assert samples and start + count == 4 * SIZE + 1, "what b had generated was lost"


def _flooded(limits: SchedulerLimits, *, length: int = 10, waiting: int = 20) -> Scheduler:
    """All places and much of the queue taken by one tenant."""
    scheduler = Scheduler(limits)
    for number in range(limits.max_batch + waiting):
        scheduler.add(sequence(f"flood{number}", length, tenant="flood"))
    return scheduler


def test_a_flood_makes_way_for_a_tenant_without_a_place() -> None:
    scheduler = _flooded(SchedulerLimits(max_batch=4))
    for _ in range(3):
        assert len(token_step(scheduler)) == 4
    scheduler.add(sequence("light", 10, tenant="light"))
    scheduler.add(sequence("light too", 10, tenant="light"))
    step = token_step(scheduler)
    assert step == {"light": (0, 10, True)}, "at once, in a full batch"
    assert set(token_step(scheduler)) == {"flood0", "flood1", "flood2", "light"} and scheduler.preemptions == 1
    for _ in range(10):
        assert "light too" not in token_step(scheduler)
    assert scheduler.preemptions == 1, "one place, not more than a turn"
    scheduler.remove("light")
    assert token_step(scheduler)["light too"] == (0, 10, True), "it had less than the flood that gave its place"
    scheduler.remove("light too")
    start, count, samples = token_step(scheduler)["flood3"]
    assert samples and start + count == 13, "nothing that it had generated was lost"


def test_nobody_makes_way_for_a_tenant_that_had_as_much() -> None:
    """Two floods share the batch by turns; neither takes places from the other."""
    scheduler = _flooded(SchedulerLimits(max_batch=2))
    for number in range(20):
        scheduler.add(sequence(f"other{number}", 10, tenant="other"))
    for _ in range(200):
        for name, (_, _, samples) in token_step(scheduler).items():
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
        token_step(scheduler)
    scheduler.add(sequence("light", 20, tenant="light"))
    assert token_step(scheduler) == {"light": (0, 20, True)}
    step = token_step(scheduler)
    assert step["light"] == (20, 1, True) and sum(count for _, count, _ in step.values()) == 32


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
            scheduler.add(sequence(name, wanted[name][1], tenant=wanted[name][0]))
        elif not scheduler.waiting and not scheduler.running:
            break
        for name, (_, _, samples) in token_step(scheduler).items():
            written[name] += samples
            if written[name] == wanted[name][2]:
                scheduler.remove(name)
        assert scheduler.running <= places
    assert written == {name: tokens for name, (_, _, tokens) in wanted.items()}
    assert scheduler.blocks.used == 0


def test_a_shared_prefix_is_computed_once_but_never_across_salts() -> None:
    system, scheduler = tuple(range(40)), Scheduler(SchedulerLimits())
    scheduler.add(sequence("a", 0, tokens=(*system, 1, 2)))
    scheduler.add(sequence("same step", 0, tokens=(*system, 3)))
    scheduler.add(sequence("all known", 0, tokens=system))
    scheduler.add(sequence("stranger", 0, tokens=system, salt=b"other"))
    starts = {name: start for name, (start, _, _) in token_step(scheduler).items()}
    assert starts == {"a": 0, "same step": 40, "all known": 32, "stranger": 0}
    assert scheduler.hit_tokens == 72
    scheduler.remove("a")
    scheduler.remove("same step", reliable=False)
    scheduler.add(sequence("later", 0, tokens=(*system, 1)))
    assert token_step(scheduler)["later"][0] == 0, "a prefix was shared although it can't be relied upon"


def test_a_long_prompt_that_waits_is_not_hashed_in_every_step() -> None:
    """Only up to the first block that nobody knows, however often it is looked at."""
    scheduler = Scheduler(SchedulerLimits(kv_positions=40 * SIZE))
    scheduler.add(sequence("running", 20 * SIZE))
    token_step(scheduler)
    waiting = sequence("long", 30 * SIZE)
    scheduler.add(waiting)
    for _ in range(5):
        assert set(token_step(scheduler)) == {"running"}
    assert len(waiting.content._chain) == 2
    scheduler.remove("running")
    assert token_step(scheduler)["long"] == (0, 30 * SIZE, True)


def test_removed_work_is_never_named_again() -> None:
    scheduler = Scheduler(SchedulerLimits())
    scheduler.add(sequence("r", 10))
    scheduler.add_pairs("job", GRADIENTS, costs(10))
    scheduler.remove("r")
    scheduler.remove("job")
    scheduler.remove("never there")
    assert scheduler.next_step() is None


def test_one_long_step_hardly_changes_when_a_micro_batch_pauses() -> None:
    scheduler = Scheduler(SchedulerLimits(interactive_share=0.5))
    scheduler.add(sequence("stream", 5))
    for seconds in (0.1, 0.1, 5.0):
        step = scheduler.next_step()
        assert step is not None
        compute(scheduler, step)
        scheduler.record(step, seconds)
    assert not scheduler.pauses_pairs(0.1)
    assert scheduler.pauses_pairs(0.13)


def test_a_request_that_does_not_fit_yet_is_passed_by_one_that_does() -> None:
    scheduler = Scheduler(SchedulerLimits(kv_positions=8 * SIZE))
    scheduler.add(sequence("running", 2 * SIZE))
    scheduler.next_step()
    scheduler.add(dataclasses.replace(sequence("large", 7 * SIZE), tenant="a"))
    scheduler.add(dataclasses.replace(sequence("small", SIZE), tenant="b"))
    assert set(token_step(scheduler)) == {"small"}
    scheduler.remove("running")
    scheduler.remove("small")
    assert set(token_step(scheduler)) == {"large"}
