"""What each wire precision costs: the same tuning runs with soft prompts and gradients as F32, BF16 and I8.

    python benchmarks/wire.py --seeds 10 --json benchmarks/results/wire.json

Users of the demo (packages that nothing was trained on) tune lopa-nano on a server in this process: for every user, task and seed once
with each precision, over the same examples in the same order. What counts is the loss on test items, with soft prompts sent as they were
in tuning, and only its change against F32 of the same run.

`cost_NAME_TASK_percent`: the mean of these changes. `interval_NAME_TASK_percent`: half of its 95 % interval (Student's t over runs).
`send_DTYPE`: factors tuned with F32, and only the test's soft prompts sent in that precision: what it costs in generation.
`order` (with --arm): F32 in requests of three pairs, whose sums are rounded in another order: how far rounding alone leads.
`bytes_NAME`: message bytes per example and step, both ways.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lopa
import torch
from lopa.demo.device import PLANS, examples, nll_per_token
from lopa.demo.users import STDLIB_USERS, load_task
from lopa_server.app import ServerConfig, start_server
from lopa_server.models import nano_bundle_folder, nano_folder
from report import write


@dataclass(frozen=True)
class Arm:
    """One way to do the same run."""

    soft: Any
    gradient: Any
    microbatch: int = 0


ARMS = {"f32": Arm("F32", "F32"), "order": Arm("F32", "F32", 3), "bf16": Arm("BF16", "BF16"), "i8": Arm("I8", "I8")}
SENT = ("BF16", "I8")


@dataclass(frozen=True)
class Run:
    """What is the same for all arms."""

    user: str
    task: str
    seed: int
    steps: int
    items: int
    """Of the user's tuning items, the first so many; they are in random order."""


def measure(client: lopa.Client, folder: Path, run: Run, name: str) -> dict[str, Any]:
    """One run of one arm: the loss on test items, and what went over the wire."""
    data, arm, plan = load_task(run.user, run.task), ARMS[name], PLANS[run.task]
    persona, tuning = client.personal(folder / f"{name}-{run.user}-{run.task}-{run.seed}"), data.tuning[: run.items]
    report = persona.tune(
        examples(tuning),
        steps=run.steps,
        batch_size=8,
        dtype=arm.soft,
        gradient_dtype=arm.gradient,
        microbatch=arm.microbatch,
        seed=run.seed,
        validation=0.1,
        validate_every=max(1, run.steps // 2),
        placement=plan.placement,
    )
    test = examples(data.test)
    row = {"user": run.user, "task": run.task, "seed": run.seed, "arm": name, "end_nll": report.end_nll}
    row["test_nll"] = nll_per_token(persona.score(test, dtype=arm.soft))
    if name == "f32":
        row |= {f"send_{dtype.lower()}_nll": nll_per_token(persona.score(test, dtype=dtype)) for dtype in SENT}
    return row | {"bytes_per_example": step_bytes(client, persona, tuning, arm)}


def step_bytes(client: lopa.Client, persona: lopa.Persona, items: Sequence[Any], arm: Arm) -> float:
    """Message bytes of one request for gradients and its answer, per example."""
    metered, few = client.metered(), examples(items)[:8]
    rows = persona.soft_prompts([item.text for item in items[:8]])
    pairs = [lopa.Pair(one.prompt, one.target, row, one.append_end, one.prefix) for one, row in zip(few, rows, strict=True)]
    metered.prompt_gradients(pairs, dtype=arm.soft, gradient_dtype=arm.gradient, placement=persona.placement)
    return (metered.traffic.sent_bytes + metered.traffic.received_bytes) / len(pairs)


def half_interval(changes: Sequence[float]) -> float:
    """Half the width of the mean's 95 % interval; infinite for a single run."""
    if len(changes) < 2:
        return math.inf
    freedom = len(changes) - 1
    # Student's t at 97.5 % by the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5): within 0.5 % from 4 degrees of freedom on.
    x = 1.959964
    quantile = x + (x**3 + x) / (4 * freedom) + (5 * x**5 + 16 * x**3 + 3 * x) / (96 * freedom**2)
    return quantile * stdev(changes) / math.sqrt(len(changes))


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Changes of the test loss against F32 of the same run, by task and arm, and bytes by arm."""
    exact = {(row["user"], row["task"], row["seed"]): row for row in rows if row["arm"] == "f32"}
    figures: dict[str, float] = {}

    def tell(name: str, changes: Sequence[float]) -> None:
        figures.update({f"cost_{name}_percent": mean(changes), f"interval_{name}_percent": half_interval(changes)})

    for task in sorted({row["task"] for row in rows}):
        base = [row for row in exact.values() if row["task"] == task]
        figures[f"runs_{task}"] = len(base)
        for name in sorted({row["arm"] for row in rows} - {"f32"}):
            chosen = [row for row in rows if (row["task"], row["arm"]) == (task, name)]
            pairs = [(row["test_nll"], exact[row["user"], row["task"], row["seed"]]["test_nll"]) for row in chosen]
            tell(f"{name}_{task}", [100 * (nll / f32 - 1) for nll, f32 in pairs])
        for dtype in map(str.lower, SENT):
            tell(f"send_{dtype}_{task}", [100 * (row[f"send_{dtype}_nll"] / row["test_nll"] - 1) for row in base])
    for name in ARMS:
        if sizes := [row["bytes_per_example"] for row in rows if row["arm"] == name]:
            figures[f"bytes_{name}"] = mean(sizes)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write machine, figures and rows here")
    parser.add_argument("--seeds", type=int, default=1, help="of every user and task")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--items", type=int, default=96)
    parser.add_argument("--task", action="append", choices=("completion", "filing"))
    parser.add_argument("--user", action="append", choices=STDLIB_USERS)
    parser.add_argument("--arm", action="append", choices=[name for name in ARMS if name != "f32"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    server = ServerConfig(fm=nano_folder(), bundle=nano_bundle_folder(), threads=1, kv_memory_mib=512)
    patient = lopa.ClientConfig(timeout=1e6)  # a machine that pauses this process makes the server's own estimates long
    with tempfile.TemporaryDirectory() as folder, start_server(server) as running, lopa.connect(running.address, config=patient) as client:
        for seed in range(args.seeds):
            for user in args.user or ("asyncio", "email", "tkinter"):
                for task in args.task or ("completion", "filing"):
                    for name in ("f32", *(args.arm or ("i8",))):
                        rows.append(measure(client, Path(folder), Run(user, task, seed, args.steps, args.items), name))
                        print(*(f"{value:.5f}" if isinstance(value, float) else value for value in rows[-1].values()), flush=True)
                    write(args.json, summarize(rows), rows)
    for name, value in summarize(rows).items():
        print(f"{name:36s} {value:12.4f}")


if __name__ == "__main__":
    main()
