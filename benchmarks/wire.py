"""What each wire precision costs: the same tuning runs with soft prompts and gradients as F32, F16, BF16 and I8.

    python benchmarks/wire.py --json benchmarks/results/wire.json

Users of the demo (packages that nothing was trained on) tune lopa-nano on a server in this process, once for each precision, from the
same seed; what counts is the loss on test items, with soft prompts sent as they were in tuning. `cost_*`: change of that loss against
F32 both ways, in percent, mean over runs; `bytes_*`: message bytes per example and step, both ways.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import lopa
from lopa.demo.device import examples, nll_per_token
from lopa.demo.users import load_task
from lopa_server.app import ServerConfig, start_server
from lopa_server.models import nano_bundle_folder, nano_folder
from report import write

PRECISIONS = (("F32", "F32"), ("F16", "F16"), ("BF16", "BF16"), ("I8", "BF16"), ("I8", "I8"))
"""(soft prompt, gradient)."""


def measure(client: lopa.Client, folder: Path, user: str, task: str, precision: tuple[Any, Any], steps: int, seed: int) -> dict[str, Any]:
    """One run: the loss on test items, and what went over the wire."""
    data, (soft, gradient) = load_task(user, task), precision
    persona = client.personal(folder / f"{soft}-{gradient}-{user}-{task}-{seed}")
    report = persona.tune(
        examples(data.tuning),
        steps=steps,
        dtype=soft,
        gradient_dtype=gradient,
        seed=seed,
        validation=0.1,
        validate_every=max(1, steps // 4),
        placement="after_prefix" if task == "filing" else "front",
    )
    metered, few = client.metered(), examples(data.tuning)[:8]
    rows = persona.soft_prompts([item.text for item in data.tuning[:8]])
    pairs = [lopa.Pair(one.prompt, one.target, row, one.append_end, one.prefix) for one, row in zip(few, rows, strict=True)]
    metered.prompt_gradients(pairs, dtype=soft, gradient_dtype=gradient, placement=persona.placement)
    return {
        "user": user,
        "task": task,
        "seed": seed,
        "soft_prompt": soft,
        "gradient": gradient,
        "test_nll": nll_per_token(persona.score(examples(data.test), dtype=soft)),
        "validation_nll": report.end_nll,
        "bytes_per_example": (metered.traffic.sent_bytes + metered.traffic.received_bytes) / len(pairs),
    }


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean change of the test loss against F32 of the same run, and bytes, by precision."""
    exact = {(row["user"], row["task"], row["seed"]): row["test_nll"] for row in rows if row["gradient"] == "F32"}
    figures = {}
    for soft, gradient in PRECISIONS:
        chosen = [row for row in rows if (row["soft_prompt"], row["gradient"]) == (soft, gradient)]
        name = f"{soft}_{gradient}".lower()
        changes = [100 * (row["test_nll"] / exact[row["user"], row["task"], row["seed"]] - 1) for row in chosen]
        figures |= {f"cost_{name}_percent": mean(changes), f"worst_{name}_percent": max(changes)}
        figures[f"bytes_{name}"] = mean(row["bytes_per_example"] for row in chosen)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write machine, figures and rows here")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--run", action="append", help="USER/TASK; may be repeated")
    args = parser.parse_args()
    rows = []
    server = ServerConfig(fm=nano_folder(), bundle=nano_bundle_folder())
    with tempfile.TemporaryDirectory() as folder, start_server(server) as running, lopa.connect(running.address) as client:
        for run in args.run or ("email/filing", "tkinter/filing", "asyncio/completion"):
            for seed in range(args.seeds):
                for precision in PRECISIONS:
                    user, task = run.split("/")
                    rows.append(measure(client, Path(folder), user, task, precision, args.steps, seed))
                    print(" ".join(f"{value:.5f}" if isinstance(value, float) else str(value) for value in rows[-1].values()), flush=True)
    figures = summarize(rows)
    for name, value in figures.items():
        print(f"{name:28s} {value:12.4f}")
    write(args.json, figures, rows)


if __name__ == "__main__":
    main()
