"""The meter: lets calls in while their tenant is within its limits, and counts what they use."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lopa_server.identity.caller import Caller
from lopa_server.metering.bucket import TokenBucket
from lopa_server.metering.limits import METRICS, Limits, LimitsFileError, TenantLimits, read_limits
from lopa_server.metering.usage import Usage, UsageRecorder

log = logging.getLogger(__name__)

FLUSH_SECONDS = 5.0
"""Between two writes of usage, and two looks at the limits file: what a crash may lose, and how soon a change is in force."""


class OverLimit(RuntimeError):
    """A tenant has used up something. `daily`: a day's quota, else a rate or the number of calls at a time."""

    def __init__(self, tenant: str, name: str, *, limit: float, used: float, retry_after: float, daily: bool) -> None:
        super().__init__(f"{tenant} is over {name}")
        self.tenant, self.name, self.limit, self.used, self.retry_after, self.daily = tenant, name, limit, used, retry_after, daily


class Account:
    """One tenant's buckets and calls."""

    def __init__(self, tenant: str, limits: TenantLimits, clock: Callable[[], float]) -> None:
        self.tenant, self.calls, self._clock = tenant, 0, clock
        self._buckets: dict[str, TokenBucket] = {}
        self.change(limits)

    @property
    def idle(self) -> bool:
        """Forgetting it changes nothing."""
        return not self.calls and all(bucket.level >= bucket.burst for bucket in self._buckets.values())

    def change(self, limits: TenantLimits) -> None:
        """Other limits from now on. Calls that are open stay so; buckets begin full."""
        self.limits = limits
        rates = {metric: limits.rate(metric) for metric in METRICS}
        self._buckets = {
            metric: TokenBucket(rate, max(1.0, rate * limits.burst_seconds), self._clock)
            for metric, rate in rates.items()
            if rate is not None
        }

    def check_calls(self) -> None:
        """Raises OverLimit when it has as many calls as it may have."""
        most = self.limits.concurrent_calls
        if most is not None and self.calls >= most:
            raise OverLimit(self.tenant, "concurrent_calls", limit=most, used=self.calls, retry_after=1.0, daily=False)

    def check(self, amounts: dict[str, float], used_today: Callable[[str], Usage]) -> None:
        """Raises OverLimit when one of these amounts can't be had now; takes nothing."""
        for metric, amount in amounts.items():
            quota = self.limits.quota(metric)
            used = used_today(self.tenant).of(metric) if quota is not None else 0
            if quota is not None and used + amount > quota:
                raise OverLimit(self.tenant, f"{metric}_per_day", limit=quota, used=used, retry_after=_until_tomorrow(), daily=True)
            bucket = self._buckets.get(metric)
            wait = bucket.wait(amount) if bucket is not None else 0.0
            if bucket is not None and wait:
                raise OverLimit(self.tenant, f"{metric}_per_second", limit=bucket.rate, used=amount, retry_after=wait, daily=False)

    def take(self, amounts: dict[str, float]) -> None:
        """Take, into debt where need be."""
        for metric, amount in amounts.items():
            if metric in self._buckets:
                self._buckets[metric].take(amount)


class MeteredCall:
    """One call: who it is from, and what it has used so far."""

    def __init__(self, meter: Meter, account: Account, caller: Caller, kind: str) -> None:
        self._meter, self._account, self._kind = meter, account, kind
        self.caller = caller
        self.usage = Usage()

    def spend(self, *, tokens: int = 0, pairs: int = 0) -> None:
        """Before computing. Raises OverLimit."""
        self._meter.spend(self._account, {"tokens": tokens, "pairs": pairs})
        self._count(Usage(prompt_tokens=tokens, pairs=pairs))

    def generated(self, tokens: int) -> None:
        """As they come. They may run into debt: what has been begun is not cut off, the next call waits."""
        self._account.take({"tokens": tokens})
        self._count(Usage(generated_tokens=tokens))

    def sent(self, size: int) -> None:
        """Bytes of a reply."""
        self._account.take({"bytes": size})
        self._count(Usage(sent_bytes=size))

    def _count(self, usage: Usage) -> None:
        self.usage += usage
        self._meter.recorder.add(self.caller.tenant, self._kind, usage)


class Meter:
    """One for the whole server; used on its loop only."""

    def __init__(self, recorder: UsageRecorder, limits_file: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises LimitsFileError."""
        self.recorder = recorder
        self._file, self._clock = limits_file, clock
        self._seen = self._state()
        self._limits = read_limits(limits_file) if limits_file is not None else Limits()
        self._accounts: dict[str, Account] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to write usage and to follow the limits file."""
        await self.recorder.start()
        self._tasks = [asyncio.create_task(_repeat(self.recorder.flush)), asyncio.create_task(_repeat(self.look_again))]

    async def close(self) -> None:
        """Write the rest."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.recorder.close()

    def open_calls(self, caller: Caller) -> int:
        """Of the caller's tenant."""
        account = self._accounts.get(caller.tenant)
        return account.calls if account is not None else 0

    @contextlib.contextmanager
    def open(self, caller: Caller) -> Iterator[None]:
        """Around a call. Raises OverLimit when the tenant has as many calls as it may have."""
        account = self._account(caller.tenant)
        account.check_calls()
        account.calls += 1
        try:
            yield
        finally:
            account.calls -= 1

    def enter(self, caller: Caller, kind: str, size: int) -> MeteredCall:
        """Let an open call's request in.

        Args:
            kind: the method's name, such as "Generate".
            size: bytes of the request.

        Raises:
            OverLimit: the tenant has had too many requests or bytes lately, or today.
        """
        account = self._account(caller.tenant)
        self.spend(account, {"requests": 1, "bytes": size})
        self.recorder.add(caller.tenant, kind, Usage(requests=1, received_bytes=size))
        return MeteredCall(self, account, caller, kind)

    def check(self, caller: Caller) -> None:
        """Whether a request of the smallest size would be let in now; counts nothing. Raises OverLimit."""
        self._account(caller.tenant).check({"requests": 1}, self.recorder.used_today)

    def spend(self, account: Account, amounts: dict[str, float]) -> None:
        """All of it or, with OverLimit, nothing."""
        account.check(amounts, self.recorder.used_today)
        account.take(amounts)

    def _account(self, tenant: str) -> Account:
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account(tenant, self._limits.of(tenant), self._clock)
        return account

    async def look_again(self) -> None:
        """Follow the limits file, and forget tenants that have nothing open."""
        self._accounts = {tenant: account for tenant, account in self._accounts.items() if not account.idle}
        state = self._state()
        if self._file is None or state == self._seen:
            return
        self._seen = state
        try:
            self._limits = read_limits(self._file)
        except LimitsFileError as error:
            log.error("the limits in force stay as they were: %s", error)
            return
        for tenant, account in self._accounts.items():
            if account.limits != self._limits.of(tenant):
                account.change(self._limits.of(tenant))

    def _state(self) -> tuple[int, ...] | None:
        try:
            found = self._file.stat() if self._file is not None else None
        except OSError:
            return None
        return (found.st_ino, found.st_mtime_ns, found.st_size) if found is not None else None


async def _repeat(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Each by itself: a database that doesn't answer doesn't keep the limits file from being followed. What has begun is finished."""
    while True:
        await asyncio.sleep(FLUSH_SECONDS)
        await asyncio.shield(work())


def _until_tomorrow() -> float:
    """Seconds until the next day begins (UTC)."""
    now = datetime.now(UTC)
    midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    return (midnight - now).total_seconds()
