"""What one evaluation is, and its report."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopa.fingerprint import fingerprint_folder

from lopa_exporters.checkpoint import check_identity
from lopa_exporters.eval.metrics import Figure
from lopa_exporters.eval.recipes import WITH_ENCODER, Recipe
from lopa_exporters.eval.tables import digest
from lopa_exporters.hub import resolve_folder
from lopa_exporters.static import find_static

PREDICTIONS, RUN, REPORT = "predictions.jsonl", "run.json", "report.json"
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy")


@dataclass(frozen=True)
class EvalPlan:
    """One method on one task with one foundation model."""

    task: str
    method: str
    fm: Path
    """Folder of a causal language model (code) or masked language model (GLUE)."""
    data: Path
    """A file, or for GLUE a folder; a code task's file without `test` is split in halves."""
    run: Path
    """Folder of checkpoint, log, predictions and report. An interrupted run there goes on."""
    recipe: Recipe
    test: Path | None = None
    limit: int = 0
    """Examples for training and for the test at most, the first ones; 0 is all."""
    seed: int = 9876
    """Of start values, order and dropout; the official repositories' own."""
    bf16: bool = False
    device: str | None = None
    """Default: CUDA where there is one."""
    allow_code_execution: bool = False
    each_epoch: bool = False
    """GLUE: score the test after every epoch. The official code reports the best of them; that is selection on the test."""
    batch: int = 8
    """Inputs that are answered together."""
    processes: int = 0
    """Programs that are executed at the same time; 0: as many as cores."""

    def identity(self, files: Sequence[Path]) -> dict[str, Any]:
        """What makes a run this run, for its folder."""
        read = self.recipe.encoder if self.method in WITH_ENCODER else ""
        return {
            "task": self.task,
            "method": self.method,
            "fm": fingerprint_folder(self.fm),
            "encoder": fingerprint_folder(resolve_folder(read)) if read and find_static(Path(read)) is None else read,
            "data": digest(list(files)),
            "recipe": dataclasses.asdict(self.recipe),
            "limit": self.limit,
            "seed": self.seed,
            "bf16": self.bf16,
        }

    def limited(self, examples: Sequence[Any]) -> list[Any]:
        """The first `limit` of them."""
        return list(examples[: self.limit] if self.limit else examples)


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Make a run's folder this run's.

    Raises:
        ValueError: it holds another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RUN
    if path.exists():
        check_identity(folder, json.loads(path.read_text(encoding="utf-8")), identity)
    else:
        staged = path.with_suffix(".new")
        staged.write_text(json.dumps(identity, indent=1), encoding="utf-8")
        staged.replace(path)


def write_report(plan: EvalPlan, identity: dict[str, Any], figures: Sequence[Figure], found: dict[str, Any]) -> dict[str, Any]:
    """Form the report, write it to the run's folder, and return it. The first figure is the task's own; `found` is the rest."""
    report = {
        "task": plan.task,
        "method": plan.method,
        "metric": dataclasses.asdict(figures[0]),
        "metrics": [dataclasses.asdict(figure) for figure in figures],
        **found,
        "seed": plan.seed,
        "limit": plan.limit,
        "hyperparameters": identity["recipe"],
        "fm": {"name": plan.fm.name, "fingerprint": identity["fm"]},
        "encoder": {"name": Path(plan.recipe.encoder).name, "fingerprint": identity["encoder"]} if plan.method in WITH_ENCODER else None,
        "data": {"sha256": identity["data"]},
        "bf16": plan.bf16,
        "versions": versions(),
    }
    (plan.run / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def versions() -> dict[str, str]:
    """Of Python and what computed."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
