"""The load generator: what it plans, what it measures on a real server, and what it says about failures."""

from __future__ import annotations

import asyncio
import itertools
import json
from statistics import fmean, pstdev

import pytest
from lopa.bench.run import LoadResult, Trace, run_load
from lopa.bench.summary import pure_decode_tokens_per_second, summarize
from lopa.bench.workload import Planned, Workload, plan
from lopa.cli import main
from lopa.transport import Endpoint


def test_a_plan_is_reproducible_and_keeps_its_lengths() -> None:
    workload = Workload(requests=200, users=7, prompt_tokens=(8, 512), new_tokens=(1, 64), seed=3)
    first, second = list(plan(workload)), list(plan(workload))
    assert first == second and len(first) == 200
    assert {one.user for one in first} == set(range(7))
    assert all(8 <= one.prompt_tokens <= 512 and 1 <= one.new_tokens <= 64 for one in first)


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.0])
def test_arrivals_have_the_rate_and_the_variation_asked_for(cv: float) -> None:
    times = [one.at for one in plan(Workload(concurrency=None, rate=5.0, cv=cv, requests=20_000))]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert fmean(gaps) == pytest.approx(0.2, rel=0.1)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.1)


def test_skew_prefers_some_users_and_never_leaves_the_range() -> None:
    users = [one.user for one in plan(Workload(requests=5000, users=1000, skew=1.0))]
    assert users.count(0) > 10 * users.count(99)
    assert {user is not None and 0 <= user < 1000 for user in users} == {True}
    assert {one.user for one in plan(Workload(requests=5, users=0))} == {None}


@pytest.mark.parametrize("wrong", [{"rate": 1.0}, {"requests": None}, {"prompt_tokens": (9, 8)}, {"rows": 0}, {"timeout": 0.0}])
def test_workloads_that_mean_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Workload(**{"requests": 1, **wrong})  # type: ignore[arg-type]


def test_summary_counts_failures_apart() -> None:
    good = Trace(Planned(0, 0.0, 0, 4, 3), 0.0, [(1.0, 1), (1.5, 1), (3.0, 1)], 3.0)
    late = Trace(Planned(1, 0.0, 1, 4, 3), 0.0, [(2.0, 1), (2.5, 1)], 2.5)
    bad = Trace(Planned(2, 0.0, 2, 4, 3), 0.0, [], 0.5, "QUEUE_FULL")
    result = LoadResult(Workload(requests=3), [good, late, bad], 4.0)
    summary = summarize(result)
    assert (summary.requests, summary.errors, summary.tokens_per_second) == (2, {"QUEUE_FULL": 1}, 5 / 4)
    assert summary.first_token_ms is not None and summary.first_token_ms.p50 == 1500
    assert summary.inter_token_ms is not None and summary.inter_token_ms.p50 == 500
    # Everybody decodes from 2.0 (the later first token) to 2.5 (the earlier last one): one token arrives in that time.
    assert pure_decode_tokens_per_second(result) == 2


def test_the_command_loads_a_server_and_reports(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--requests",
        "6",
        "--concurrency",
        "3",
        "--users",
        "6",
        "--rows",
        "4",
        "--prompt-tokens",
        "4-9",
        "--new-tokens",
        "5",
        "--json",
    ]
    with pytest.raises(SystemExit) as end:
        main(["bench", "serve", address, *options])
    assert not end.value.code
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert summary["requests"] == 6 and summary["errors"] == {}
    assert summary["tokens_per_second"] == pytest.approx(6 * 5 / summary["seconds"])


def test_failed_requests_are_results(address: str) -> None:
    async def run() -> LoadResult:
        return await run_load(Endpoint(address), Workload(rate=100.0, concurrency=None, requests=3, new_tokens=(400, 400), timeout=0.05))

    summary = summarize(asyncio.run(run()))
    assert summary.requests == 0 and sum(summary.errors.values()) == 3
    assert set(summary.errors) <= {"DEADLINE_EXCEEDED", "DEADLINE_TOO_SHORT"}


def test_a_workload_beyond_the_context_is_wrong_usage(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "serve", address, "--requests", "1", "--prefix-tokens", "600"])
    assert end.value.code == 2
    assert "context is 512" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "serve", "127.0.0.1:1", "--requests", "1", "--timeout", "60"])
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("lopa: no connection")
