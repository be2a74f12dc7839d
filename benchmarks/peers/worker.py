"""A peer's side of the measurement: build once, then one round for every line on standard input, "NUMBER NEW_TOKENS".

    python -m peers.hf_generate --folder MODEL --results FD

Needs torch and the standard library only, since some peers live in a virtual environment of their own. Standard output belongs to
whatever the peer prints; results go to the file descriptor FD, one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

Round = Callable[[int, int], int]
"""Given the round's number and the tokens to generate, answers all requests once, all at the same time; returns the tokens generated."""


@dataclass(frozen=True)
class Job:
    """What everybody is asked for."""

    folder: Path
    """The model, with `adapters/0` .. beside its weights."""
    requests: int = 32
    prompt: int = 64
    """Positions of each prompt: tokens, or rows of the embedding space."""
    threads: int = 2


@dataclass(frozen=True)
class Outcome:
    seconds: float
    tokens: int


def serve(build: Callable[[Job], Round]) -> None:
    """The whole program of a peer. The first line it writes says that it is built; a failure ends the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--results", type=int, required=True)
    for name in ("requests", "prompt", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Job, name))
    args = parser.parse_args()
    with os.fdopen(args.results, "w", buffering=1) as results:
        run = build(Job(args.folder, args.requests, args.prompt, args.threads))
        print(json.dumps({"built": True}), file=results)
        for line in sys.stdin:
            number, new = map(int, line.split())
            started = time.perf_counter()
            tokens = run(number, new)
            print(json.dumps(asdict(Outcome(time.perf_counter() - started, tokens))), file=results)
