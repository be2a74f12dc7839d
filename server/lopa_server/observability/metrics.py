"""What calls look like from outside, as Prometheus metrics, and the page that shows everything.

    metrics = Metrics()
    metrics.watch(lambda: engine)
    page = MetricsPage(metrics, "127.0.0.1", 9464)

Labels are methods, gRPC codes and reasons of the error catalogue: closed sets, so that no client can add a time series.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.process_collector import ProcessCollector

from lopa_server.engine.base import Engine
from lopa_server.observability.engine_metrics import EngineCollector, engine_pid

CALL_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
FIRST_TOKEN_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40)
GAP_SECONDS = (0.002, 0.004, 0.008, 0.012, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Upper bounds of histogram buckets."""


class Metrics:
    """One for the whole server, with a registry of its own, so that several servers in a process don't mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Histogram("lopa_rpc_seconds", "Duration of calls.", ["method", "code"], buckets=CALL_SECONDS, registry=self.registry)
        self.in_flight = Gauge("lopa_rpc_in_flight", "Calls under way.", ["method"], registry=self.registry)
        self.rejects = Counter(
            "lopa_rpc_rejects", "Calls that ended with an error of the catalogue.", ["method", "reason"], registry=self.registry
        )
        self.first_token = Histogram(
            "lopa_first_token_seconds", "From a call's start to its first token.", buckets=FIRST_TOKEN_SECONDS, registry=self.registry
        )
        self.gap = Histogram("lopa_inter_token_seconds", "Between a stream's messages.", buckets=GAP_SECONDS, registry=self.registry)
        ProcessCollector(registry=self.registry)

    def watch(self, engine: Callable[[], Engine | None]) -> None:
        """Show an engine's counters too, from the moment that there is one."""
        self.registry.register(EngineCollector(engine))
        ProcessCollector("lopa_engine", lambda: engine_pid(engine()), registry=self.registry)


class MetricsPage:
    """The metrics over HTTP, on a thread of its own."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """port 0: any free one. Raises OSError when the port is taken."""
        self._server, self._thread = start_http_server(port, host, metrics.registry)
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
