"""Trust: what strangers, fuzzers, floods, kills and curious tenants can do to a running server.

    python benchmarks/trust.py --json benchmarks/results/trust.json          # hours
    python benchmarks/trust.py --share 0.1 --only kills fuzz --json benchmarks/results/trust.json
    python benchmarks/trust.py --quick --json benchmarks/results/trust.json  # minutes: the same, with fewer of everything

Servers are `lopa serve` processes of lopa-nano with API keys; clients share the machine with them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from report import write
from trustbench.chaos import chaos
from trustbench.clients import p99
from trustbench.fuzz import Fuzzer, stopped_now_and_then
from trustbench.load import light_tenant, overload, soak
from trustbench.server import running
from trustbench.strangers import open_to_strangers
from trustbench.timing import p_value, timings

Figures = dict[str, float]
BATCH = 8
FLOOD = 50


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    fuzz: int = 50_000
    fuzz_stops: int = 5
    overload_seconds: float = 300.0
    light_streams: int = 300
    tunes: int = 16
    tune_steps: int = 200
    kills: int = 200
    soak_seconds: float = 1200.0
    timing_trials: int = 1000

    def scaled(self, share: float) -> Size:
        """This part of everything but the number of tunes at the same time."""
        values = {name: type(value)(value * share) for name, value in dataclasses.asdict(self).items()}
        return Size(**{**values, "tunes": self.tunes})


QUICK = Size(
    fuzz=1_500, fuzz_stops=1, overload_seconds=10.0, light_streams=60, tunes=4, tune_steps=12, kills=4, soak_seconds=40.0, timing_trials=150
)


def strangers(folder: Path, size: Size) -> Figures:
    del size
    with running(folder) as server:
        found, answered = open_to_strangers(server)
    return {"rpcs": found, "rpcs_open_to_strangers": len(answered)}


def fuzz(folder: Path, size: Size) -> Figures:
    with running(folder, "--threads", "1") as server:
        fuzzer = Fuzzer(server, seed=0, corpus=folder / "corpus")
        fuzzer.run(size.fuzz // 5)
        server.wait_idle()
        before = server.resident_bytes()
        with stopped_now_and_then(server, size.fuzz_stops) as stops:
            report = fuzzer.run(size.fuzz - size.fuzz // 5)
        idle, alive = server.wait_idle(), server.process.poll() is None
        growth, leaked = server.resident_bytes() / before - 1, server.metric("lopa_kv_blocks_used")
    for outcome, count in report.outcomes.most_common():
        print(f"  {count:6}  {outcome}")
    for entry in report.untyped[:10]:
        print(f"  untyped: {entry}")
    return {
        "fuzz_requests": report.requests,
        "fuzz_crashes": int(not alive),
        "fuzz_hangs": report.hangs + (not idle),
        "fuzz_untyped_errors": len(report.untyped),
        "fuzz_stops": len(stops),
        "fuzz_corpus": report.corpus,
        "fuzz_rss_growth": growth,
        "fuzz_leaked_blocks": leaked,
        "neighbour_streams": report.neighbour_streams,
        "neighbours_changed": report.neighbours_changed,
    }


def overloaded(folder: Path, size: Size) -> Figures:
    with running(folder, "--threads", "1", "--max-batch", str(BATCH), "--max-waiting", str(2 * BATCH)) as server:
        turns = overload(server, BATCH, size.overload_seconds)
    for name, phases in turns.items():
        for phase in phases:
            print(f"  {name}: {phase.clients.rate:.0f} tokens/s, refusals {dict(phase.clients.refusals)}, p99 {phase.clients.p99():.3f} s")
            print(f"    CPU: server {phase.server_cpu:.2f} cores, the clients' part {phase.generator_share:.0%}")
    rates = {name: [phase.clients.rate for phase in phases] for name, phases in turns.items()}
    rate = {name: fmean(values) for name, values in rates.items()}
    per_cpu = {name: fmean(phase.tokens_per_cpu_second for phase in phases) for name, phases in turns.items()}
    refusals = {name: sum(sum(phase.clients.refusals.values()) for phase in phases) for name, phases in turns.items()}
    first = {name: p99([seconds for phase in phases for seconds in phase.clients.first]) for name, phases in turns.items()}
    return {
        "peak_tokens_per_second": rate["peak"],
        "peak_p99_ttft_ms": 1000 * first["peak"],
        "overload_goodput": rate["patient"] / rate["peak"],
        "overload_goodput_lowest_turn": min(one / peak for one, peak in zip(*(rates[name] for name in ("patient", "peak")), strict=True)),
        "overload_goodput_impatient": rate["impatient"] / rate["peak"],
        "overload_goodput_per_server_cpu": per_cpu["patient"] / per_cpu["peak"],
        "overload_goodput_impatient_per_server_cpu": per_cpu["impatient"] / per_cpu["peak"],
        "overload_refusals": refusals["patient"],
        "overload_refusals_impatient": refusals["impatient"],
        "overload_refusal_cpu_ms": 1000 * fmean(phase.refusal_cpu_seconds(per_cpu["peak"]) for phase in turns["impatient"]),
        "overload_unhelpful_refusals": sum(phase.clients.unhelpful for phases in turns.values() for phase in phases),
        "overload_p99_ttft_ms": 1000 * first["patient"],
        "overload_p99_ttft_impatient_ms": 1000 * first["impatient"],
        "overload_generator_cpu_share": max(phase.generator_share for phases in turns.values() for phase in phases),
    }


def fair(folder: Path, size: Size) -> Figures:
    with running(folder, "--threads", "1", "--max-batch", str(BATCH)) as server:
        alone, beside = light_tenant(server, size.light_streams, FLOOD)
    return {
        "light_tenant_p99_alone_ms": 1000 * p99(alone),
        "light_tenant_p99_beside_ms": 1000 * p99(beside),
        "light_tenant_p99_ratio": p99(beside) / p99(alone),
        "light_tenant_median_alone_ms": 1000 * median(alone),
        "light_tenant_median_ratio": median(beside) / median(alone),
    }


def soaking(folder: Path, size: Size) -> Figures:
    with running(folder, "--threads", "1", "--max-batch", str(BATCH)) as server:
        result = soak(server, round(0.8 * BATCH), size.soak_seconds)
    return {
        "soak_rss_growth": result.growth,
        "soak_streams": result.finished,
        "leaked_blocks": result.leaked_blocks,
        "stuck_streams": int(result.stuck),
    }


def kills(folder: Path, size: Size) -> Figures:
    result = chaos(folder, size.tunes, size.tune_steps, size.kills)
    return {
        "kills": result.kills["server"],
        "engine_kills": result.kills["engine"],
        "device_kills": result.kills["device"],
        "tunes": size.tunes,
        "tunes_changed_by_kills": result.changed,
        "steps_repeated_by_kills": result.repeated,
        "streams_beside_kills": result.streams,
        "streams_changed_by_kills": result.wrong,
        "untyped_errors_beside_kills": result.untyped,
    }


def timing(folder: Path, size: Size) -> Figures:
    with running(folder, "--threads", "1") as server:
        across = p_value(*timings(server, "acme", "other", size.timing_trials))
        within = p_value(*timings(server, "acme", "acme", size.timing_trials // 3))
    return {"cache_timing_trials": size.timing_trials, "cache_timing_p_value": across, "cache_timing_p_value_same_tenant": within}


PARTS: dict[str, Callable[[Path, Size], Figures]] = {
    "strangers": strangers,
    "fuzz": fuzz,
    "overload": overloaded,
    "fair": fair,
    "soak": soaking,
    "kills": kills,
    "timing": timing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer of everything")
    parser.add_argument("--share", type=float, default=1.0, help="this part of every count and time, where the full ones take too long")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some parts")
    parser.add_argument("--json", type=Path, help="write the figures here; other parts' figures that are there stay")
    parser.add_argument("--work", type=Path, help="keep logs and the fuzzer's corpus in this folder")
    options = parser.parse_args()
    size = (QUICK if options.quick else Size()).scaled(options.share)
    rows = _others(options.json, options.only)
    with tempfile.TemporaryDirectory(prefix="lopa-trust-") as temporary:
        for name in options.only:
            print(name, flush=True)
            found = PARTS[name]((options.work or Path(temporary)) / name, size)
            rows += [{"part": name, "figure": figure, "value": value} for figure, value in found.items()]
            for figure, value in found.items():
                print(f"  {figure:34}{value:.4g}", flush=True)
            write(options.json, {row["figure"]: row["value"] for row in rows}, rows)


def _others(path: Path | None, parts: Sequence[str]) -> list[dict[str, Any]]:
    """Rows that the file has of other parts: parts may be run one by one into one file."""
    if path is None or not path.exists():
        return []
    return [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["part"] not in parts]


if __name__ == "__main__":
    main()
