"""The scheduling policy, without a model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from lopa_server.engine.scheduler import DecodeStep, PairCost, PairKind, PairStep, PrefillStep, Scheduler, SchedulerLimits, Step
from lopa_server.engine.slots import Move, SlotTable

GRADIENTS, SCORE = PairKind.GRADIENTS, PairKind.SCORE


def _costs(*positions: int, targets: int = 1) -> list[PairCost]:
    return [PairCost(length, targets) for length in positions]


def _pair_step(scheduler: Scheduler) -> PairStep:
    step = scheduler.next_step()
    assert isinstance(step, PairStep)
    return step


def _prefill_step(scheduler: Scheduler) -> PrefillStep:
    step = scheduler.next_step()
    assert isinstance(step, PrefillStep)
    return step


def test_nothing_to_do() -> None:
    assert Scheduler(SchedulerLimits()).next_step() is None


def test_requests_join_in_order_and_at_most_a_batch() -> None:
    scheduler = Scheduler(SchedulerLimits(max_batch=2))
    for name in "abc":
        scheduler.add(name, 10, 20)
    assert _prefill_step(scheduler).admitted == ("a", "b")
    assert isinstance(scheduler.next_step(), DecodeStep)
    scheduler.remove("a")
    assert _prefill_step(scheduler).admitted == ("c",)
    assert (scheduler.waiting, scheduler.running) == (0, 2)


def test_a_long_prompt_is_read_in_pieces_with_decoding_between() -> None:
    scheduler = Scheduler(SchedulerLimits(prefill_positions=16))
    scheduler.add("short", 4, 50)
    scheduler.next_step()
    scheduler.add("long", 40, 50)
    steps = [scheduler.next_step() for _ in range(6)]
    assert [type(step) for step in steps] == [DecodeStep, PrefillStep] * 3
    pieces = [step.chunks[0] for step in steps[1::2] if isinstance(step, PrefillStep)]
    assert [(piece.start, piece.count, piece.last) for piece in pieces] == [(0, 16, False), (16, 16, False), (32, 8, True)]


def test_the_cache_bounds_the_batch_but_one_request_always_runs() -> None:
    scheduler = Scheduler(SchedulerLimits(kv_positions=100))
    scheduler.add("huge", 90, 500)
    scheduler.add("small", 5, 10)
    assert _prefill_step(scheduler).admitted == ("huge",)
    assert isinstance(scheduler.next_step(), DecodeStep)
    scheduler.remove("huge")
    assert _prefill_step(scheduler).admitted == ("small",)


def test_pairs_of_several_calls_share_a_micro_batch_by_length() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=400, similar=0.75))
    scheduler.add_pairs("a", GRADIENTS, _costs(100, 30))
    scheduler.add_pairs("b", GRADIENTS, _costs(95, 32, 80))
    scheduler.add_pairs("c", SCORE, _costs(100))
    assert set(_pair_step(scheduler).pairs) == {("a", 0), ("b", 0), ("b", 2)}
    assert set(_pair_step(scheduler).pairs) == {("a", 1), ("b", 1)}
    assert set(_pair_step(scheduler).pairs) == {("c", 0)}
    assert scheduler.next_step() is None


def test_a_call_with_many_pairs_does_not_hold_up_the_others() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=100))
    scheduler.add_pairs("many", GRADIENTS, _costs(*[100] * 50))
    scheduler.add_pairs("one", GRADIENTS, _costs(100))
    assert ("one", 0) in [pair for _ in range(2) for pair in _pair_step(scheduler).pairs]


def test_target_tokens_bound_a_micro_batch() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_targets=10))
    scheduler.add_pairs("a", GRADIENTS, _costs(10, 10, 10, targets=6))
    assert [len(_pair_step(scheduler).pairs) for _ in range(3)] == [1, 1, 1]


def test_interactive_work_gets_its_share_of_the_time_and_no_more() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=10, interactive_share=0.5))
    scheduler.add("r", 1, 1000)
    scheduler.add_pairs("job", GRADIENTS, _costs(*[10] * 1000))
    spent = {PairStep: 0.0, DecodeStep: 0.0, PrefillStep: 0.0}
    waits, wait = [], 0.0
    for _ in range(600):
        step: Step | None = scheduler.next_step()
        assert step is not None
        seconds = 0.3 if isinstance(step, PairStep) else 0.01
        spent[type(step)] += seconds
        scheduler.record(step, seconds)
        wait = wait + seconds if isinstance(step, PairStep) else 0.0
        waits.append(wait)
    assert 0.45 < spent[DecodeStep] / sum(spent.values()) < 0.55
    assert max(waits) < 0.31, "a row waited for more than one micro-batch"


def test_pairs_have_all_the_time_when_nobody_else_wants_it() -> None:
    scheduler = Scheduler(SchedulerLimits(pair_positions=10))
    scheduler.add_pairs("job", GRADIENTS, _costs(10, 10))
    for _ in range(2):
        scheduler.record(_pair_step(scheduler), 1.0)


def test_removed_work_is_never_named_again() -> None:
    scheduler = Scheduler(SchedulerLimits())
    scheduler.add("r", 10, 20)
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
        longest = max(jobs[name][index] for name, index in step.pairs)
        assert len(step.pairs) == 1 or longest * len(step.pairs) <= budget
        seen += step.pairs
    assert sorted(seen) == sorted((name, index) for name, part in jobs.items() for index in range(len(part)))


@given(st.lists(st.tuples(st.sampled_from(["enter", "decode", "leave"]), st.integers(0, 99)), max_size=60))
def test_the_slot_table_and_its_moves_agree(actions: list[tuple[str, int]]) -> None:
    """A list of strings stands for the cache: after every change each request's row holds its own content."""
    table, memory, reading, decoding, free = SlotTable(), [""] * 100, [], [], None
    for number, (action, pick) in enumerate(actions):
        if action == "enter":
            name = f"r{number}"
            memory[table.enter(name)] = name
            reading.append(name)
        elif action == "decode" and reading:
            name = reading.pop(pick % len(reading))
            decoding.append(name)
            swap = table.start_decoding(name)
            if swap:
                memory[swap.first], memory[swap.second] = memory[swap.second], memory[swap.first]
        elif action == "leave" and reading + decoding:
            name = (reading + decoding)[pick % len(reading + decoding)]
            (reading if name in reading else decoding).remove(name)
            moves, free = table.leave(name)
            for move in moves:
                assert isinstance(move, Move)
                memory[move.target] = memory[move.source]
            memory[free] = ""
        assert len(table) == len(reading + decoding)
        assert sorted(table.decoding) == sorted(decoding)
        assert [memory[row] for row in range(len(decoding))] == list(table.decoding)
        assert all(memory[table.row(name)] == name for name in reading + decoding)
        assert not any(memory[len(table) :])
