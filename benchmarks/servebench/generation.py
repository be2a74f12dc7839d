"""Measurements of generation over gRPC: against peers, by load, by number of users, behind a shared prefix."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from statistics import fmean, median
from typing import Any

from lopa import event_loop
from lopa.bench.run import LoadResult, run_load
from lopa.bench.summary import summarize
from lopa.bench.workload import Workload

from servebench.server import Server

ROWS, OWN, NEW = 10, 54, 64
"""A personal request: 10 soft rows, 54 tokens, 64 new ones. A plain one has 64 tokens: the same number of positions."""
PERSONAL = Workload(concurrency=32, requests=32, users=32, rows=ROWS, prompt_tokens=(OWN, OWN), new_tokens=(NEW, NEW))
PLAIN = dataclasses.replace(PERSONAL, users=0, prompt_tokens=(ROWS + OWN, ROWS + OWN))

SHORT = dataclasses.replace(PERSONAL, rows=7, prompt_tokens=(ROWS + OWN - 7, ROWS + OWN - 7))
"""As many positions with too few soft rows to fill a block of the cache: nobody, not even one user, is served from it."""

LENGTHS = (8, 512)
"""Of S-LoRA's synthetic trace."""
CROWDS = 3
UNCACHED = ", nothing from the cache"
"""Ends the names of rows with SHORT's prompts."""


class LoadFailed(RuntimeError):
    """Requests of a measurement failed: its figure would mean nothing."""


def run(server: Server, workload: Workload) -> LoadResult:
    """Raises LoadFailed unless every request was answered."""
    result = event_loop.run(run_load(server.endpoint, workload))
    errors = summarize(result).errors
    if errors:
        raise LoadFailed(f"{errors} in {workload}")
    return result


def row(name: str, result: LoadResult, **more: Any) -> dict[str, Any]:
    return {"name": name, **more, **dataclasses.asdict(summarize(result))}


def closed_loops(server: Server, rounds: int) -> list[dict[str, Any]]:
    """1, 8, 32 and 64 requests under way, two generations of each."""
    rows = []
    for concurrency in (1, 8, 32, 64):
        count = max(3, concurrency * (2 if rounds > 2 else 1))
        workload = dataclasses.replace(PERSONAL, concurrency=concurrency, requests=count, users=count, seed=100)
        rows.append(row(f"closed loop, {concurrency}", run(server, workload)))
    return rows


def open_loops(server: Server, capacity: float, seconds: float) -> list[dict[str, Any]]:
    """Poisson arrivals at 70 % of the capacity (tokens/s), then S-LoRA's synthetic trace at 50 %: lengths 8 to 512, skewed users."""
    poisson = dataclasses.replace(PERSONAL, concurrency=None, rate=0.7 * capacity / NEW, requests=None, duration=seconds, users=1000)
    trace = dataclasses.replace(
        poisson, rate=0.5 * capacity / fmean(LENGTHS), prompt_tokens=LENGTHS, new_tokens=LENGTHS, skew=1.0, seed=7, duration=2 * seconds
    )
    return [
        row("open loop, Poisson at 70 %", run(server, poisson), rate=poisson.rate),
        row("S-LoRA's trace at 50 %", run(server, trace), rate=trace.rate),
    ]


def ratio(rows: Iterable[Mapping[str, Any]], over: str, under: str) -> float:
    """Median over rounds of one row's throughput over another's in the same round: what drifts slowly cancels."""
    rounds = {row["name"]: row["rounds"] for row in rows}
    return median(one / other for one, other in zip(rounds[over], rounds[under], strict=True))


def by_users(server: Server, rounds: int, counts: Iterable[int], requests: int) -> list[dict[str, Any]]:
    """Throughput when requests come from so many users, and from the plain model, in turn. Every prompt is new.

    The fewest and the most users once more with prompts of which nothing is in the prefix cache.
    """
    counts = tuple(counts)
    bases = {"plain model": PLAIN} | {f"{count} users": dataclasses.replace(PERSONAL, users=count) for count in counts}
    bases |= {f"{count} users{UNCACHED}": dataclasses.replace(SHORT, users=count) for count in (min(counts), max(counts))}
    speeds: dict[str, list[float]] = {name: [] for name in bases}
    for number in range(rounds):
        for name in list(bases) if number % 2 == 0 else list(bases)[::-1]:
            # A skew of almost nothing: users are drawn, all alike, instead of taking turns from the first one on.
            workload = dataclasses.replace(bases[name], requests=requests, skew=1e-9, seed=1000 + number)
            speeds[name].append(summarize(run(server, workload)).tokens_per_second)
    return [{"name": name, "tokens_per_second": median(values), "rounds": values} for name, values in speeds.items()]


def resident_after_crowds(server: Server, users: int) -> list[int]:
    """The server's memory in bytes after each of CROWDS crowds of so many distinct users who come once, for one token each; nobody is in
    two crowds. The first one warms up."""
    crowd = dataclasses.replace(PERSONAL, concurrency=64, rows=4, prompt_tokens=(2, 2), new_tokens=(1, 1), users=users, requests=users)
    sizes = []
    for number in range(CROWDS):
        run(server, dataclasses.replace(crowd, seed=number))
        sizes.append(server.resident_bytes())
    return sizes


def shared_prefix(server: Server, rounds: int, prefix: int = 512) -> dict[str, Any]:
    """Time to prefill 64 requests behind a shared prefix that is cached, over the time for their own positions alone."""
    # A seed of its own: what other measurements asked for is in the prefix cache.
    alone = dataclasses.replace(PERSONAL, requests=64, users=10**6, new_tokens=(1, 1), seed=77)
    behind = dataclasses.replace(alone, prefix_tokens=prefix)
    run(server, dataclasses.replace(behind, requests=1, concurrency=1))
    times: dict[str, list[float]] = {"alone": [], "behind": []}
    for number in range(2 * rounds):
        for name, workload in (("alone", alone), ("behind", behind)):
            fresh = dataclasses.replace(workload, first=1 + 64 * number)
            times[name].append(run(server, fresh).seconds)
    overhead = median(times["behind"]) / median(times["alone"]) - 1
    return {"name": f"shared prefix of {prefix}", "overhead": overhead, **times}
