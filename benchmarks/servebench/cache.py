"""How much of the key-value memory in use holds nothing, read from the server's own metrics while it is under load."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from statistics import fmean
from typing import Any

from servebench.generation import PERSONAL, row, run
from servebench.server import Server

BLOCKS, POSITIONS, SIZE = "lopa_kv_blocks_used", "lopa_kv_positions", "lopa_kv_block_size"


def kv_waste(server: Server, keep: Callable[[dict[str, Any]], None]) -> float | None:
    """Mean of 1 - positions that hold something / positions in blocks used, sampled under mixed lengths; None without a paged cache."""
    workload = dataclasses.replace(PERSONAL, requests=64, users=64, prompt_tokens=(8, 256), new_tokens=(8, 128), seed=9)
    samples: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            now = server.metrics()
            capacity = now.get(BLOCKS, 0.0) * now.get(SIZE, 0.0)
            if capacity:
                samples.append(1 - now[POSITIONS] / capacity)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = run(server, workload)
    finally:
        done.set()
        watcher.join()
    waste = fmean(samples) if samples else None
    keep({**row("mixed lengths, cache watched", result), "samples": len(samples), "waste": waste})
    return waste
