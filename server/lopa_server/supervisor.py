"""Keeps an engine alive: calls are answered, not hung, when it crashes or gets stuck, and a crashed one is built again.

An engine that has crashed is loaded anew in place, a few times within some minutes at most. One that is stuck in a step is ended and
then counts as crashed, if it has a process of its own. A thread that is stuck can't be ended from inside its process, and the
device that it computes on can't be trusted any more: such an engine fails its calls and is given up. The process should end, and
whoever started it (systemd, Kubernetes) starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from lopa_server import heap
from lopa_server.bounds import Bounds, OutOfTime
from lopa_server.config import ConfigError
from lopa_server.engine.base import (
    Delta,
    Engine,
    EngineRestarting,
    EngineSpec,
    EngineStats,
    EngineStopped,
    GenerateRequest,
    PairRequest,
    PairResult,
    UnsupportedModel,
)

log = logging.getLogger(__name__)

RESTARTS = 3
"""So many within WINDOW_SECONDS; then the engine is given up."""
WINDOW_SECONDS = 600.0
RELOAD_SECONDS, SLOWER = 600.0, 10.0
"""A restart may take so long, or so many times as long as the first start."""
LOOKS = 8
"""The watchdog looks so often within the time that a step may take."""

Report = Callable[[bool], Awaitable[None]]
"""Told False when the engine stops answering, True when it answers again."""


class ReplaceableEngine(Engine, Protocol):
    """An engine as its supervisor needs it."""

    def start(self) -> None:
        """On the loop that it is used on."""
        ...

    async def stop(self) -> None:
        """End it; whoever still waits for an answer gets EngineStopped."""
        ...

    def ask_to_stop(self) -> None:
        """As `stop`, without waiting."""
        ...

    def kill(self) -> bool:
        """End it in the middle of a step. False: that can't be done."""
        ...

    async def wait_ended(self) -> None:
        """Returns when it has ended, by `stop` or by itself."""
        ...

    def nudge(self) -> None:
        """Have new stats published after the present step: an engine that doesn't is stuck."""
        ...


