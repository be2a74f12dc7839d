"""What an operator sees: the metrics page against what clients did, the dashboard against the page, spans, `lopa top`."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import re
import urllib.request
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import grpc
import lopa
import pytest
from lopa.v1 import tuning_pb2
from lopa_server.app import ConfigError, RunningServer, ServerConfig, start_server
from lopa_server.engine.base import EngineStats
from lopa_server.observability import setup
from lopa_server.observability.engine_metrics import COUNTERS, GAUGES
from lopa_server.observability.samples import NoMetrics, Reading, fetch, parse, quantile, rate
from lopa_server.observability.top import top, view
from lopa_server.observability.tracing import Tracing
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from rich.console import Console

from tests.server.client import Client, failure, generate_request, pair, soft_prompt

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy/grafana/lopa.json"
DOCS = DASHBOARD.parents[2] / "docs/observability.md"
GENERATE = "/lopa.v1.Inference/Generate"


@pytest.fixture(scope="module")
def observed(tiny_fm: Path) -> Iterator[RunningServer]:
    with start_server(ServerConfig(fm=tiny_fm, threads=1, metrics_port=0, engine_process=True)) as server:
        yield server


@pytest.fixture
def asking(observed: RunningServer) -> Iterator[Client]:
    with grpc.insecure_channel(observed.address) as channel:
        yield Client(channel)


def page(server: RunningServer) -> Reading:
    """Once no call is under way any more: a client has its answer a moment before the server has counted it."""
    for _ in range(1000):
        reading = fetch(server.app.metrics_address, 0.0)
        if not reading.total("lopa_rpc_in_flight"):
            return reading
    raise AssertionError("calls are still under way")


def test_the_page_counts_what_clients_did(observed: RunningServer, asking: Client) -> None:
    before = page(observed)
    tokens = asking.tokens(generate_request(soft=soft_prompt(1)))
    asking.tuning.PromptGradients(tuning_pb2.PromptGradientsRequest(pairs=[pair(0), pair(1)]))
    failure(lambda: asking.generate(generate_request(temperature=-1.0)))
    now = page(observed)

    def grown(name: str, **labels: str) -> float:
        return now.total(name, **labels) - before.total(name, **labels)

    assert grown("lopa_generated_tokens_total") == len(tokens) == 12
    assert grown("lopa_pairs_total") == 2
    assert grown("lopa_rpc_seconds_count", method=GENERATE, code="OK") == 1
    assert grown("lopa_rpc_seconds_count", method=GENERATE, code="INVALID_ARGUMENT") == 1
    assert grown("lopa_rpc_rejects_total", method=GENERATE, reason="OUT_OF_RANGE") == 1
    assert grown("lopa_first_token_seconds_count") == 1
    assert 1 <= grown("lopa_inter_token_seconds_count") <= 11
    assert now.total("lopa_rpc_in_flight") == 0
    assert now.total("lopa_streams_running") == 0
    assert now.total("lopa_kv_blocks") > 0


def test_calls_under_way_and_cancelled_ones_are_seen(observed: RunningServer, asking: Client) -> None:
    before = page(observed)
    call = asking.inference.Generate(generate_request(max_tokens=400))
    next(iter(call))
    assert fetch(observed.app.metrics_address, 0.0).total("lopa_rpc_in_flight", method=GENERATE) == 1
    call.cancel()
    asking.tokens(generate_request())
    now = page(observed)
    assert now.total("lopa_rpc_seconds_count", code="CANCELLED") == before.total("lopa_rpc_seconds_count", code="CANCELLED") + 1


def test_unknown_methods_make_no_series(observed: RunningServer) -> None:
    with grpc.insecure_channel(observed.address) as channel:
        for name in ("a", "b"):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/made.up/{name}")(b"")
    methods = {dict(key)["method"] for key in page(observed).samples["lopa_rpc_seconds_count"]}
    assert "other" in methods and not any("made.up" in method for method in methods)


def test_every_panel_asks_for_metrics_that_exist(observed: RunningServer, asking: Client) -> None:
    asking.tokens(generate_request())
    failure(lambda: asking.generate(generate_request(temperature=-1.0)))
    known = set(page(observed).samples)
    queries = [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\b(?:lopa|process)_\w+", query)}
    assert len(queries) > 15
    assert asked <= known


def test_every_counter_of_the_engine_is_shown_and_explained(observed: RunningServer) -> None:
    shown = {field for field, _ in (*GAUGES.values(), *COUNTERS.values())}
    assert {field.name for field in dataclasses.fields(EngineStats)} - shown == {"seconds", "pid"}
    samples = [name for name in page(observed).samples if name.startswith("lopa_") and not name.endswith("_created")]
    names = {re.sub(r"_(bucket|sum|count)$|(?<=_process_).+", "", name) for name in samples}
    explained = set(re.findall(r"lopa_\w+", DOCS.read_text()))
    assert names <= explained


def test_the_page_tells_nothing_about_requests(observed: RunningServer, asking: Client) -> None:
    asking.tokens(generate_request("a secret word"))
    with urllib.request.urlopen(f"http://{observed.app.metrics_address}/metrics") as response:
        text = response.read().decode()
    assert "secret" not in text


def test_a_taken_port_is_a_configuration_error(observed: RunningServer, tiny_fm: Path) -> None:
    port = int(observed.app.metrics_address.rpartition(":")[2])
    with pytest.raises(ConfigError, match="for metrics"):
        start_server(ServerConfig(fm=tiny_fm, threads=1, metrics_port=port))


def test_quantiles_and_rates_are_those_of_the_time_between() -> None:
    def reading(at: float, low: int, high: int) -> Reading:
        buckets = f'x_bucket{{le="1.0"}} {low}\nx_bucket{{le="2.0"}} {high}\nx_bucket{{le="+Inf"}} {high}\n'
        return parse(f"# TYPE x histogram\n{buckets}x_sum 1\nx_count {high}\n# TYPE c counter\nc_total {high}\n", at)

    first, second = reading(0.0, 100, 100), reading(2.0, 110, 120)
    assert quantile(first, second, "x", 0.25) == pytest.approx(0.5)
    assert quantile(first, second, "x", 0.75) == pytest.approx(1.5)
    assert quantile(second, second, "x", 0.5) is None
    assert rate(first, second, "c_total") == 10
    assert rate(second, first, "c_total") == 0


def test_top_shows_a_server_and_says_where_there_is_none(
    observed: RunningServer, asking: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    asking.tokens(generate_request())
    readings = deque([page(observed), page(observed)])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(view("somewhere", readings, deque([1.0, 2.0])))
    text = console.export_text()
    assert all(word in text for word in ("llama", "streams running", "Inference/Generate", "OK"))
    assert observed.app.metrics_address
    with pytest.raises(SystemExit):
        top("127.0.0.1:1", interval=1.0, once=True)
    assert "--metrics-port" in capsys.readouterr().err
    assert issubclass(NoMetrics, OSError)


def test_spans_continue_the_clients_trace_and_hold_no_content(tiny_fm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(setup, "_tracing", lambda: Tracing(provider))
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    metadata = (("traceparent", f"00-{trace}-{parent}-01"),)
    with start_server(ServerConfig(fm=tiny_fm, threads=1, traces=True)) as server, grpc.insecure_channel(server.address) as channel:
        client = Client(channel)
        list(client.inference.Generate(generate_request("a secret word"), metadata=metadata))
        failure(lambda: client.generate(generate_request(temperature=-1.0)))
    good, bad = spans.get_finished_spans()
    assert f"{good.context.trace_id:032x}" == trace and f"{good.parent.span_id:016x}" == parent
    assert good.name == GENERATE[1:]
    assert dict(good.attributes) == {
        "rpc.system": "grpc",
        "rpc.service": "lopa.v1.Inference",
        "rpc.method": "Generate",
        "rpc.grpc.status_code": 0,
    }
    assert bad.attributes["rpc.grpc.status_code"] == 3 and bad.attributes["error.type"] == "OUT_OF_RANGE"
    assert "secret" not in good.to_json()


def test_the_devices_calls_are_children_of_the_apps_span(tiny_fm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams and calls with one reply alike, of the blocking client and of the asynchronous one."""
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(setup, "_tracing", lambda: Tracing(provider))
    with start_server(ServerConfig(fm=tiny_fm, threads=1, traces=True, metrics_port=0)) as server:

        async def ask() -> None:
            async with lopa.connect_async(server.address) as client:
                await client.generate("def", max_tokens=2)

        with lopa.connect(server.address) as client, provider.get_tracer("app").start_as_current_span("app") as app:
            client.generate("def", max_tokens=2)
            client.score([lopa.Pair("def", " add")])
            asyncio.run(ask())
    of_app = [span for span in spans.get_finished_spans() if span.parent is not None]
    assert {span.parent.span_id for span in of_app} == {app.get_span_context().span_id}
    assert [span.name.rpartition("/")[2] for span in of_app if "GetModel" not in span.name] == ["Generate", "Score", "Generate"]
