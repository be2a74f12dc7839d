"""Load: capacity, ten times as much, a light tenant beside a flood, and a soak with random cancels."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import fmean

from trustbench.clients import Clients, Demand, Result, run_for
from trustbench.server import Server

TIMES = 10
"""Capacity."""
WARM_UP = 3.0
ROUNDS = 4
CROWDS = (1, 2)
"""Clients at capacity, as multiples of the batch: so many that nobody is refused. Which of them finishes most is tried: with more
than places, the batch stays full while a client sends its next request."""


@dataclass(frozen=True)
class Measured:
    """Some seconds of one demand."""

    demand: Demand
    clients: Result
    server_cpu: float
    """Seconds of CPU that the server took a second."""

    @property
    def tokens_per_cpu_second(self) -> float:
        """What the server made of the CPU that it got: less at the mercy of others on the machine than tokens a second."""
        return self.clients.rate / self.server_cpu

    def refusal_cpu_seconds(self, tokens_per_cpu_second: float) -> float:
        """What a refusal cost the server: what is left of its CPU time if tokens cost as much as at the peak."""
        beyond = self.server_cpu - self.clients.rate / tokens_per_cpu_second
        return beyond * self.clients.seconds / max(1, sum(self.clients.refusals.values()))

    @property
    def generator_share(self) -> float:
        """Part of the CPU time that was used which the clients used."""
        mine = self.clients.cpu_seconds / self.clients.seconds
        return mine / (mine + self.server_cpu)


def measured(server: Server, demand: Demand, seconds: float) -> Measured:
    """So many seconds beyond the warm-up; the server is idle afterwards."""
    before, started = server.cpu_seconds(), time.monotonic()
    result = run_for(server, demand, seconds)
    used = (server.cpu_seconds() - before) / (time.monotonic() - started)
    server.wait_idle()
    return Measured(demand, result, used)


@dataclass(frozen=True)
class Overload:
    """What was finished at capacity, and beyond it."""

    peaks: list[Measured]
    """Before and after, with the number of clients that finished most in both together."""
    patient: Measured
    impatient: Measured

    @property
    def peak_rate(self) -> float:
        """Tokens a second: the machine is not the same from one minute to the next, so the mean of before and after."""
        return fmean(peak.clients.rate for peak in self.peaks)

    @property
    def peak_rate_per_cpu(self) -> float:
        """Tokens per second of the server's CPU."""
        return fmean(peak.tokens_per_cpu_second for peak in self.peaks)


def overload(server: Server, batch: int, seconds: float) -> Overload:
    """At capacity, with the number of patient clients that finish most. With ten times as many as the batch has rows. With ten times as
    many streams a second as were finished at capacity, of clients who never wait and never come back. At capacity again."""
    before = _at_capacity(server, batch, seconds)
    patient = measured(server, Demand(clients=TIMES * batch, warm_up=WARM_UP), seconds)
    per_second = TIMES * max(peak.clients.finished / peak.clients.seconds for peak in before)
    impatient = measured(server, Demand(clients=0, per_second=per_second, warm_up=WARM_UP), seconds)
    rounds = zip(before, _at_capacity(server, batch, seconds), strict=True)
    return Overload(list(max(rounds, key=lambda peaks: sum(peak.clients.rate for peak in peaks))), patient, impatient)


def _at_capacity(server: Server, batch: int, seconds: float) -> list[Measured]:
    """By number of clients, in a third of the time of one phase."""
    return [measured(server, Demand(clients=crowd * batch, warm_up=WARM_UP), seconds / 3 / len(CROWDS)) for crowd in CROWDS]


def light_tenant(server: Server, streams: int, flood: int) -> tuple[list[float], list[float]]:
    """Seconds to the first token of a client that sends one stream at a time: alone, and beside a tenant with `flood` clients. In turns,
    so that what else the machine does falls on both."""
    light = Demand(tenant="other", clients=1, warm_up=WARM_UP, seed=1)
    alone, beside = list[float](), list[float]()
    for _ in range(ROUNDS):
        alone += Clients(server, light, streams // ROUNDS).wait().first
        flooding = Clients(server, Demand(clients=flood))
        try:
            beside += Clients(server, light, streams // ROUNDS).wait().first
        finally:
            flooding.stop()
        server.wait_idle()
    return alone, beside


@dataclass
class Soak:
    """After a soak."""

    growth: float
    """Of resident memory, over what it was when the warm-up ended."""
    leaked_blocks: int
    stuck: bool
    finished: int


def soak(server: Server, clients: int, seconds: float) -> Soak:
    """`clients` streams all the time, a third of them left at some token; the first fifth of the time is warm-up."""
    demand = Demand(clients=clients, cancel=0.33)
    run_for(server, demand, seconds / 5)
    server.wait_idle()
    before = server.resident_bytes()
    result = run_for(server, demand, seconds * 4 / 5)
    idle = server.wait_idle()
    growth = server.resident_bytes() / before - 1
    return Soak(growth, int(server.metric("lopa_kv_blocks_used")), not idle, result.finished)
