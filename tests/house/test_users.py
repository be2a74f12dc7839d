"""The held-out users' items: cut the same every time, and nothing that is tested was tuned on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lopa.demo.users import HELD_OUT, STDLIB_USERS, TASKS, Item, NoSuchUser, TaskSizes, build_task, load_task

SPLIT = Path(__file__).resolve().parents[2] / "training" / "split.json"


def test_users_are_held_out_of_all_training() -> None:
    split = json.loads(SPLIT.read_text())
    assert sorted(split["heldout"]) == sorted(HELD_OUT)
    assert not set(split["heldout"]) & set(split["population"])
    assert len(STDLIB_USERS) >= 8


def test_no_file_of_a_user_reached_the_corpus() -> None:
    packages = json.loads((SPLIT.parent / "corpus.json").read_text())["packages"]
    assert all(packages[user]["role"] == "heldout" for user in HELD_OUT if user in packages)
    assert not [user for user in HELD_OUT if packages.get(user, {}).get("bytes")]


@pytest.mark.parametrize("task", TASKS)
def test_items_are_reproducible_and_disjoint(task: str) -> None:
    first, second = load_task("email", task), load_task("email", task)
    assert first == second
    assert len(first.tuning) >= 100
    assert len(first.test) >= 24
    assert not {item.text for item in first.tuning} & {item.text for item in first.test}


def test_filing_tests_every_module_on_its_last_part() -> None:
    numbered = range(200)
    modules = {f"part{i}": "".join(f"def function_{i}_{n}(value):\n    return value + {n}\n" for n in numbered) for i in range(4)}
    data = build_task("somebody", "filing", modules, TaskSizes(), seed=0)
    assert set(data.labels) == {item.target for item in data.test} == {item.target for item in data.tuning} == set(modules)

    def lines(items: tuple[Item, ...]) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for item in items:
            numbers = [int(word.split("(")[0].split("_")[2]) for word in item.text.split("def ")[1:]]
            found.setdefault(item.target, set()).update(numbers)
        return found

    tuned, tested = lines(data.tuning), lines(data.test)
    assert all(max(tuned[label]) < min(tested[label]) for label in modules)


def test_a_package_that_is_not_here_is_named() -> None:
    with pytest.raises(NoSuchUser, match="no_such_package"):
        load_task("no_such_package", "filing")
