"""What the completion prior knows of code, and what only of where the laboratory's items are cut.

NLL of held-out users' test items with the border between prompt and target where the laboratory has it, at the end of a line, and with
the same text's border moved into the middle of the target's first long line.

    python benchmarks/borders.py --json benchmarks/results/borders.json
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

if not __package__:  # run as a file: the packages are found from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lopa.demo.users import Item, TaskData
from lopa.factors import Factors
from lopa.priors import read_priors

from benchmarks import report
from benchmarks.quality.laboratory import Laboratory
from benchmarks.quality.learners.device import DeviceLearner
from benchmarks.quality.learners.learner import losses_without_soft_prompt
from benchmarks.quality.material import prepare
from benchmarks.quality.methods import Bench
from benchmarks.quality.store import Store
from benchmarks.quality.tasks import USERS, build, held_out_modules

BORDERS = ("line end", "inside a line")
LONG = 12
"""Characters of code in a line that the border may be moved into."""


def moved(item: Item, rng: random.Random) -> Item | None:
    """The same text with its border inside a line; None where the target has no line long enough."""
    at = 0
    for line in item.target.splitlines(keepends=True):
        code = line.strip()
        if len(code) >= LONG:
            border = at + line.index(code) + rng.randrange(3, len(code) - 3)
            return replace(item, prompt=item.prompt + item.target[:border], target=item.target[border:])
        at += len(line)
    return None


def measure(bench: Bench, users: tuple[str, ...], seed: int) -> Iterator[dict[str, Any]]:
    """A row for each user and border: nats per target token of the plain model and of the prior alone."""
    rng, prior = random.Random(seed), read_priors(bench.encoder.bundle)["completion"]
    for user in users:
        data = build(user, "completion", held_out_modules(user), seed)
        pairs = [(item, other) for item in data.test if (other := moved(item, rng))]
        for border, items in zip(BORDERS, zip(*pairs, strict=True), strict=True):
            yield {"user": user, "border": border, "items": len(items), **nll(bench, replace(data, tuning=items, test=()), prior)}


@torch.no_grad()
def nll(bench: Bench, data: TaskData, prior: Factors) -> dict[str, float]:
    """Over all items of the data, none of them tuned on."""
    material = prepare(data, bench.fm, bench.encoder, None, 0)
    learner = DeviceLearner(bench.fm, bench.encoder, material, priors=False)
    learner.restore(prior.tensors)
    rows = range(len(material.items))
    plain = losses_without_soft_prompt(bench.fm, material.of(rows))
    return {"plain_nll": plain.mean().item(), "prior_nll": learner.losses(rows, material.of(rows)).mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    bench = Laboratory(Store(Path("build/none.jsonl")), Path("build/quality")).bench
    rows = []
    for row in measure(bench, USERS, args.seed):
        rows.append(row)
        print(f"{row['user']:16s} {row['border']:14s} plain {row['plain_nll']:.3f}  prior {row['prior_nll']:.3f}", flush=True)
    figures = {}
    for border in BORDERS:
        gains = [1 - row["prior_nll"] / row["plain_nll"] for row in rows if row["border"] == border]
        figures[f"prior_gain_{border.replace(' ', '_')}"] = fmean(gains)
    for name, value in figures.items():
        print(f"{name:32s} {value:.4f}")
    report.write(args.json, figures, rows)


if __name__ == "__main__":
    main()
