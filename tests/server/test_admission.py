"""What may wait, as a policy: bounds in entries and tokens, tenants' shares, deadlines by the measured pace."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lopa_server.engine.admission import FURTHEST, JITTER, LEAST_MEASURED, OVERBOOKED, SLACK, STALE, Admission, AdmissionLimits, Arrival
from lopa_server.engine.base import DeadlineTooShort, QueueFull


def _limits(places: int = 2, entries: int = 100, tokens: int = 1000, share: float = 4.0) -> AdmissionLimits:
    return AdmissionLimits("queue", places, entries, tokens, share)


def _arrival(tenant: str = "t", prompt: int = 0, text: int = 100, deadline: float | None = None, entries: int = 1) -> Arrival:
    return Arrival(tenant, entries, prompt, text, deadline)


def _running(places: int = 2, *, seconds: float = 20.0, rate: float = 10.0, **limits: float) -> Admission:
    """All places taken by requests that write `rate` tokens a second each and have done so for a while; now is `seconds`."""
    admission = Admission(_limits(places, **limits))
    for place in range(places):
        admission.enter(f"old{place}", _arrival(text=int(seconds * rate)), 0.0)
        admission.progress(f"old{place}", 0, 0.0)
    for second in range(1, int(seconds) + 1):
        for place in range(places):
            admission.progress(f"old{place}", int(rate), float(second))
    for place in range(places):
        admission.leave(f"old{place}", seconds, finished=True)
        admission.enter(f"run{place}", _arrival(text=100), seconds)
        admission.progress(f"run{place}", 0, seconds)
    return admission


def test_entries_are_bounded_beyond_the_places() -> None:
    admission = Admission(_limits(places=2, entries=3))
    for number in range(5):
        admission.enter(f"r{number}", _arrival(), 0.0)
    with pytest.raises(QueueFull) as refused:
        admission.enter("more", _arrival(), 0.0)
    assert (refused.value.queue, refused.value.waiting, refused.value.limit) == ("queue", 3, 3)
    admission.leave("r0", 0.0, finished=False)
    admission.enter("more", _arrival(), 0.0)


def test_tokens_are_bounded_but_whoever_finds_nobody_waiting_fits() -> None:
    admission = Admission(_limits(places=1, tokens=1000, share=1000))
    admission.enter("running", _arrival(), 0.0)
    admission.progress("running", 1, 0.0)
    admission.enter("huge", _arrival(prompt=5000), 0.0)
    with pytest.raises(QueueFull, match="tokens"):
        admission.enter("more", _arrival(), 0.0)
    admission.leave("huge", 0.0, finished=False)
    for number in range(10):
        admission.enter(f"r{number}", _arrival(text=90, prompt=10), 0.0)
    assert admission.waiting_tokens == 1000
    with pytest.raises(QueueFull) as refused:
        admission.enter("more", _arrival(text=1), 0.0)
    assert (refused.value.waiting, refused.value.limit) == (1000, 1000)


def test_a_flood_leaves_room_for_others() -> None:
    admission = Admission(_limits(places=0, tokens=1000, share=4.0))
    with pytest.raises(QueueFull, match="one tenant"):
        for number in range(1000):
            admission.enter(f"flood{number}", _arrival("flood", text=10), 0.0)
    assert admission.waiting_tokens == 800
    for number in range(8):
        admission.enter(f"other{number}", _arrival("other", text=20), 0.0)


def test_a_flood_of_small_requests_leaves_room_for_others() -> None:
    admission = Admission(_limits(places=2, entries=20, tokens=10**6, share=4.0))
    with pytest.raises(QueueFull, match="one tenant"):
        for number in range(100):
            admission.enter(f"flood{number}", _arrival("flood", text=1), 0.0)
    with pytest.raises(QueueFull, match="one tenant"):
        admission.check_room("flood", 0.0)
    for number in range(3):
        admission.check_room("other", 0.0)
        admission.enter(f"other{number}", _arrival("other", text=1), 0.0)


def test_those_who_are_refused_come_back_one_after_the_other() -> None:
    """Places get free at 0.2 a second: so many times OVERBOOKED come in every second, however many are refused at once."""
    admission = _running(places=2, rate=10.0, entries=2, tokens=10**6)
    for number in range(2):
        admission.enter(f"waits{number}", _arrival(text=100), 20.0)
    waits = [_refused(admission, "t", 20.0) for _ in range(8)]
    assert waits[0] == pytest.approx(5.0, rel=JITTER)
    assert waits[5] == pytest.approx(5.0 + 5 * 5.0 / OVERBOOKED, rel=JITTER)
    assert _refused(admission, "stranger", 20.0) == pytest.approx(5.0, rel=JITTER), "a tenant's turns are behind its own only"
    for _ in range(1000):
        longest = _refused(admission, "t", 20.0)
    assert longest < (1 + JITTER) * FURTHEST * 2 * 5.0


def _refused(admission: Admission, tenant: str, now: float) -> float:
    """Seconds after which a request is told to come back."""
    with pytest.raises(QueueFull) as refused:
        admission.check_room(tenant, now)
    return refused.value.retry_after


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["enter", "progress", "leave"]), st.sampled_from("abc"), st.integers(1, 300), st.integers(0, 300)),
        max_size=80,
    )
)
def test_the_books_balance(actions: list[tuple[str, str, int, int]]) -> None:
    """Whatever comes, goes and is refused: the bounds hold, and nothing is left behind."""
    admission, waiting, live, now = Admission(_limits(places=2, entries=6, tokens=1000)), {}, set(), 0.0
    for number, (action, tenant, text, prompt) in enumerate(actions):
        now += text / 100
        name = f"{tenant}{number}"
        if action == "enter":
            arrival = _arrival(tenant, prompt, text)
            try:
                admission.enter(name, arrival, now)
            except QueueFull as full:
                assert full.retry_after >= 0
                continue
            live.add(name)
            waiting[name] = arrival.tokens
        elif action == "progress" and live:
            chosen = sorted(live)[text % len(live)]
            admission.progress(chosen, 1, now)
            waiting.pop(chosen, None)
        elif action == "leave" and live:
            chosen = sorted(live)[text % len(live)]
            admission.leave(chosen, now, finished=bool(prompt % 2))
            waiting.pop(chosen, None)
            live.remove(chosen)
        assert admission.waiting_tokens == sum(waiting.values())
        assert len(live) <= 8
    for name in live:
        admission.leave(name, now, finished=True)
    assert admission.waiting_tokens == 0 and not admission._waiting and not admission._entries


def test_the_wait_follows_the_measured_pace() -> None:
    admission = _running(places=2, rate=10.0, tokens=10_000)
    assert admission.expected_wait(_arrival()) == pytest.approx(0.0)
    for number in range(4):
        admission.enter(f"r{number}", _arrival(text=100), 20.0)
    assert admission.expected_wait(_arrival()) == pytest.approx(400 / 20, rel=0.05)
    stranger = admission.expected_wait(_arrival("stranger", text=100))
    assert stranger == pytest.approx(100 / 20, rel=0.05), "at most its own turn's worth of the others goes first"


def test_deadlines_that_cannot_be_met_are_refused_at_once() -> None:
    admission = _running(places=2, rate=10.0, tokens=10_000)
    for number in range(10):
        admission.enter(f"r{number}", _arrival(text=100), 20.0)
    needed = 1000 / 20 + 100 / 10
    admission.enter("in time", _arrival(deadline=20.0 + 1.05 * needed / SLACK), 20.0)
    with pytest.raises(DeadlineTooShort) as refused:
        admission.enter("late", _arrival(deadline=20.0 + 0.9 * needed / SLACK), 20.0)
    assert refused.value.needed == pytest.approx(needed + 5, rel=0.05)
    assert refused.value.retry_after == pytest.approx(55, rel=0.05)
    with pytest.raises(DeadlineTooShort) as refused:
        admission.enter("never", _arrival(deadline=21.0), 20.0)
    assert refused.value.retry_after is None, "it alone takes longer"
    admission.enter("no deadline", _arrival(), 20.0)


def test_nothing_is_held_against_anybody_before_it_is_measured() -> None:
    admission = Admission(_limits(places=1))
    admission.enter("first", _arrival(deadline=0.001), 0.0)
    admission.progress("first", 1, LEAST_MEASURED / 2)
    admission.enter("second", _arrival(deadline=LEAST_MEASURED / 2 + 0.001), LEAST_MEASURED / 2)
    with pytest.raises(QueueFull) as refused:
        admission.enter("many", _arrival(text=2000), LEAST_MEASURED / 2)
    assert 1.0 <= refused.value.retry_after <= 1.25


def test_texts_that_end_early_make_waiting_shorter() -> None:
    admission = _running(places=1, rate=10.0, tokens=100_000)
    for number in range(50):
        admission.enter(f"short{number}", _arrival(text=1000), 20.0)
        admission.progress(f"short{number}", 10, 20.0)
        admission.leave(f"short{number}", 20.0, finished=True)
    admission.enter("waits", _arrival(text=1000), 20.0)
    early = admission.expected_wait(_arrival())
    assert early is not None and early < 0.1 * 1000 / 10


def test_idle_time_does_not_count_as_slowness() -> None:
    admission = _running(places=1, rate=10.0, tokens=10_000)
    admission.leave("run0", 20.0, finished=True)
    admission.enter("later", _arrival(), 20.0 + 0.9 * STALE)
    admission.enter("waits", _arrival(text=100), 20.0 + 0.9 * STALE)
    wait = admission.expected_wait(_arrival(text=1))
    assert wait is not None and wait < 30


@pytest.mark.parametrize("stopped", [True, False])
def test_an_engine_that_was_slow_gets_another_chance(stopped: bool) -> None:
    """Its process was stopped, or crowded out, and whatever has a deadline is refused: that must not go on when nothing else is done."""
    admission, now = _running(places=1, rate=10.0, tokens=10_000), 20.0
    if stopped:
        now += 10 * STALE
    else:
        for _ in range(50):
            now += 5.0
            admission.progress("run0", 0, now)
        with pytest.raises(DeadlineTooShort):
            admission.enter("refused", _arrival(text=10, deadline=now + 30), now)
    admission.leave("run0", now, finished=True)
    refused = 0
    for second in range(round(2 * STALE)):
        try:
            admission.enter("again", _arrival(text=10, deadline=now + second + 30), now + second)
        except DeadlineTooShort:
            refused += 1
        else:
            break
    assert refused <= (0 if stopped else STALE + 1)
