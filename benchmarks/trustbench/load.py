"""Load: capacity, ten times as much, a light tenant beside a flood, and a soak with random cancels."""

from __future__ import annotations

import time
from dataclasses import dataclass

from trustbench.clients import Clients, Demand, Result, run_for
from trustbench.server import Server

TIMES = 10
"""Capacity."""
WARM_UP = 3.0
ROUNDS = 4
TURN = 60.0
"""Seconds of one kind of demand, before it is another's turn."""
CROWD = 2
"""Clients at capacity, for each place in the batch."""


@dataclass(frozen=True)
class Measured:
    """Some seconds of one demand."""

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
    return Measured(result, used)


def overload(server: Server, batch: int, seconds: float) -> dict[str, list[Measured]]:
    """In turns of a minute at most, since a machine with neighbours is not the same from one minute to the next; `seconds` of each kind
    beyond capacity, half as many at it:

    - "peak": CROWD patient clients for each place in the batch: nobody is refused, and the batch stays full while a client sends its
      next request;
    - "patient": TIMES as many patient clients as places;
    - "impatient": TIMES as many streams a second as the peak finished just before, of clients who never wait and never come back.
    """
    rounds = max(1, round(seconds / TURN))
    turn, turns = seconds / rounds, {name: list[Measured]() for name in ("peak", "patient", "impatient")}
    for _ in range(rounds):
        peak = measured(server, Demand(clients=CROWD * batch, warm_up=WARM_UP), turn / 2)
        per_second = TIMES * peak.clients.finished / peak.clients.seconds
        turns["peak"].append(peak)
        turns["patient"].append(measured(server, Demand(clients=TIMES * batch, warm_up=WARM_UP), turn))
        turns["impatient"].append(measured(server, Demand(clients=0, per_second=per_second, warm_up=WARM_UP), turn))
    return turns


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
