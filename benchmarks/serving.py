"""Serving: lopa over gRPC beside transformers, PEFT and vLLM, by load, by number of users, and with gradients.

    bash scripts/make_vllm_venv.sh                       # once; without it vLLM's figures are null
    python benchmarks/serving.py --json benchmarks/results/serving.json --plot docs/serving.png
    python benchmarks/serving.py --quick                 # fewer rounds: at most eight minutes
    python benchmarks/serving.py --only prefix streams   # these figures alone

Everybody serves the same Llama of 88 million random weights in bfloat16, greedily, past the end token, in a process of its own with the
same number of threads; who isn't measured is stopped. docs/serving.md explains every figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from lopa.bench.summary import pure_decode_tokens_per_second, summarize
from peers.model import make_model
from peers.process import ROOT, PeerFailed, PeerProcess, ended
from peers.worker import Job
from report import machine, write
from servebench import generation, gradients
from servebench.cache import kv_waste
from servebench.generation import UNCACHED
from servebench.server import Server, running_server

PEERS = ("gemm_floor", "hf_generate", "peft_lora", "vllm_embeds", "vllm_lora")
REQUESTS = 32
CROWD = 10_000
"""Users who come once."""
USERS_ROUNDS = 5
"""At least, by number of users: what is wanted there is as small as the difference between two rounds."""
FIGURES = (
    "ours_tokens_per_second",
    "ours_over_vllm_embeds",
    "ours_over_vllm_lora",
    "ours_over_peft_lora",
    "ours_over_hf_generate",
    "decode_share_of_gemm_floor",
    "users_10000_over_1",
    "users_10000_over_1_uncached",
    "personal_over_plain",
    "shared_prefix_overhead",
    "gradient_batch_gain",
    "gradient_gain_gemm_ceiling",
    "gradient_share_of_gemm_floor",
    "gradient_alone_share_of_gemm_floor",
    "stream_p99_under_gradients",
    "kv_waste",
    "server_bytes_per_idle_user",
)


@dataclass
class Report:
    """What has been measured so far."""

    figures: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(FIGURES))
    rows: list[dict[str, Any]] = field(default_factory=list)
    users: list[dict[str, Any]] = field(default_factory=list)
    """The rows by number of users, for the picture."""
    started: float = field(default_factory=time.perf_counter)

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:5.0f} s] {text}", flush=True)

    def set(self, name: str, value: float | None) -> None:
        self.figures[name] = value
        self.say(f"{name} = {'null' if value is None else f'{value:.3f}'}")


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    rounds: int
    quick: bool
    capacity: float
    """Our tokens per second, of which open loops take a part."""
    fm: Path
    threads: int
    """Of every system."""


def start_peers(names: Sequence[str], job: Job, folder: Path, vllm: Path, report: Report) -> dict[str, PeerProcess]:
    """Those that are installed and can be built here, built all at the same time."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    starting, peers = {}, {}
    for name in names:
        python = vllm / "bin" / "python" if name.startswith("vllm") else Path(sys.executable)
        if python.exists():
            starting[name] = PeerProcess.start(name, python, job, folder / f"{name}.log", environment)
        else:
            report.rows.append({"name": name, "missing": "no virtual environment for vLLM: scripts/make_vllm_venv.sh makes it"})
    try:
        for name, peer in starting.items():
            try:
                peer.built()
                peers[name] = peer
                report.say(f"{name} is ready")
            except PeerFailed as error:
                report.rows.append({"name": name, "missing": "it could not be built here"})
                report.say(f"{name} can't be measured: {error}")
    except BaseException:
        for peer in starting.values():
            peer.end()
        raise
    return peers


def side_by_side(server: Server, peers: Mapping[str, PeerProcess], rounds: int, report: Report) -> dict[str, float]:
    """Rounds in turn after one to warm up; median tokens per second of each system. Sets all figures that compare, unless rounds is 0."""
    speeds: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
    decoding: list[float] = []
    for number in range(rounds + 1):
        new = generation.NEW if number else 8
        for name, peer in peers.items():
            outcome = peer.round(number, new)
            speeds[name].append(outcome.tokens / outcome.seconds)
        with server.turn():
            workload = dataclasses.replace(generation.PERSONAL, new_tokens=(new, new), seed=number)
            result = generation.run(server, workload)
        speeds["ours"].append(summarize(result).tokens_per_second)
        decoding.append(pure_decode_tokens_per_second(result) or 0.0)
        report.say(f"round {number}: " + ", ".join(f"{name} {values[-1]:.0f}" for name, values in speeds.items()))
    medians = {name: median(values[1:] or values) for name, values in speeds.items()}
    if not rounds:
        return medians
    report.rows += [{"name": name, "tokens_per_second": medians[name], "rounds": values[1:]} for name, values in speeds.items()]
    report.set("ours_tokens_per_second", medians["ours"])
    for name in PEERS[1:]:
        report.set(f"ours_over_{name}", medians["ours"] / medians[name] if name in medians else None)
    report.set("decode_share_of_gemm_floor", median(decoding[1:]) / medians["gemm_floor"] if "gemm_floor" in medians else None)
    return medians


