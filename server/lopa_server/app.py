"""The server as a whole: loads the model, binds the port, warms up, serves, drains.

with start_server(ServerConfig(fm=folder, bundle=bundle_folder)) as server:
    lopa.connect(server.address)
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import threading
from pathlib import Path
from types import TracebackType

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from lopa import event_loop
from lopa.v1 import catalog_pb2_grpc, inference_pb2_grpc, tuning_pb2_grpc

from lopa_server import threads, warmup
from lopa_server.config import ConfigError, ServerConfig
from lopa_server.identity.authenticator import Authenticator
from lopa_server.identity.keys import KeyFileError
from lopa_server.identity.tokens import JwksError
from lopa_server.metering.limits import LimitsFileError
from lopa_server.metering.meter import Meter
from lopa_server.metering.usage import UsageError, UsageRecorder, UsageStore
from lopa_server.observability.setup import Observability
from lopa_server.ports import listen, probe_server, service_server
from lopa_server.service.bundles import open_bundles, publish
from lopa_server.service.catalog import CatalogHandler, model_revision
from lopa_server.service.decoding import TolerantDecoding
from lopa_server.service.door import Door, Keeper
from lopa_server.service.gate import Gate, State
from lopa_server.service.handlers import RequestHandlers
from lopa_server.service.servicers import NAMES, CatalogServicer, Handlers, InferenceServicer, TuningServicer
from lopa_server.supervisor import SupervisedEngine
from lopa_server.tokenizing import PromptTokenizer
from lopa_server.validation.requests import RequestChecker

__all__ = ["ConfigError", "RunningServer", "ServerApp", "ServerConfig", "start_server"]

log = logging.getLogger(__name__)

ABORT_SECONDS = 1.0
"""After the drain bound: time for the last error statuses to reach their clients."""


class ServerApp:
    """One server's life: `start`, `drain`. Both on the same asyncio loop."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises ConfigError for settings that can't work."""
        config.check()
        self._config = config
        self.address = ""
        """host:port, once started."""
        self.health_address = ""
        """The same of the port for probes, when there is one."""
        self.metrics_address = ""
        """The same of the metrics page, when there is one."""
        self.engine: SupervisedEngine | None = None
        """The running engine, once started."""
        self._gate: Gate | None = None
        self._meter: Meter | None = None
        self._observability: Observability | None = None
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it
        self._handlers = Handlers()
        self._server: grpc.aio.Server | None = None
        self._health_server: grpc.aio.Server | None = None
        self._ready_file: Path | None = None
        """Set once it is ours: a failed start must not remove what another server wrote."""

    @property
    def name(self) -> str:
        """The FM's name, once started."""
        return self.engine.spec.name if self.engine is not None else str(self._config.fm)

    async def gave_up(self) -> None:
        """Returns when the engine has failed for good: nothing can be answered any more, the process should end."""
        if self.engine is not None:
            await self.engine.gave_up.wait()

    async def start(self) -> None:
        """Bind the port (NOT_SERVING), load, warm up, then serve.

        Raises:
            ConfigError: the port is taken, there is no such device, model and bundle don't fit, or the ready file can't be written.
            FileNotFoundError, UnsupportedModel: the model can't be loaded or served exactly.
        """
        try:
            await self._bind()
            await self._bind_health()
            await self._load()
            self._state(State.SERVING)
            await self._set_health(health_pb2.HealthCheckResponse.SERVING)
            await self._tell_ready()
        except BaseException:
            await self._close()
            raise

    async def drain(self, seconds: float | None = None) -> None:
        """Refuse new calls, let running ones finish for so long at most (default: the configured bound), then end."""
        self._state(State.DRAINING)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        bound = self._config.drain_seconds if seconds is None else seconds
        if self._gate is not None and not await self._gate.wait_empty(bound):
            log.warning("calls still running after %.1f s are ended", bound)
        await self._close()

    async def _bind(self) -> None:
        self._observability = Observability(self._config, lambda: self.engine)
        self.metrics_address = self._observability.metrics_address
        meter = await self._start_meter()
        largest, traffic = self._config.limits.max_message_bytes, self._config.traffic
        self._gate = Gate(self._config.call_bound, largest, meter, traffic)
        door = Door(self._gate, await self._identify(), traffic)
        interceptors = [*self._observability.interceptors, door, TolerantDecoding(NAMES, largest)]
        server = service_server(interceptors, largest, traffic)
        catalog_pb2_grpc.add_CatalogServicer_to_server(CatalogServicer(self._gate, self._handlers), server)
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(self._gate, self._handlers), server)
        tuning_pb2_grpc.add_TuningServicer_to_server(TuningServicer(self._gate, self._handlers), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.address = listen(server, self._config.host, self._config.port, self._config.access)
        await server.start()
        self._server = server

    async def _start_meter(self) -> Meter:
        try:
            store = await asyncio.to_thread(UsageStore, self._config.usage) if self._config.usage is not None else None
            meter = Meter(UsageRecorder(store), self._config.tenant_limits)
        except (UsageError, LimitsFileError) as error:
            raise ConfigError(str(error)) from error
        await meter.start()
        self._meter = meter
        return meter

    async def _identify(self) -> Keeper | None:
        """What keeps strangers out, where identity is on."""
        if not self._config.access.identified:
            return None
        authenticator = Authenticator(self._config.access)
        try:
            await authenticator.start()
        except (KeyFileError, JwksError) as error:
            raise ConfigError(str(error)) from error
        return authenticator.identify

    async def _bind_health(self) -> None:
        """The port for probes: liveness only, the same answers."""
        if self._config.health_port is None:
            return
        server = probe_server(self._health, self._config.traffic)
        self.health_address = listen(server, self._config.host, self._config.health_port, purpose=" for health checks")
        await server.start()
        self._health_server = server

    async def _load(self) -> None:
        bundles = await asyncio.to_thread(open_bundles, self._config)
        engine = SupervisedEngine(lambda: warmup.load_engine(self._config), warmup.warm_up, self._config.step_seconds)
        # Beside an engine in this process it would import the same libraries at the same time, which they don't all bear.
        early = [asyncio.create_task(self._tokenizer())] if self._config.engine_process else []
        try:
            await engine.start(self._engine_answers)
            tokenizer = await (early[0] if early else self._tokenizer())
        except BaseException:
            await asyncio.gather(*early, return_exceptions=True)
            await engine.stop()
            raise
        self.engine = engine
        if self._gate is not None:
            self._gate.engine = engine
        published = await asyncio.to_thread(publish, bundles, engine.spec, self._config)
        checker = RequestChecker(engine.spec, self._config.limits, tokenizer)
        version = importlib.metadata.version("lopa")
        self._handlers.catalog = CatalogHandler(
            engine.spec, self._config.limits, checker.max_row_norm, tokenizer.has_chat, version, published
        )
        self._handlers.requests = RequestHandlers(engine, checker, model_revision(engine.spec, version), noise=self._config.gradient_noise)

    async def _tokenizer(self) -> PromptTokenizer:
        return await asyncio.to_thread(PromptTokenizer.load, self._config.fm)

    async def _tell_ready(self) -> None:
        path = self._config.ready_file
        if path is None:
            return
        try:
            await asyncio.to_thread(_write_atomically, path, self.address)
        except OSError as error:
            raise ConfigError(f"can't write the ready file {path}: {error.strerror or error}") from error
        self._ready_file = path

    async def _engine_answers(self, answers: bool) -> None:
        """Tell health and the gate that the engine has failed, or is back."""
        if self._gate is None or self._gate.state is State.DRAINING:
            return
        self._state(State.SERVING if answers else State.RESTARTING)
        status = health_pb2.HealthCheckResponse
        await self._set_health(status.SERVING if answers else status.NOT_SERVING)

    async def _close(self) -> None:
        if self._gate is not None:
            self._gate.end_all()
        if self.engine is not None:
            await self.engine.stop()
        if self._server is not None:
            await self._server.stop(ABORT_SECONDS)
            self._server = None
        if self._health_server is not None:
            await self._health_server.stop(0)
            self._health_server = None
        if hasattr(self._handlers, "requests"):
            self._handlers.requests.close()
        if self._observability is not None:
            await asyncio.to_thread(self._observability.close)
            self._observability = None
        if self._meter is not None:
            await self._meter.close()
            self._meter = None
        if self._ready_file is not None:
            self._ready_file.unlink(missing_ok=True)
            self._ready_file = None

    def _state(self, state: State) -> None:
        if self._gate is not None:
            self._gate.state = state

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", *NAMES):
            await self._health.set(name, status)


class RunningServer:
    """A server in a thread of this process, with a loop of its own. Made by `start_server`; a context manager."""

    def __init__(self, config: ServerConfig) -> None:
        self.app = ServerApp(config)
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._drain_seconds: float | None = None
        self._thread = threading.Thread(target=lambda: event_loop.run(self._serve()), name="lopa-server", daemon=True)

    @property
    def address(self) -> str:
        """host:port."""
        return self.app.address

    def start(self) -> None:
        """Returns once the server is SERVING; raises what kept it from that."""
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def stop(self, drain_seconds: float | None = 0.0) -> None:
        """Drain (None: for as long as configured) and wait for the end, also of an engine's load. Harmless when it has ended already."""
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._drain_seconds = drain_seconds
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            await self.app.start()
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._started.set()
        await self._stop.wait()
        await self.app.drain(self._drain_seconds)
        if self.app.engine is not None and not self.app.engine.gave_up.is_set():
            await threads.ended()  # the process lives on, and may load another model

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def start_server(config: ServerConfig) -> RunningServer:
    """Start a server in this process and wait until it is SERVING.

    Raises:
        ConfigError, FileNotFoundError, UnsupportedModel: see `ServerApp.start`.
    """
    server = RunningServer(config)
    server.start()
    return server


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
