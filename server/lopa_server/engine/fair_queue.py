"""Whose request is next: virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024).

Each tenant has a counter of the tokens computed for it, over its weight; the waiting tenant with the smallest one is next.
A tenant that comes back starts at the smallest counter of those who wait, so nobody saves up credit by being away. A
request that doesn't fit yet doesn't hold up the others, but only so many may pass it. Policy only: no tensor.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from lopa_server.engine.waiting import WaitingRequest

PROMPT_PRICE, TEXT_PRICE = 1.0, 2.0
"""Of one token read and of one written, as in the paper: written ones take a step each."""
LOOKED_AT = 8
"""Requests that may be tried before giving up for this step."""
PATIENCE = 32
"""Requests that may pass one that doesn't fit; after that the batch drains until it does."""
REMEMBERED = 100_000
"""Tenants with more than their share whose counters are kept while they have nothing to wait for."""


@dataclass
class _Tenant:
    weight: float
    counter: float
    charged: int = 0
    """Number of the charge that was its last: of those with equal counters, who was served longest ago goes first."""
    requests: OrderedDict[str, WaitingRequest] = field(default_factory=OrderedDict)
    listed: bool = False
    """It has an entry in the heap, perhaps one that is out of date."""


class FairQueue:
    """A `WaitingQueue` that shares the engine out between tenants by weight. All of one tenant's requests go in order of arrival."""

    def __init__(self, weight: Callable[[str], float] | None = None) -> None:
        """weight: a tenant's share relative to others', above 0; None: all the same."""
        self._weight = weight
        self._tenants: dict[str, _Tenant] = {}
        self._owner: dict[str, str] = {}
        """Tenant of each request that waits."""
        self._passed: dict[str, int] = {}
        """How many have passed a request that was tried before them."""
        self._heap: list[tuple[float, int, int, str]] = []
        """Counter, last charge and oldest request's arrival of each waiting tenant. They only grow, so entries out of date come too
        early."""
        self._arrivals: dict[str, int] = {}
        self._numbers = itertools.count()
        self._last_left = _Tenant(1.0, 0.0)
        """The tenant that stopped waiting last: where the counters stand while nobody waits."""
        self._sweep_at = 1024

    def __len__(self) -> int:
        return len(self._owner)

    def push(self, request: WaitingRequest) -> None:
        """A request has arrived."""
        self._sweep()
        level = self._level()
        tenant = self._tenants.get(request.tenant) or self._meet(request.tenant, level)
        if not tenant.requests:
            tenant.counter = max(tenant.counter, level)
        tenant.requests[request.id] = request
        self._owner[request.id] = request.tenant
        self._arrivals[request.id] = next(self._numbers)
        self._list(request.tenant, tenant)

    def candidates(self) -> tuple[str, ...]:
        """Each of the next tenants' oldest request, in the order in which they should be tried."""
        found: list[tuple[str, str]] = []
        while len(found) < LOOKED_AT and (name := self._pop_tenant()) is not None:
            head = next(iter(self._tenants[name].requests))
            found.append((name, head))
            if self._passed.get(head, 0) >= PATIENCE:
                break
        for name, _ in found:
            self._list(name, self._tenants[name])
        return tuple(head for _, head in found)

    def take(self, request_id: str) -> None:
        """One of the candidates has a place now.

        Raises:
            LookupError: it isn't one.
        """
        candidates = self.candidates()
        if request_id not in candidates:
            raise LookupError(f"{request_id} is not next")
        for passed in candidates[: candidates.index(request_id)]:
            self._passed[passed] = self._passed.get(passed, 0) + 1
        self.remove(request_id)

    def rotate(self, request_id: str) -> None:
        """Put a request behind the others of its tenant."""
        self._tenants[self._owner[request_id]].requests.move_to_end(request_id)
        self._arrivals[request_id] = next(self._numbers)

    def remove(self, request_id: str) -> None:
        """Forget a request that gave up; unknown ids are ignored."""
        name = self._owner.pop(request_id, None)
        if name is None:
            return
        tenant = self._tenants[name]
        del tenant.requests[request_id], self._arrivals[request_id]
        self._passed.pop(request_id, None)
        if not tenant.requests:
            self._last_left = tenant

    def charge(self, tenant: str, *, prompt_tokens: int, generated_tokens: int) -> None:
        """What a step has just computed for a tenant."""
        known = self._tenants.get(tenant) or self._meet(tenant, self._level())
        known.charged = next(self._numbers)
        known.counter += (PROMPT_PRICE * prompt_tokens + TEXT_PRICE * generated_tokens) / known.weight

    def counter(self, tenant: str) -> float:
        """Priced tokens over weight; where the counters stand, for one that isn't known."""
        known = self._tenants.get(tenant)
        return self._level() if known is None else known.counter

    def rank(self, tenant: str) -> tuple[float, int]:
        """Its counter, then its last charge: who has had less goes first, then who was served longer ago."""
        known = self._tenants.get(tenant)
        return self.counter(tenant), known.charged if known is not None else 0

    @property
    def known_tenants(self) -> int:
        """Tenants whose counters are kept."""
        return len(self._tenants)

    def _meet(self, name: str, counter: float) -> _Tenant:
        tenant = self._tenants[name] = _Tenant(1.0 if self._weight is None else self._weight(name), counter)
        return tenant

    def _level(self) -> float:
        """The smallest counter of those who wait."""
        name = self._pop_tenant()
        if name is None:
            return self._last_left.counter
        tenant = self._tenants[name]
        self._list(name, tenant)
        return tenant.counter

    def _list(self, name: str, tenant: _Tenant) -> None:
        if not tenant.listed:
            tenant.listed = True
            heapq.heappush(self._heap, (*self._key(tenant), name))

    def _key(self, tenant: _Tenant) -> tuple[float, int, int]:
        return tenant.counter, tenant.charged, self._arrivals[next(iter(tenant.requests))]

    def _pop_tenant(self) -> str | None:
        """The waiting tenant with the smallest counter, taken out of the heap."""
        while self._heap:
            *key, name = heapq.heappop(self._heap)
            tenant = self._tenants[name]
            tenant.listed = False
            if not tenant.requests:
                continue
            if self._key(tenant) == tuple(key):
                return name
            self._list(name, tenant)
        return None

    def _sweep(self) -> None:
        """Now and then, forget who doesn't wait and would start where the counters stand anyway."""
        if len(self._tenants) < self._sweep_at:
            return
        level = self._level()
        idle = [name for name, tenant in self._tenants.items() if not tenant.requests]
        for name in idle:
            self._tenants[name].listed = False
        self._heap = [entry for entry in self._heap if self._tenants[entry[-1]].listed]
        heapq.heapify(self._heap)
        idle.sort(key=lambda name: self._tenants[name].counter)
        for place, name in enumerate(idle):
            if self._tenants[name].counter <= level or place < len(idle) - REMEMBERED:
                del self._tenants[name]
        self._sweep_at = max(1024, 2 * len(self._tenants))
