"""What of all this a server has switched on, started and ended together."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc

from lopa_server.config import ConfigError, ServerConfig
from lopa_server.engine.base import Engine

if TYPE_CHECKING:
    from lopa_server.observability.metrics import MetricsPage
    from lopa_server.observability.tracing import Tracing


class Observability:
    """Nothing is imported, measured or opened that the configuration doesn't ask for."""

    def __init__(self, config: ServerConfig, engine: Callable[[], Engine | None]) -> None:
        """engine: gives the running engine, None until there is one.

        Raises:
            ConfigError: the metrics' port is taken, or what tracing needs is not installed.
        """
        self.interceptors: list[grpc.aio.ServerInterceptor[Any, Any]] = []
        """To be put before all others."""
        self.metrics_address = ""
        """host:port of the metrics page, when there is one."""
        self._page: MetricsPage | None = None
        self._tracing: Tracing | None = None
        if config.traces:
            self._tracing = _tracing()
            self.interceptors.append(self._tracing)
        if config.metrics_port is not None:
            self._open_page(config.metrics_host, config.metrics_port, engine)

    def _open_page(self, host: str, port: int, engine: Callable[[], Engine | None]) -> None:
        from lopa_server.observability.interceptor import Observer
        from lopa_server.observability.metrics import Metrics, MetricsPage

        metrics = Metrics()
        metrics.watch(engine)
        try:
            self._page = MetricsPage(metrics, host, port)
        except OSError as error:
            raise ConfigError(f"can't listen on {host}:{port} for metrics: {error.strerror or error}") from error
        self.metrics_address = self._page.address
        self.interceptors.append(Observer(metrics))

    def close(self) -> None:
        """Close the page and send the last spans."""
        if self._page is not None:
            self._page.close()
        if self._tracing is not None:
            self._tracing.close()


def _tracing() -> Tracing:
    try:
        from lopa_server.observability.tracing import Tracing, exporting_provider
    except ModuleNotFoundError as error:
        raise ConfigError(f'traces need the Python package {error.name}: pip install "lopa[otel]"') from error
    return Tracing(exporting_provider(importlib.metadata.version("lopa")))