class SupervisedEngine:
    """The `Engine` protocol over an engine that may be replaced. Used on one asyncio loop."""

    def __init__(
        self, load: Callable[[], Awaitable[ReplaceableEngine]], ready: Callable[[Engine], Awaitable[None]], step_seconds: float
    ) -> None:
        """
        Args:
            load: builds a fresh engine.
            ready: returns once a started engine has shown that it works, raises when it doesn't.
            step_seconds: a step that takes longer is stuck.
        """
        self._load, self._ready, self._step_seconds = load, ready, step_seconds
        self._report: Report | None = None
        self._engine: ReplaceableEngine | None = None
        self._spec: EngineSpec | None = None
        self._stats = EngineStats()
        self._bounds = Bounds()
        self._tasks: list[asyncio.Task[None]] = []
        self._restarts: list[float] = []
        self._closing = False
        self._load_seconds = 0.0
        self.stuck = False
        """A step never came back: its thread still is in this process."""
        self.gave_up = asyncio.Event()
        """Set when nothing can be answered any more: the process should end."""

    async def start(self, report: Report) -> None:
        """Load and start, then watch. Raises what `load` and `ready` raise."""
        started = time.monotonic()
        self._engine = await self._load()
        self._load_seconds = time.monotonic() - started
        self._engine.start()
        self._spec = self._engine.spec
        self._begin(self._watch_thread(self._engine))
        await self._ready(self._engine)
        self._report = report
        self._begin(self._watch_steps())

    async def stop(self) -> None:
        """End the engine; whoever still waits gets EngineStopped. A stuck thread is left behind, and so is one that loads."""
        self._closing = True
        engine, self._engine = self._engine, None
        if engine is not None and not self.stuck:
            await engine.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def spec(self) -> EngineSpec:
        if self._spec is None:
            raise EngineStopped("the engine has not been started")
        return self._spec

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        async with contextlib.aclosing(self._running().generate(request)) as deltas:
            while True:
                async with self._answered():
                    delta = await anext(deltas, None)
                if delta is None:
                    return
                yield delta

    async def score(self, pairs: Sequence[PairRequest]) -> list[PairResult]:
        async with self._answered():
            return await self._running().score(pairs)

    async def prompt_gradients(self, pairs: Sequence[PairRequest]) -> list[PairResult]:
        async with self._answered():
            return await self._running().prompt_gradients(pairs)

    def abort(self, request_id: str) -> None:
        if self._engine is not None:
            self._engine.abort(request_id)

    def check_room(self, tenant: str, *, pairs: bool) -> None:
        self._running().check_room(tenant, pairs=pairs)

    def stats(self) -> EngineStats:
        """Of the engine at hand: counters start anew with it."""
        if self._engine is not None:
            self._stats = self._engine.stats()
        return self._stats

    def _running(self) -> ReplaceableEngine:
        if self._engine is None:
            raise EngineStopped("the engine was stopped") if self._closing else EngineRestarting("the engine is being restarted")
        return self._engine

    @contextlib.asynccontextmanager
    async def _answered(self) -> AsyncIterator[None]:
        """Around a wait for the engine: ends it when the engine has failed."""
        try:
            async with self._bounds.limit(None):
                yield
        except OutOfTime as error:
            raise EngineRestarting("the engine is stuck") from error
        except EngineStopped as error:
            if self._closing:
                raise
            raise EngineRestarting("the engine has died") from error

    def _begin(self, watch: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(watch)
        task.add_done_callback(self._watch_ended)
        self._tasks.append(task)

    def _watch_ended(self, task: asyncio.Task[None]) -> None:
        """A watch that fails leaves nobody watching: better to end."""
        if not task.cancelled() and task.exception() is not None:
            log.critical("the engine is not watched any more", exc_info=task.exception())
            self.gave_up.set()

    async def _watch_thread(self, engine: ReplaceableEngine) -> None:
        """Build a new engine when this one's thread ends by itself."""
        await engine.wait_ended()
        if self._closing or self.stuck or self._report is None:
            return
        log.critical("the engine has died")
        self._engine = None
        del engine
        await self._report(False)
        fresh = await self._restart()
        if fresh is None:
            return
        if self._closing:
            await fresh.stop()
            return
        self._engine = fresh
        self._begin(self._watch_thread(fresh))
        log.warning("the engine is running again")
        await self._report(True)

    async def _restart(self) -> ReplaceableEngine | None:
        """A fresh engine that works, or None: there were too many restarts lately."""
        while not self._closing:
            now = time.monotonic()
            self._restarts = [*(at for at in self._restarts if now - at < WINDOW_SECONDS), now]
            if len(self._restarts) > RESTARTS:
                log.critical("the engine has died more than %d times within %.0f s: giving up", RESTARTS, WINDOW_SECONDS)
                self.gave_up.set()
                return None
            try:
                with heap.unsettled():  # the dead one may be part of a cycle, and its model is as large as the next one's
                    async with asyncio.timeout(max(RELOAD_SECONDS, SLOWER * self._load_seconds)):
                        return await self._fresh()
            except (OSError, UnsupportedModel, ConfigError) as error:  # from loading: nothing of a client's is in it
                log.critical("the engine can't be restarted: %s", str(error) or "it takes too long to load")
            except Exception:
                log.critical("the engine can't be restarted", exc_info=True)
        return None

    async def _fresh(self) -> ReplaceableEngine:
        """A started engine that has shown that it works; one that doesn't leaves no thread and no second model in memory."""
        engine = await self._load()
        engine.start()
        try:
            await self._ready(engine)
        except BaseException:
            await engine.stop()
            raise
        return engine

    async def _watch_steps(self) -> None:
        """Fail everybody's calls when a step doesn't come back."""
        interval = self._step_seconds / LOOKS
        seen, looked, waited = self.stats(), time.monotonic(), 0.0
        while not self.stuck:
            await asyncio.sleep(interval)
            now = time.monotonic()
            waited += min(now - looked, 2 * interval)  # not the time in which all of us were stopped, as with a frozen container
            looked = now
            if self._engine is None or self.stats() is not seen:
                seen, waited = self.stats(), 0.0
            if self._engine is not None:
                self._engine.nudge()
            if waited > self._step_seconds and self._engine is not None:
                if self._engine.kill():
                    log.critical("a step has taken more than %.0f s: the engine is stuck, and was ended", self._step_seconds)
                    waited = 0.0
                else:
                    self.stuck = True
        log.critical("a step has taken more than %.0f s: the engine is stuck, and given up", self._step_seconds)
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.ask_to_stop()
        self._bounds.end_all()
        if self._report is not None:
            await self._report(False)
        self.gave_up.set()
