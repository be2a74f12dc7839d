"""What is asked of a server, when, and for whom. Plain data from a seed: no I/O, so that every run of a workload asks the same.

Closed loop: a fixed number of clients, each of which sends its next request when the last one is answered. Open loop: requests arrive at
their own times, whether or not earlier ones are done; gaps are Gamma distributed, and with a coefficient of variation of 1 that is Poisson.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Range = tuple[int, int]
"""Lowest and highest, both included; drawn uniformly."""


@dataclass(frozen=True)
class Workload:
    """One line a field. Either `concurrency` or `rate`, and `requests` or `duration` or both."""

    concurrency: int | None = 32
    """Closed loop: requests under way at any time."""
    rate: float | None = None
    """Open loop: requests per second on average."""
    cv: float = 1.0
    """Open loop: coefficient of variation of the gaps."""
    requests: int | None = None
    """Requests at most."""
    duration: float | None = None
    """Seconds after which no request starts any more."""
    users: int = 32
    """Distinct soft prompts; 0 asks the plain model."""
    skew: float = 0.0
    """0: users take turns. Above: user k is drawn with a weight of k ** -skew."""
    rows: int = 10
    """m, rows of each soft prompt."""
    prefix_tokens: int = 0
    """Tokens of a prefix that all requests share; soft prompts then stand behind it."""
    prompt_tokens: Range = (54, 54)
    """Tokens of each request's own prompt."""
    new_tokens: Range = (64, 64)
    timeout: float = 300.0
    """Deadline of each request in seconds."""
    seed: int = 0
    first: int = 0
    """Number of the first request. Other numbers have other prompts, and other users while there are more; the shared prefix stays."""

    def __post_init__(self) -> None:
        """Raises ValueError for a workload that can't be run."""
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError("a workload has either a concurrency or a rate")
        if self.requests is None and self.duration is None:
            raise ValueError("a workload has an end: a number of requests or a duration")
        for name in ("concurrency", "rate", "cv", "requests", "duration", "timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        if self.users and self.rows < 1:
            raise ValueError(f"rows is {self.rows}; a soft prompt has at least one")
        for name in ("prompt_tokens", "new_tokens"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} is {low} to {high}; it must be from 1 on, lowest first")


@dataclass(frozen=True)
class Planned:
    """One request."""

    number: int
    at: float
    """Seconds after the start; always 0 in a closed loop."""
    user: int | None
    """None: the plain model."""
    prompt_tokens: int
    new_tokens: int


def plan(workload: Workload) -> Iterator[Planned]:
    """The requests in order. Endless when only a duration ends the workload and the loop is closed."""
    rng = np.random.default_rng(workload.seed)
    weights = np.arange(1, workload.users + 1) ** -workload.skew if workload.users else np.ones(1)
    shares = np.cumsum(weights / weights.sum())
    shape = workload.cv**-2
    number, at = workload.first, 0.0
    while workload.requests is None or number < workload.first + workload.requests:
        user = None
        if workload.users:
            user = number % workload.users if not workload.skew else int(np.searchsorted(shares, rng.random()))
        prompt, new = (int(rng.integers(low, high + 1)) for low, high in (workload.prompt_tokens, workload.new_tokens))
        if workload.rate is not None:
            at += float(rng.gamma(shape, 1 / (workload.rate * shape)))
        if workload.duration is not None and at > workload.duration:
            return
        yield Planned(number, at, None if user is None else min(user, workload.users - 1), prompt, new)
        number += 1
