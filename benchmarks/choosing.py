"""Which prior a new user gets, and what a wrong one would cost: invented tasks with labels of the user's own, and held-out users' code.

The bundle's priors are of other kinds than the invented tasks, and better than nothing on every example of them all the same: they know
what an answer looks like. Each draw is tuned twice: as a device does, which puts a prior on trial, and with the prior taken at once.

    python benchmarks/choosing.py --json benchmarks/results/choosing.json
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

if not __package__:  # run as a file: the packages are found from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lopa.demo.users import Item, TaskData
from lopa.priors import TRIAL_STEPS

from benchmarks import report
from benchmarks.quality.cell import STEPS, Cell, accuracy, score, tune
from benchmarks.quality.grid import LIKE_TASK, load_rates
from benchmarks.quality.laboratory import Laboratory
from benchmarks.quality.learners.device import DeviceLearner
from benchmarks.quality.material import Material, prepare
from benchmarks.quality.methods import Bench
from benchmarks.quality.store import Store
from benchmarks.quality.tasks import USERS, build, held_out_modules

LABELS = {
    "tickets": {
        " billing": ("I was charged twice for {}", "the invoice for {} shows the wrong VAT", "please refund my payment of {}"),
        " shipping": ("my parcel with {} has not arrived", "the courier left {} at the wrong door", "the box with {} was damaged"),
        " login": ("I can't sign in since I ordered {}", "password reset for {} never comes", "my account is locked after {}"),
    },
    "queues": {
        " Queue-A17": ("disk full after we added {}", "no space left for {}", "the volume with {} is at 99 percent"),
        " Queue-K2": ("the certificate for {} expired", "TLS handshake fails for {}", "the browser says {} is not secure"),
        " Queue-Z9": ("please add Ann to the team of {}", "a new colleague needs access to {}", "remove Bob from {}"),
        " Queue-M4": ("{} is slow since the update", "the response time of {} doubled", "latency is high for {}"),
    },
    "reviews": {
        " good": ("I love {}", "{} is wonderful", "would buy {} again", "{} works like a charm"),
        " bad": ("I hate {}", "{} broke after a day", "do not buy {}", "never again {}"),
    },
    "intents": {
        " play_music": ("play something by {}", "put on the album called {}", "I want to hear {}"),
        " set_alarm": ("wake me for {} at seven", "remind me about {} tomorrow", "set a timer for {}"),
        " get_weather": ("will it rain on {}", "how warm is it for {}", "do I need a coat with {}"),
        " book_table": ("a table for two near {}", "reserve a place at {} tonight", "find me dinner beside {}"),
    },
    "modules": {
        " core.auth": ("def check_token(t): # {}", "def login(user): # {}", "class Session: # {}"),
        " core.store": ("def save(row): # {}", "def load(key): # {}", "class Table: # {}"),
        " web.views": ("def render(page): # {}", "def index(request): # {}", "class Template: # {}"),
    },
}
"""Task -> label -> what is asked."""
THINGS = ("my lamp", "order 1182", "the tablet", "a pair of shoes", "the garden chair", "a kettle", "the laptop", "invoice 77")
THINGS += ("the old phone", "a desk", "server ten", "the print shop", "two tickets", "a green coat", "the router", "the second key")
OWN, SHARED = "own_labels", "shared_kind"
OWN_SIZES, SHARED_SIZES = (4, 8, 20, 55), (5, 20)
"""Tuning items, a fifth of them for validation."""
SEEDS = (0, 1)
TEST_ITEMS = 48
PEOPLE = USERS[:4]
KINDS = ("naming", "docstring", "completion")
WAYS = {"at_once": 0, "on_trial": TRIAL_STEPS}


def invented(task: str, seed: int) -> TaskData:
    """Items in an order that depends on the seed, the last ones for the test."""
    pool = [
        Item(ask.format(thing) + "\nteam:", label, append_end=True)
        for label, asks in LABELS[task].items()
        for ask in asks
        for thing in THINGS
    ]
    random.Random(f"{task}/{seed}").shuffle(pool)
    return TaskData("somebody", task, tuple(pool[:-TEST_ITEMS]), tuple(pool[-TEST_ITEMS:]), tuple(LABELS[task]))


def draws(bench: Bench) -> Iterator[tuple[dict[str, Any], str, Material]]:
    """(what it is, the task whose steps and rate it is tuned with, its items)."""
    for task, seed, size in product(LABELS, SEEDS, OWN_SIZES):
        row = {"kind": OWN, "task": task, "user": "somebody", "size": size, "seed": seed}
        yield row, "filing", prepare(invented(task, seed), bench.fm, bench.encoder, size, seed)
    for task, user, size in product(KINDS, PEOPLE, SHARED_SIZES):
        row = {"kind": SHARED, "task": task, "user": user, "size": size, "seed": 0}
        yield row, task, prepare(build(user, task, held_out_modules(user), 0), bench.fm, bench.encoder, size, 0)


def measure(bench: Bench, like: str, material: Material, seed: int) -> dict[str, Any]:
    """Test NLL in nats per target token, and which prior was taken."""
    cell = Cell("default", like, "", seed, steps=STEPS[like], rate=load_rates()[LIKE_TASK.get(like, like)]["default"])
    row: dict[str, Any] = {}
    for way, trial in WAYS.items():
        learner = DeviceLearner(bench.fm, bench.encoder, material, trial=trial)
        learner.restore(tune(learner, material, cell).state)
        row |= {f"{way}_prior": learner.prior, f"{way}_nll": score(learner, material, material.test).nll}
        if material.labels:
            row |= {f"{way}_accuracy": accuracy(learner, material)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench = Laboratory(Store(Path("build/none.jsonl")), Path("build/quality")).bench
    rows = []
    for what, like, material in draws(bench):
        rows.append({**what, **measure(bench, like, material, what["seed"])})
        print("{task:10s} {user:10s} {size:3d} items  at once: {at_once_prior:10s} {at_once_nll:.3f}".format(**rows[-1]), end="  ")
        print("on trial: {on_trial_prior:10s} {on_trial_nll:.3f}".format(**rows[-1]), flush=True)
    figures = {}
    for kind, way in product((OWN, SHARED), WAYS):
        of_kind = [row for row in rows if row["kind"] == kind]
        figures[f"{kind}_prior_taken_{way}"] = fmean(bool(row[f"{way}_prior"]) for row in of_kind)
        figures[f"{kind}_nll_{way}"] = fmean(row[f"{way}_nll"] for row in of_kind)
        if kind == OWN:
            figures[f"{kind}_accuracy_{way}"] = fmean(row[f"{way}_accuracy"] for row in of_kind)
    for name, value in figures.items():
        print(f"{name:40s} {value:.3f}")
    report.write(args.json, figures, rows)


if __name__ == "__main__":
    main()
