"""What clip-and-noise costs: one user's filing, tuned and measured with noise on soft prompts, and with noise on gradients.

    python benchmarks/noise.py --json benchmarks/results/noise.json

Clips are the median norms of what is clipped, measured first on untuned factors. `noise` is each value's standard deviation over the
clip; at m * d values its norm is noise * sqrt(m * d) times the clip, given as `relative`.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import lopa
import numpy as np
from lopa.demo.device import PLANS, accuracy, examples, nll_per_token, personal_scores
from lopa.demo.users import TaskData, load_task
from lopa_server.app import ServerConfig, start_server
from lopa_server.models import nano_bundle_folder, nano_folder
from report import write

LEVELS = (0.0, 0.002, 0.01, 0.05)


@dataclass(frozen=True)
class Arm:
    """Where there is noise, and how much."""

    where: str
    noise: lopa.ClipAndNoise | None


@contextmanager
def connected(arm: Arm, cache: Path) -> Iterator[lopa.Client]:
    """A client and a server of its own."""
    gradient, soft = (arm.noise if arm.where == place else None for place in ("gradient", "soft prompt"))
    server = ServerConfig(fm=nano_folder(), bundle=nano_bundle_folder(), gradient_noise=gradient, step_positions=4096)
    config = lopa.ClientConfig(cache=cache, soft_prompt_noise=soft, timeout=3600)
    with start_server(server) as running, lopa.connect(running.address, config=config) as client:
        yield client


def norms(client: lopa.Client, folder: Path, data: TaskData) -> dict[str, float]:
    """Median L2 norms of the soft prompts and of their gradients, on tuning items."""
    persona, items = client.personal(folder), data.tuning[:64]
    soft = persona.soft_prompts([item.text for item in items])
    pairs = [
        lopa.Pair(item.prompt, item.target, append_end=True, prefix=item.prefix or None, soft_prompt=rows)
        for item, rows in zip(items, soft, strict=True)
    ]
    gradients = client.prompt_gradients(pairs, placement=PLANS["filing"].placement)
    found = {"soft prompt": soft, "gradient": [item.gradient for item in gradients]}
    return {where: float(np.median([np.linalg.norm(array) for array in arrays])) for where, arrays in found.items()}


def measure(arm: Arm, folder: Path, data: TaskData, steps: int) -> dict[str, float]:
    """Tune and measure, with the noise everywhere that it would be."""
    with connected(arm, folder / "cache") as client:
        persona = client.personal(folder / f"{arm.where}-{arm.noise}")
        report = persona.tune(examples(data.tuning), validation=0.1, seed=0, **asdict(replace(PLANS["filing"], steps=steps)))
        return {"nll": nll_per_token(personal_scores(persona, data.test)), "accuracy": accuracy(client, persona, data), "kept": report.kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--user", default="tkinter")
    parser.add_argument("--steps", type=int, default=PLANS["filing"].steps)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data, rows = load_task(options.user, "filing"), []
    with tempfile.TemporaryDirectory(prefix="lopa-noise-") as temporary:
        folder = Path(temporary)
        with connected(Arm("nowhere", None), folder / "cache") as client:
            clips, model = norms(client, folder / "norms", data), client.model
            values = client.bundle().manifest.rows * model.hidden_size
        arms = [Arm("nowhere", None)]
        arms += [Arm(where, lopa.ClipAndNoise(clip, noise)) for where, clip in clips.items() for noise in LEVELS]
        for arm in arms:
            noise = arm.noise.noise if arm.noise is not None else 0.0
            row = {"where": arm.where, "clip": arm.noise.clip if arm.noise else None, "noise": noise}
            row |= {"relative": noise * math.sqrt(values), "steps": options.steps, **measure(arm, folder, data, options.steps)}
            rows.append(row)
            print(row, flush=True)
            figures = {f"{row['where']} {row['noise']:g} nll".replace(" ", "_"): row["nll"] for row in rows}
            write(options.json, figures, rows)


if __name__ == "__main__":
    main()
