"""What a tenant that fills the batch owes others, without a model."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from lopa_server.engine.crowding import MEMORY
from lopa_server.engine.scheduler import Scheduler, SchedulerLimits

from tests.server.scheduling import SIZE, sequence, token_step


def _crowded(limits: SchedulerLimits) -> Scheduler:
    """A batch full of one tenant's rows, all of which decode."""
    scheduler = Scheduler(limits)
    for number in range(limits.max_batch):
        scheduler.add(sequence(f"flood{number}", 10, tenant="flood"))
    token_step(scheduler)
    return scheduler


def test_after_a_step_without_the_crowd_comes_one_with_it() -> None:
    """Newcomers without end, each of a tenant that has had nothing: the crowd has every second step."""
    scheduler = _crowded(SchedulerLimits(max_batch=8))
    scheduler.remove("flood7")
    steps = []
    for number in range(20):
        scheduler.add(sequence(f"new{number}", 10, tenant=f"tenant{number}"))
        steps.append(set(token_step(scheduler)))
        scheduler.remove(f"new{number - 1}")
    crowd = {f"flood{number}" for number in range(7)}
    assert not any(step & crowd for step in steps[::2])
    assert all(crowd <= step for step in steps[1::2])


def test_a_tenant_with_a_row_that_decodes_is_no_newcomer() -> None:
    scheduler = _crowded(SchedulerLimits(max_batch=8))
    scheduler.remove("flood7")
    scheduler.remove("flood6")
    scheduler.add(sequence("first", 10, tenant="light"))
    assert set(token_step(scheduler)) == {"first"}
    token_step(scheduler)
    scheduler.add(sequence("second", 10, tenant="light"))
    step = token_step(scheduler)
    assert step["second"] == (0, 10, True) and len(step) == 8


def test_who_has_had_more_than_the_crowd_is_no_newcomer() -> None:
    scheduler = _crowded(SchedulerLimits(max_batch=8, step_positions=64))
    scheduler.remove("flood7")
    scheduler._queue.charge("greedy", prompt_tokens=10_000, generated_tokens=0)
    scheduler.add(sequence("more", 10, tenant="greedy"))
    assert len(token_step(scheduler)) == 8


def test_many_tenants_with_a_few_streams_each_share_every_step() -> None:
    scheduler = Scheduler(SchedulerLimits(max_batch=8))
    for number in range(8):
        scheduler.add(sequence(f"r{number}", 10, tenant=f"tenant{number % 4}"))
        assert len(token_step(scheduler)) == number + 1


def test_beside_others_the_crowds_prompts_are_read_in_small_pieces() -> None:
    scheduler = _crowded(SchedulerLimits(max_batch=6, step_positions=64))
    for name in ("flood4", "flood5"):
        scheduler.remove(name)
    scheduler.add(sequence("light", 1, tenant="light"))
    token_step(scheduler)
    scheduler.add(sequence("long", 40, tenant="flood"))
    steps = [token_step(scheduler) for _ in range(3)]
    assert [step["long"][:2] for step in steps] == [(0, 8), (8, 8), (16, 8)] and all(len(step) == 6 for step in steps)
    scheduler.remove("light")
    assert token_step(scheduler)["long"][1] == 8, "others may be back soon"
    for _ in range(MEMORY):
        token_step(scheduler)
    scheduler.remove("flood0")
    scheduler.add(sequence("later", 40, tenant="flood"))
    assert token_step(scheduler)["later"] == (0, 40, True), "nobody has been there for long"


def test_one_tenant_alone_never_notices() -> None:
    """Its prompts are read as fast as the budget allows, whatever it sends."""
    scheduler = Scheduler(SchedulerLimits(max_batch=4, step_positions=64))
    for number in range(12):
        scheduler.add(sequence(f"r{number}", 15, tenant="only"))
    assert sum(count for _, count, _ in token_step(scheduler).values()) == 60


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=40), st.integers(6, 60))
def test_whoever_gives_way_every_step_has_rows_and_everything_ends(work: list[tuple[int, int, int]], blocks: int) -> None:
    """Seven in ten requests are the crowd's, in a pool that may be too small for the batch."""
    scheduler = Scheduler(SchedulerLimits(max_batch=4, step_positions=32, kv_positions=(blocks + 4) * SIZE))
    left = {}
    arriving = [(f"r{number}", "flood" if kind < 7 else f"light{kind}", *rest) for number, (kind, *rest) in enumerate(work)]
    for _ in range(4000):
        if arriving:
            name, tenant, length, left[name] = arriving.pop()
            scheduler.add(sequence(name, length, tenant=tenant))
        if not left:
            break
        step = token_step(scheduler)
        assert step, "a step without rows"
        for name, (_, _, samples) in step.items():
            left[name] -= samples
            if not left[name]:
                scheduler.remove(name)
                del left[name]
    assert not left and not arriving and scheduler.blocks.used == 0
