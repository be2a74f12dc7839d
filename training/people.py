"""Write the population's examples: what trains the shared part of lopa-nano's bundle.

    python training/people.py --corpus build/corpus --out build/people

`population.jsonl` trains the shared part; on `development.jsonl`, other packages, its settings are chosen. `priors.jsonl` has the
population's examples of the tasks that get a prior. One row per example: user, task, prompt, target, append_end, prefix. The population
packages reached neither lopa-nano nor its encoder, and none of the held-out users is among them. Items are cut exactly as the demo
and the laboratory cut those of the held-out users.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the laboratory's tasks, from the repository's root

from lopa.demo.users import HELD_OUT, TASKS, NoSuchUser

from benchmarks.quality.functions import FUNCTION_TASKS
from benchmarks.quality.tasks import build

COMPLETION_EVERY = 6
"""Completion has little to learn and costs most to train on: every so-many-th package of the population takes part with it."""
PRIOR_TASKS = ("completion", *FUNCTION_TASKS)
"""Not filing, where every user has other labels: an average user's factors were tried as a start there and did harm."""
POPULATION_ITEMS = 160
"""Examples of each person of the population at most: persons count, and what the model read of each example stays in memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument("--out", type=Path, default=Path("build/people"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    packages: dict[str, dict[str, str]] = defaultdict(dict)
    for line in (args.corpus / "population.jsonl").open():
        row = json.loads(line)
        name = row["path"].removesuffix(".py").removeprefix(row["repo"] + "/")
        if not name.split("/")[-1].startswith("__"):
            packages[row["repo"]][name] = row["text"]
    overlap = set(packages) & set(HELD_OUT)
    if overlap:
        raise SystemExit(f"held-out users are in the population: {', '.join(sorted(overlap))}")
    split = json.loads((Path(__file__).parent / "split.json").read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    for role, completion_every, most in (("population", COMPLETION_EVERY, POPULATION_ITEMS), ("development", 1, None)):
        chosen = {user: packages[user] for user in split[role] if user in packages}
        write(args.out / f"{role}.jsonl", chosen, TASKS, completion_every, most, args.seed)
        if role == "population":
            write(args.out / "priors.jsonl", chosen, PRIOR_TASKS, 1, None, args.seed)


def write(
    path: Path, packages: dict[str, dict[str, str]], tasks: Sequence[str], completion_every: int, most: int | None, seed: int
) -> None:
    """The tasks of every package that has enough code, tuning items first. most: examples of each person, None for all."""
    persons, rows = 0, 0
    with path.open("w") as out:
        for number, (user, modules) in enumerate(packages.items()):
            for task in tasks:
                if task == "completion" and number % completion_every:
                    continue
                try:
                    data = build(user, task, modules, seed)
                except NoSuchUser as error:
                    print(f"left out: {error}")
                    continue
                persons += 1
                for item in (*data.tuning, *data.test)[:most]:
                    out.write(json.dumps({"user": user, "task": task, **asdict(item)}) + "\n")
                    rows += 1
    print(f"{path}: {persons} persons, {rows} examples")


if __name__ == "__main__":
    main()
