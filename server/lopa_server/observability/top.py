"""`lopa top`: a live view of a server, from its metrics page."""

from __future__ import annotations

import time
from collections import deque
from typing import Annotated

import typer
from lopa.cli.output import fail
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lopa_server.observability.samples import NoMetrics, Reading, fetch, quantile, rate

WINDOW = 30
"""Readings that rates and quantiles look back over."""
RESIDENT = ("process_resident_memory_bytes", "lopa_engine_process_resident_memory_bytes")
"""Of the server, and of its engine where that has a process of its own."""
SPARKS = " ▁▂▃▄▅▆▇█"


def top(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The metrics page, HOST:PORT.", show_default=False)],
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between readings.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Read twice, print, and end.")] = False,
) -> None:
    """Watch a server live: throughput, queue, batch, cache, latencies, errors. It needs `lopa serve --metrics-port`."""
    readings: deque[Reading] = deque(maxlen=WINDOW)
    speeds: deque[float] = deque(maxlen=60)
    try:
        readings.append(fetch(address, time.monotonic()))
        if once:
            time.sleep(interval)
            readings.append(fetch(address, time.monotonic()))
            Console().print(view(address, readings, speeds))
            return
        with Live(view(address, readings, speeds), screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                readings.append(fetch(address, time.monotonic()))
                speeds.append(rate(readings[-2], readings[-1], "lopa_generated_tokens_total"))
                live.update(view(address, readings, speeds), refresh=True)
    except NoMetrics as error:
        fail(str(error))
    except KeyboardInterrupt:
        return


def view(address: str, readings: deque[Reading], speeds: deque[float]) -> RenderableType:
    """One picture of the last reading, against the oldest one in the window."""
    now, before = readings[-1], readings[0]
    model = next(iter(now.samples.get("lopa_model_info", {})), ())
    about = dict(model)
    name = (about.get("name", "loading …"), "bold cyan")
    title = Text.assemble(("lopa top", "bold"), f"  {address}  ", name, f"  {about.get('dtype', '')}")
    panels = Table.grid(expand=True)
    for _ in range(3):
        panels.add_column(ratio=1)
    panels.add_row(_work(before, now), _cache(before, now), _latency(before, now))
    return Group(title, _sparkline(speeds), panels, _calls(before, now), Text(f"over the last {now.at - before.at:.0f} s", style="dim"))


def _sparkline(speeds: deque[float]) -> Text:
    highest = max(speeds, default=0.0) or 1.0
    bars = "".join(SPARKS[round(speed / highest * (len(SPARKS) - 1))] for speed in speeds)
    return Text.assemble((f"{speeds[-1] if speeds else 0:8.0f} tokens/s ", "bold green"), (bars, "green"))


def _grid(title: str, rows: list[tuple[str, RenderableType]]) -> Panel:
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, value)
    return Panel(table, title=title, title_align="left")


def _work(before: Reading, now: Reading) -> Panel:
    steps = rate(before, now, "lopa_steps_total")
    rows = rate(before, now, "lopa_step_rows_total")
    return _grid(
        "work",
        [
            ("streams running", f"{now.total('lopa_streams_running'):.0f}"),
            ("streams waiting", f"{now.total('lopa_streams_waiting'):.0f}"),
            ("pairs waiting", f"{now.total('lopa_pairs_waiting'):.0f}"),
            ("generated tokens/s", f"{rate(before, now, 'lopa_generated_tokens_total'):.0f}"),
            ("prefilled tokens/s", f"{rate(before, now, 'lopa_prefill_tokens_total'):.0f}"),
            ("pairs/s", f"{rate(before, now, 'lopa_pairs_total'):.1f}"),
            ("rows per step", f"{rows / steps if steps else 0:.1f}"),
        ],
    )


def _cache(before: Reading, now: Reading) -> Panel:
    total, used, cached = (now.total(f"lopa_kv_{name}") for name in ("blocks", "blocks_used", "blocks_cached"))
    capacity = used * now.total("lopa_kv_block_size")
    hits, computed = rate(before, now, "lopa_prefix_hit_tokens_total"), rate(before, now, "lopa_prefill_tokens_total")
    return _grid(
        "key-value cache",
        [
            ("used", ProgressBar(total=total or 1, completed=used, width=18)),
            ("blocks used", f"{used:.0f} of {total:.0f}"),
            ("blocks cached", f"{cached:.0f}"),
            ("wasted in use", f"{100 * (1 - now.total('lopa_kv_positions') / capacity):.1f} %" if capacity else "-"),
            ("prefix hits", f"{100 * hits / (hits + computed):.0f} %" if hits + computed else "-"),
            ("preemptions", f"{now.total('lopa_preemptions_total'):.0f}"),
            ("memory", f"{sum(map(now.total, RESIDENT)) / 2**20:.0f} MiB"),
        ],
    )


def _latency(before: Reading, now: Reading) -> Panel:
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(style="dim")
    for _ in range(3):
        table.add_column(justify="right")
    table.add_row("milliseconds", "p50", "p95", "p99")
    for title, name in (("first token", "lopa_first_token_seconds"), ("between tokens", "lopa_inter_token_seconds")):
        values = [quantile(before, now, name, q) for q in (0.5, 0.95, 0.99)]
        table.add_row(title, *("-" if value is None else f"{1000 * value:.0f}" for value in values))
    return Panel(table, title="latency", title_align="left")


def _calls(before: Reading, now: Reading) -> Table:
    table = Table(expand=True, box=None, header_style="dim")
    for name in ("method", "under way", "calls/s", "ended with", "refused with"):
        table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
    methods = sorted({dict(key)["method"] for key in now.samples.get("lopa_rpc_seconds_count", {})})
    for method in methods:
        calls = now.samples["lopa_rpc_seconds_count"]
        codes = {dict(key)["code"]: count for key, count in calls.items() if dict(key)["method"] == method}
        rejects = now.samples.get("lopa_rpc_rejects_total", {})
        reasons = {dict(key)["reason"]: count for key, count in rejects.items() if dict(key)["method"] == method}
        table.add_row(
            method.rpartition(".")[2],
            f"{now.total('lopa_rpc_in_flight', method=method):.0f}",
            f"{rate(before, now, 'lopa_rpc_seconds_count', method=method):.1f}",
            ", ".join(f"{code} {count:.0f}" for code, count in sorted(codes.items())),
            ", ".join(f"{reason} {count:.0f}" for reason, count in sorted(reasons.items())) or "-",
        )
    return table
