"""Runs cells: loads what they need once, keeps results and the tuned states of the shipped default."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lopa.bundle import Bundle
from lopa.demo.run import compute_dtype
from lopa.encoder import PromptEncoder
from lopa_exporters.frozen import FrozenModel, PrefixStore
from lopa_server.models import nano_bundle_folder, nano_folder

from benchmarks.quality.cell import Cell, lend, run
from benchmarks.quality.material import Material, prepare
from benchmarks.quality.methods import Bench
from benchmarks.quality.store import Row, Store, rounded
from benchmarks.quality.tasks import HELD_OUT, build, development_modules, held_out_modules, with_all_before

PREFIX_BYTES = 3 << 28
SCORED_TOGETHER = 32
"""Pairs in one forward pass."""
LONGEST_TOKEN = 8
"""Characters of a token in the mean, in whatever code: for texts that are sure to fill the context."""
Say = Callable[[str], None]


class Laboratory:
    """One frozen model, the shipped bundle, and a results file."""

    def __init__(self, store: Store, work: Path, corpus: Path | None = None, threads: int = 1) -> None:
        """work: folder for tuned factors. corpus: made by training/corpus.py, for development packages only."""
        torch.set_num_threads(threads)
        model = FrozenModel.load(nano_folder(), bf16=compute_dtype() == "bfloat16")
        fm = replace(model, max_rows=SCORED_TOGETHER, prefixes=PrefixStore(PREFIX_BYTES))
        self.bench = Bench(fm, PromptEncoder(Bundle.open(nano_bundle_folder()), threads=threads))
        self.store, self.work, self.corpus = store, work, corpus
        self._material: tuple[tuple[str, str, int, int | None], Material] | None = None

    def measure(self, cells: Iterable[Cell], say: Say = print) -> None:
        """Run the cells that have no result yet, and keep each one's."""
        missing = [cell for cell in cells if cell not in self.store]
        began = time.monotonic()
        for number, cell in enumerate(missing, 1):
            row = lend(cell, self.bench, self.material(cell), self._state_of(cell)) if cell.owner else self._run(cell)
            self.store.add(rounded(row))
            accuracy = f", {row['accuracy']:.1%} right" if "accuracy" in row else ""
            left = (time.monotonic() - began) / number * (len(missing) - number) / 60
            say(f"{number}/{len(missing)} {cell.key()}: NLL {row['test_nll']:.4f}{accuracy}, {left:.0f} min to go")

    def _run(self, cell: Cell) -> Row:
        row, state = run(cell, self.bench, self.material(cell))
        if cell.method == "default" and cell.size is None:
            path = self.factors_path(cell)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **state)
        return row

    def _state_of(self, cell: Cell) -> Mapping[str, Any]:
        """The owner's tuned factors, from an earlier run of this laboratory or tuned now."""
        own = replace(cell, user=cell.owner, owner="")
        if not self.factors_path(own).exists():
            self._run(own)
        with np.load(self.factors_path(own)) as file:
            return dict(file)

    def factors_path(self, cell: Cell) -> Path:
        """Where a cell's tuned factors are kept for the heat map."""
        return self.work / "factors" / f"{cell.task}-{cell.user}-{cell.seed}-{cell.steps}-{cell.rate}.npz"

    def material(self, cell: Cell) -> Material:
        """A user's items, ready; the last one asked for is kept."""
        key = (cell.task, cell.user, cell.seed, cell.size)
        if self._material is None or self._material[0] != key:
            modules, fm = self._modules(cell.user), self.bench.fm
            data = build(cell.user, cell.task, modules, cell.seed)
            longer = with_all_before(data.test, modules, LONGEST_TOKEN * fm.context) if cell.task == "completion" else []
            self._material = (key, prepare(data, fm, self.bench.encoder, cell.size, cell.seed, longer))
        return self._material[1]

    def _modules(self, user: str) -> dict[str, str]:
        if user in HELD_OUT:
            return held_out_modules(user)
        if self.corpus is None:
            raise ValueError(f"{user} is a development package: --corpus must name the folder that training/corpus.py wrote")
        return development_modules(self.corpus)[user]
