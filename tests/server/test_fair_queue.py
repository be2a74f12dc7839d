"""The fair queue as a policy: shares, arrivals and departures, requests that don't fit, memory."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lopa_server.engine.fair_queue import PATIENCE, TEXT_PRICE, FairQueue
from lopa_server.engine.waiting import WaitingRequest

TENANTS = st.sampled_from(["a", "b", "c", "d"])
_numbers = itertools.count()


def _request(tenant: str, name: str = "", tokens: int = 10) -> WaitingRequest:
    return WaitingRequest(name or f"{tenant}-{next(_numbers)}", tenant, tokens, tokens)


def _serve(queue: FairQueue, cost: int) -> str:
    """Take the next request and charge its tenant; the tenant."""
    name = queue.candidates()[0]
    queue.take(name)
    tenant = name.split("-")[0]
    queue.charge(tenant, prompt_tokens=cost, generated_tokens=0)
    return tenant


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    queue = FairQueue()
    for name in "cab":
        queue.push(_request("t", name))
    assert queue.candidates() == ("c",)
    queue.take("c")
    queue.remove("a")
    queue.remove("unknown")
    assert queue.candidates() == ("b",) and len(queue) == 1
    with pytest.raises(LookupError):
        queue.take("a")


def test_a_flood_does_not_delay_somebody_else() -> None:
    queue = FairQueue()
    for _ in range(1000):
        queue.push(_request("flood"))
    served = [_serve(queue, 100) for _ in range(20)]
    queue.push(_request("other"))
    served += [_serve(queue, 100) for _ in range(2)]
    assert served.count("flood") == 21 and served.index("other") in (20, 21)


def test_shares_follow_weights() -> None:
    queue = FairQueue({"a": 1.0, "b": 3.0}.__getitem__)
    for _ in range(400):
        queue.push(_request("a"))
        queue.push(_request("b"))
    counts = Counter(_serve(queue, 7) for _ in range(400))
    assert counts["b"] == pytest.approx(300, abs=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TENANTS, st.integers(1, 500), st.integers(0, 50)), min_size=1, max_size=200))
def test_counters_of_those_who_always_wait_stay_together(costs: list[tuple[str, int, int]]) -> None:
    """The paper's bound: two tenants that both wait all the time are never further apart than one request costs."""
    queue = FairQueue({"a": 1.0, "b": 2.0, "c": 0.5, "d": 1.0}.__getitem__)
    for tenant in "abcd":
        queue.push(_request(tenant))
    largest = 0.0
    for _, prompt, text in costs:
        name = queue.candidates()[0]
        tenant = name.split("-")[0]
        queue.push(_request(tenant))
        queue.take(name)
        before = queue.counter(tenant)
        queue.charge(tenant, prompt_tokens=prompt, generated_tokens=text)
        largest = max(largest, queue.counter(tenant) - before)
        counters = [queue.counter(one) for one in "abcd"]
        assert max(counters) - min(counters) <= largest + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["push", "take", "remove", "charge"]), TENANTS, st.integers(0, 9)), max_size=120))
def test_every_request_leaves_exactly_once(actions: list[tuple[str, str, int]]) -> None:
    """Against a plain model: who waits, in which order within a tenant, and that counters decide between tenants."""
    queue, model = FairQueue(), {tenant: [] for tenant in "abcd"}
    for action, tenant, number in actions:
        if action == "push":
            request = _request(tenant)
            queue.push(request)
            model[tenant].append(request.id)
        elif action == "take" and len(queue):
            candidates = queue.candidates()
            chosen = candidates[number % len(candidates)]
            queue.take(chosen)
            assert model[chosen.split("-")[0]].pop(0) == chosen
        elif action == "remove" and model[tenant]:
            queue.remove(model[tenant].pop(number % len(model[tenant])))
        elif action == "charge":
            queue.charge(tenant, prompt_tokens=number, generated_tokens=1)
        waiting = {name for name, requests in model.items() if requests}
        candidates = queue.candidates()
        assert candidates == queue.candidates() and len(queue) == sum(map(len, model.values()))
        assert {name.split("-")[0] for name in candidates} == waiting
        assert all(model[name.split("-")[0]][0] == name for name in candidates)
        counters = [queue.counter(name.split("-")[0]) for name in candidates]
        assert counters == sorted(counters)


def test_being_away_saves_up_no_credit() -> None:
    queue = FairQueue()
    for _ in range(300):
        queue.push(_request("busy"))
    for _ in range(100):
        _serve(queue, 1000)
    for _ in range(100):
        queue.push(_request("back"))
    counts = Counter(_serve(queue, 1000) for _ in range(20))
    assert counts == {"back": 10, "busy": 10}


def test_a_newcomer_to_an_empty_queue_starts_where_the_counters_stand() -> None:
    queue = FairQueue()
    queue.push(_request("a"))
    _serve(queue, 5000)
    queue.push(_request("b"))
    assert queue.counter("b") == 5000


def test_text_costs_more_than_prompt() -> None:
    queue = FairQueue()
    queue.charge("t", prompt_tokens=10, generated_tokens=10)
    assert queue.counter("t") == 10 + 10 * TEXT_PRICE


def test_a_request_that_does_not_fit_is_passed_but_not_for_ever() -> None:
    queue = FairQueue()
    queue.push(_request("big", "big"))
    for number in range(200):
        queue.push(_request(f"small{number}"))
    passed = 0
    while len(candidates := queue.candidates()) > 1 or candidates[0] != "big":
        small = next(name for name in candidates if name != "big")
        if candidates[0] == "big":
            passed += 1
        queue.take(small)
    assert candidates == ("big",) and passed == PATIENCE
    queue.take("big")
    assert len(queue) == 200 - PATIENCE and "big" not in queue.candidates()


def test_a_call_can_be_put_behind_its_tenants_others() -> None:
    queue = FairQueue()
    for name in ("a-1", "a-2", "b-1"):
        queue.push(_request(name[0], name))
    queue.rotate("a-1")
    assert queue.candidates() == ("a-2", "b-1")


def test_tenants_that_left_are_forgotten() -> None:
    queue = FairQueue()
    queue.push(_request("steady"))
    for number in range(20_000):
        queue.push(_request(f"t{number}"))
        _serve(queue, 3)
        queue.push(_request("steady"))
        _serve(queue, 3)
    assert queue.known_tenants < 5000
    queue.push(_request("t0"))
    assert queue.counter("t0") == queue.counter("steady") and queue.candidates()[0].startswith("t0-")
