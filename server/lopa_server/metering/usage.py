"""Durable usage counters for billing: a row a day, tenant and kind of call. Numbers only, never anything that a user wrote.

SQLite by default, PostgreSQL by URL. Counters are added up in memory and written in batches beside the loop; a crash
loses one interval at most, a drain nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

log = logging.getLogger(__name__)

Result = TypeVar("Result")
IMPATIENT = {
    "connect_timeout": "5",
    "tcp_user_timeout": "10000",
    "keepalives_idle": "5",
    "keepalives_interval": "5",
    "keepalives_count": "2",
}
"""How libpq finds out within seconds that a PostgreSQL server is gone, where the URL says nothing else."""
CLOSE_SECONDS = 15.0
"""For the last write. A database that doesn't answer must not keep the process from ending."""


class UsageError(ValueError):
    """A usage database that can't be used. The message says which and why, without its password."""


@dataclass(frozen=True)
class Usage:
    """What calls used. Addable."""

    requests: int = 0
    """Calls that were let in, whatever became of them."""
    prompt_tokens: int = 0
    """Read: soft-prompt rows included, and both sides of pairs."""
    generated_tokens: int = 0
    pairs: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Written out: this runs twice for every token of every stream."""
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.generated_tokens + other.generated_tokens,
            self.pairs + other.pairs,
            self.received_bytes + other.received_bytes,
            self.sent_bytes + other.sent_bytes,
        )

    def of(self, metric: str) -> int:
        """By the names that limits have (`metering.limits.METRICS`)."""
        if metric == "tokens":
            return self.prompt_tokens + self.generated_tokens
        if metric == "bytes":
            return self.received_bytes + self.sent_bytes
        return self.pairs if metric == "pairs" else self.requests


COUNTERS = tuple(entry.name for entry in fields(Usage))
Key = tuple[str, str, str]
"""Day (ISO, UTC), tenant, kind of call."""

_metadata = sa.MetaData()
TABLE = sa.Table(
    "lopa_usage",
    _metadata,
    sa.Column("day", sa.String(10), primary_key=True),
    sa.Column("tenant", sa.String(128), primary_key=True),
    sa.Column("kind", sa.String(32), primary_key=True),
    *(sa.Column(name, sa.BigInteger, nullable=False) for name in COUNTERS),
)


def today() -> str:
    """By the wall clock: after a jump, counting goes on with the row of the day that it shows."""
    return datetime.now(UTC).date().isoformat()


class UsageStore:
    """The database. Blocks; one thread at a time."""

    def __init__(self, place: str | Path) -> None:
        """place: a file for SQLite, or a URL such as postgresql://user@host/name. Raises UsageError."""
        try:
            url = sa.make_url(place if isinstance(place, str) and "://" in place else f"sqlite:///{place}")
            if url.drivername == "postgresql":
                url = url.set(drivername="postgresql+psycopg", query={**IMPATIENT, **url.query})
            self.name = url.set(query={}).render_as_string(hide_password=True)
            self._engine = sa.create_engine(url, pool_pre_ping=True)
            if self._engine.dialect.name not in ("sqlite", "postgresql"):
                raise UsageError(f"{self.name}: usage can be kept in SQLite or PostgreSQL")
            _metadata.create_all(self._engine)
        except (sa.exc.SQLAlchemyError, ModuleNotFoundError) as error:
            raise UsageError(f"can't keep usage in {place if '@' not in str(place) else 'that database'}: {error}") from error

    def add(self, counters: Mapping[Key, Usage]) -> None:
        """Add to what is there, all or nothing."""
        insert = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert
        statement = insert(TABLE)
        added = {name: TABLE.c[name] + statement.excluded[name] for name in COUNTERS}
        statement = statement.on_conflict_do_update(index_elements=[TABLE.c.day, TABLE.c.tenant, TABLE.c.kind], set_=added)
        names = ("day", "tenant", "kind", *COUNTERS)
        # Sorted, so that two servers that write to one database lock rows in the same order.
        rows = [dict(zip(names, (*key, *astuple(usage)), strict=True)) for key, usage in sorted(counters.items())]
        with self._engine.begin() as connection:
            connection.execute(statement, rows)

    def read(self, first: str = "", last: str = "", tenant: str | None = None) -> dict[Key, Usage]:
        """From one day to another (ISO, both included; empty: no bound)."""
        query = sa.select(TABLE).order_by(TABLE.c.day, TABLE.c.tenant, TABLE.c.kind)
        query = query.where(TABLE.c.day >= first) if first else query
        query = query.where(TABLE.c.day <= last) if last else query
        query = query.where(TABLE.c.tenant == tenant) if tenant is not None else query
        with self._engine.connect() as connection:
            return {tuple(row[:3]): Usage(*row[3:]) for row in connection.execute(query)}

    def close(self) -> None:
        self._engine.dispose()


