"""Who is personal here, and with what: held-out users and development packages, four tasks on their own code."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from lopa.demo.users import HELD_OUT, Item, TaskData, TaskSizes, build_task, package_folder, read_modules

from benchmarks.quality.functions import FUNCTION_TASKS, build_function_task

ROOT = Path(__file__).resolve().parents[2]
CODE = "<|code|>"
"""Begins every prompt of completion."""
TASKS = ("completion", "filing", "naming", "docstring")
USERS = HELD_OUT[:12]
"""The standard library's ten, then what every installation of the server brings: chosen before anything was measured."""
DEVELOPERS = ("aiohttp",)
"""Packages on which learning rates are chosen; of `split.json`'s development part, so neither in the population nor held out."""


@lru_cache(maxsize=4)
def held_out_modules(user: str) -> dict[str, str]:
    """Module name to source."""
    return read_modules(package_folder(user))


@lru_cache(maxsize=1)
def development_modules(corpus: Path) -> dict[str, dict[str, str]]:
    """Every development package's modules, from what `training/corpus.py` wrote; named as `training/people.py` names them."""
    split = json.loads((ROOT / "training" / "split.json").read_text())
    packages: dict[str, dict[str, str]] = defaultdict(dict)
    with (corpus / "population.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            name = row["path"].removesuffix(".py").removeprefix(row["repo"] + "/")
            if row["repo"] in split["development"] and not name.split("/")[-1].startswith("__"):
                packages[row["repo"]][name] = row["text"]
    return packages


def build(user: str, task: str, modules: dict[str, str], seed: int) -> TaskData:
    """One user's items of any task.

    Raises:
        NoSuchUser: the package has too little code for it.
    """
    cut = build_function_task if task in FUNCTION_TASKS else build_task
    return cut(user, task, modules, TaskSizes(), seed)


def with_all_before(items: Sequence[Item], modules: Mapping[str, str], chars: int) -> list[Item]:
    """Completion items, each with what stands before it in its file in front of its prompt: so many characters of it at most."""
    longer = []
    for item in items:
        mark = item.prompt[: len(CODE)]
        text = item.prompt.removeprefix(mark) + item.target
        source = next(source for source in modules.values() if text in source)
        at = source.index(text)
        longer.append(replace(item, prompt=mark + source[max(0, at - chars) : at] + item.prompt.removeprefix(mark)))
    return longer
