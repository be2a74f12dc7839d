"""The state of a population run on disk: checkpoint/state.safetensors and checkpoint/state.json, replaced together by one rename."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lopa_exporters.cohort import Cohort
from lopa_exporters.lopa import LoPA, Tensors

FOLDER, TENSORS, VALUES = "checkpoint", "state.safetensors", "state.json"
KINDS = ("shared", "start", "cohort", "optimizer")


@dataclass
class Checkpoint:
    """Everything that the next step depends on. `person`, `life` and `born` are by slot of the cohort."""

    shared: Tensors
    """Leaves that require gradients."""
    start: Tensors
    cohort: Cohort
    identity: Mapping[str, Any]
    """What the run was started with; a run of another identity is not continued."""
    person: list[int]
    """Index of the person in the slot."""
    life: list[int]
    """Number of the person's present life, counted over the run: the seed of its order of examples."""
    born: list[int]
    """Step at which that life began."""
    step: int = 0
    """Steps finished."""
    lives: int = 0
    optimizer: Tensors = field(default_factory=dict)
    """The shared optimizer's state, "INDEX.NAME"; read once after loading."""

    @classmethod
    def fresh(cls, lopa: LoPA, cohort: Cohort, identity: Mapping[str, Any]) -> Checkpoint:
        """The state before the first step."""
        shared = {name: tensor.clone().requires_grad_() for name, tensor in lopa.shared.items()}
        start = {name: tensor.clone() for name, tensor in lopa.start.items()}
        slots = len(cohort.ages)
        return cls(shared, start, cohort, _plain(identity), [0] * slots, [0] * slots, [0] * slots)

    def save(self, folder: Path, optimizer: torch.optim.Optimizer | None) -> None:
        """Write beside the last checkpoint, then swap: an interruption leaves one of the two whole."""
        state = {} if optimizer is None else optimizer.state_dict()["state"]
        groups: dict[str, Tensors] = {
            "shared": {name: tensor.detach() for name, tensor in self.shared.items()},
            "start": self.start,
            "cohort": {**self.cohort.tensors, "ages": self.cohort.ages},
            "optimizer": {f"{index}.{name}": tensor for index, values in state.items() for name, tensor in values.items()},
        }
        values = {name: getattr(self, name) for name in ("identity", "person", "life", "born", "step", "lives")}
        write_state(folder, {f"{kind}/{name}": tensor for kind in KINDS for name, tensor in groups[kind].items()}, values)

    @classmethod
    def load(cls, folder: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
        """The last checkpoint of this folder, or None when there is none yet.

        Raises:
            ValueError: it belongs to another data set or configuration.
        """
        read = read_state(folder, identity)
        if read is None:
            return None
        tensors, values = read
        groups: dict[str, Tensors] = {kind: {} for kind in KINDS}
        for key, tensor in tensors.items():
            kind, name = key.split("/", 1)
            groups[kind][name] = tensor
        ages = groups["cohort"].pop("ages")
        ordered = {kind: _like(groups[kind], values["identity"]["names"][kind]) for kind in ("shared", "start")}
        shared = {name: tensor.requires_grad_() for name, tensor in ordered["shared"].items()}
        return cls(shared, ordered["start"], Cohort(groups["cohort"], ages), optimizer=groups["optimizer"], **values)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What `optimizer.load_state_dict` takes."""
        state: dict[int, Tensors] = {}
        for key, tensor in self.optimizer.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = tensor
        return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def write_state(folder: Path, tensors: Tensors, values: Mapping[str, Any]) -> None:
    """Write beside the last state, then swap: an interruption leaves one of the two whole. values["identity"] says whose state it is."""
    new, old = folder / f"{FOLDER}.new", folder / f"{FOLDER}.old"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new / TENSORS)
    (new / VALUES).write_text(json.dumps(values), encoding="utf-8")
    shutil.rmtree(old, ignore_errors=True)
    if (folder / FOLDER).exists():
        (folder / FOLDER).rename(old)
    new.rename(folder / FOLDER)
    shutil.rmtree(old, ignore_errors=True)


def read_state(folder: Path, identity: Mapping[str, Any]) -> tuple[Tensors, dict[str, Any]] | None:
    """What `write_state` wrote last; None when there is nothing yet.

    Raises:
        ValueError: it belongs to another data set or configuration.
    """
    place = next((folder / name for name in (FOLDER, f"{FOLDER}.old") if (folder / name / VALUES).is_file()), None)
    if place is None:
        return None
    values = json.loads((place / VALUES).read_text(encoding="utf-8"))
    check_identity(folder, values["identity"], identity)
    return load_file(place / TENSORS), values


def check_identity(folder: Path, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises ValueError unless a folder's run was started with this identity; names what differs."""
    wanted = _plain(identity)
    if found != wanted:
        differing = sorted(key for key in {*wanted, *found} if found.get(key) != wanted.get(key))
        raise ValueError(f"{folder} holds a run with another {', '.join(differing)}; continue with its settings or give a new folder")


def _like(tensors: Tensors, names: list[str]) -> Tensors:
    """In this order: safetensors keeps none, and the optimizer's state goes by position."""
    return {name: tensors[name] for name in names}


def _plain(identity: Mapping[str, Any]) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(identity))