class UsageRecorder:
    """Counts on the server's loop; writes beside it."""

    def __init__(self, store: UsageStore | None) -> None:
        """store: None keeps nothing beyond this process."""
        self._store = store
        self._stored: dict[str, Usage] = {}
        self._stored_day = ""
        self._pending: dict[Key, Usage] = {}
        self._writing: dict[Key, Usage] = {}
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Read what tenants have used today already."""
        await self.flush()

    def add(self, tenant: str, kind: str, usage: Usage) -> None:
        key = (today(), tenant, kind)
        self._pending[key] = self._pending.get(key, Usage()) + usage

    def used_today(self, tenant: str) -> Usage:
        """Of all kinds of calls together; other servers' on the same database as of the last flush."""
        day = today()
        total = self._stored.get(tenant, Usage()) if self._stored_day == day else Usage()
        for table in (self._pending, self._writing):
            for key, usage in table.items():
                if key[:2] == (day, tenant):
                    total += usage
        return total

    async def flush(self) -> None:
        """Write what has come together. What can't be written is kept, and tried again with the next flush."""
        async with self._lock:
            if self._store is None:
                self._settle()
                return
            self._writing, self._pending = self._pending, {}
            store, writing = self._store, self._writing
            try:
                day, stored = await _apart(lambda: self._exchange(store, writing))
            except Exception as error:
                log.error("usage can't be written to %s, and is kept in memory: %s", self._store.name, type(error).__name__)
                for key, usage in self._writing.items():
                    self._pending[key] = self._pending.get(key, Usage()) + usage
            else:
                self._stored_day, self._stored = day, stored
            self._writing = {}

    def _settle(self) -> None:
        """Without a store: keep today's sums only."""
        day = today()
        if self._stored_day != day:
            self._stored_day, self._stored = day, {}
        self._stored = sum_by_tenant(self._stored, ((key, usage) for key, usage in self._pending.items() if key[0] == day))
        self._pending = {}

    @staticmethod
    def _exchange(store: UsageStore, counters: Mapping[Key, Usage]) -> tuple[str, dict[str, Usage]]:
        if counters:
            store.add(counters)
        day = today()
        return day, sum_by_tenant({}, store.read(day, day).items())

    async def close(self) -> None:
        """Write the rest. What the database doesn't take within CLOSE_SECONDS goes to the log: it is numbers only."""
        last = asyncio.create_task(self.flush())
        done, _ = await asyncio.wait({last}, timeout=CLOSE_SECONDS)
        if self._store is None:
            return
        lost = {**self._writing, **self._pending}
        for key in self._writing.keys() & self._pending.keys():
            lost[key] = self._writing[key] + self._pending[key]
        if lost:
            log.error("usage that is not in %s: %s", self._store.name, json.dumps(rows(lost)))
        if not done:
            last.cancel()
            await asyncio.wait({last})
        elif not lost:
            await _apart(self._store.close)


async def _apart(work: Callable[[], Result]) -> Result:
    """In a thread of its own, which doesn't keep the process from ending: a database may never answer."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if answer.cancelled():
            return
        answer.set_exception(error) if error is not None else answer.set_result(result)  # type: ignore[arg-type]  # then it is one

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="lopa-usage", daemon=True).start()
    return await answer


def sum_by_tenant(start: Mapping[str, Usage], entries: Iterable[tuple[Key, Usage]]) -> dict[str, Usage]:
    """Sums over days and kinds."""
    sums = dict(start)
    for (_, tenant, _), usage in entries:
        sums[tenant] = sums.get(tenant, Usage()) + usage
    return sums


def parse_day(text: str) -> str:
    """Raises ValueError for anything but YYYY-MM-DD."""
    return date.fromisoformat(text).isoformat()


def rows(usage: Mapping[Key, Usage]) -> list[dict[str, Any]]:
    """For printing."""
    return [
        {"day": day, "tenant": tenant, "kind": kind, **dict(zip(COUNTERS, astuple(entry), strict=True))}
        for (day, tenant, kind), entry in usage.items()
    ]
