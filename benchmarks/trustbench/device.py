"""A device in a process of its own, to be killed: it tunes some users' personas and, when started again, goes on where it was.

python -m trustbench.device ADDRESS FOLDER FIRST_USER USERS STEPS
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lopa
from lopa.retry import RetryPolicy

PATIENCE = 900.0
"""Seconds that an outage may last."""


def examples(user: int) -> list[tuple[str, str]]:
    """What a user has to learn from."""
    return [(f"def f{user}_{index}(a, b):", f" return a + {user * 7 + index % 5}") for index in range(12)]


def log_of(folder: Path, user: int) -> Path:
    """A line a step that was told: its number and loss."""
    return folder / f"user-{user}.log"


def tune(address: str, folder: Path, user: int, steps: int) -> None:
    """Nothing to do when an earlier life has finished."""
    config = lopa.ClientConfig(cache=folder / "cache", connect_timeout=PATIENCE, retry=RetryPolicy(attempts=10_000))
    with lopa.connect(address, config=config) as client:
        persona = client.personal(folder / f"user-{user}")
        if persona.version > 1:
            return
        with log_of(folder, user).open("a", encoding="utf-8", buffering=1) as log:

            def told(now: lopa.TuneProgress) -> None:
                if not now.waiting:
                    log.write(json.dumps([now.step, now.loss]) + "\n")

            persona.tune(examples(user), steps=steps, seed=user, patience=PATIENCE, on_step=told)


def main() -> None:
    address, folder, first, users, steps = sys.argv[1:]
    chosen = range(int(first), int(first) + int(users))
    with ThreadPoolExecutor(len(chosen)) as pool:
        list(pool.map(lambda user: tune(address, Path(folder), user, int(steps)), chosen))


if __name__ == "__main__":
    main()