def _users(server: Server, plan: Plan, report: Report) -> None:
    counts = (1, 10_000) if plan.quick else (1, 10, 100, 1_000, 10_000)
    rows = generation.by_users(server, max(plan.rounds, USERS_ROUNDS), counts, 32 if plan.quick else 64)
    report.rows += rows
    report.users = [row for row in rows if not row["name"].endswith(UNCACHED)]
    report.set("users_10000_over_1", generation.ratio(rows, "10000 users", "1 users"))
    report.set("users_10000_over_1_uncached", generation.ratio(rows, *(f"{count} users{UNCACHED}" for count in (10_000, 1))))
    report.set("personal_over_plain", generation.ratio(rows, "10000 users", "plain model"))


def _loads(server: Server, plan: Plan, report: Report) -> None:
    report.rows += generation.closed_loops(server, plan.rounds)
    report.rows += generation.open_loops(server, plan.capacity, 8 if plan.quick else 60)


def _prefix(server: Server, plan: Plan, report: Report) -> None:
    prefix = generation.shared_prefix(server, plan.rounds)
    report.rows.append(prefix)
    report.set("shared_prefix_overhead", prefix["overhead"])


def _gradients(server: Server, plan: Plan, report: Report) -> None:
    gain = gradients.batch_gain(server, plan.fm, plan.threads, plan.rounds)
    report.rows.append(gain)
    report.set("gradient_batch_gain", gain["gain"])
    report.set("gradient_gain_gemm_ceiling", gain["gain_ceiling"])
    report.set("gradient_share_of_gemm_floor", gain["share_of_floor_mixed"])
    report.set("gradient_alone_share_of_gemm_floor", gain["share_of_floor_of_one"])


def _streams(server: Server, _plan: Plan, report: Report) -> None:
    ratio, streams = gradients.streams_under_gradients(server)
    report.rows += streams
    report.set("stream_p99_under_gradients", ratio)


def _waste(server: Server, _plan: Plan, report: Report) -> None:
    report.set("kv_waste", kv_waste(server, report.rows.append))


def _memory(server: Server, _plan: Plan, report: Report) -> None:
    sizes = generation.resident_after_crowds(server, CROWD)
    report.rows.append({"name": f"after crowds of {CROWD} users, each served once", "resident": sizes})
    report.set("server_bytes_per_idle_user", (sizes[-1] - sizes[0]) / (CROWD * (len(sizes) - 1)))


OURS = {
    "users": _users,
    "loads": _loads,
    "prefix": _prefix,
    "gradients": _gradients,
    "streams": _streams,
    "waste": _waste,
    "memory": _memory,
}
"""What needs no peer, in order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write machine, figures and rows here")
    parser.add_argument("--plot", type=Path, help="write a picture here")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and users: at most eight minutes")
    parser.add_argument("--rounds", type=int, help="default: 5, with --quick 2")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, help="default: all that are installed")
    parser.add_argument("--only", nargs="+", default=("peers", *OURS), choices=("peers", *OURS), help="measure these alone")
    parser.add_argument("--vllm", type=Path, default=ROOT / ".venv-vllm", help="vLLM's virtual environment")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of every system")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ended from outside, it still ends what it started
    rounds = args.rounds or (2 if args.quick else 5)
    report, systems = Report(), {}
    with tempfile.TemporaryDirectory(prefix="lopa-serving-") as name:
        folder = Path(name)
        fm = make_model(folder / "fm")
        job = Job(fm, REQUESTS, generation.ROWS + generation.OWN, args.threads)
        peers = start_peers(args.peers if "peers" in args.only else (), job, folder, args.vllm, report)
        with ended(peers), running_server(fm, folder, 64, args.threads) as server:
            report.say("lopa serve is ready")
            systems = side_by_side(server, peers, rounds if {"peers", "loads"} & set(args.only) else 0, report)
            plan = Plan(rounds, args.quick, systems["ours"], fm, args.threads)
            with server.turn():
                for section in (section for section in OURS if section in args.only):
                    OURS[section](server, plan, report)
    for figure, value in report.figures.items():
        print(f"{figure:32s} {'null' if value is None else f'{value:10.3f}'}")
    write(args.json, report.figures, report.rows)
    if args.plot is not None:
        from servebench.plot import draw

        draw(args.plot, systems, report.users, machine())


if __name__ == "__main__":
    main()
