"""Training one method on one task: AdamW over the trainable tensors, resumable at any moment.

A run is a pure function of data and recipe: the order of examples and the dropout masks of a step come from the seed and the
step's number, so one that was interrupted gives what an unbroken one gives.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lopa_exporters.checkpoint import read_state, write_state
from lopa_exporters.data import Indices
from lopa_exporters.eval.methods import Method
from lopa_exporters.eval.recipes import Recipe
from lopa_exporters.lopa import Tensors

LOG = "log.jsonl"
CHECKPOINT_SECONDS = 60.0
"""Also at the end of every epoch."""


class TrainingError(ValueError):
    """The loss is no number any more."""


class Trainer:
    """One run in a folder: checkpoint/ and log.jsonl. An earlier run there goes on."""

    def __init__(
        self, method: Method, recipe: Recipe, loss: Callable[[Indices], Tensor], count: int, folder: Path, identity: Mapping[str, Any]
    ) -> None:
        """loss: mean loss of examples by index, differentiable; count: examples; identity: what makes it this run.

        Raises:
            ValueError: no examples, or the folder holds another run.
        """
        if not count:
            raise ValueError("there is nothing to train on: no training examples")
        self.method, self.recipe, self.loss, self.count, self.folder = method, recipe, loss, count, folder
        self.identity = {**identity, "names": list(method.trainable)}
        self.seed = int(identity["seed"])
        self.per_epoch = math.ceil(count / recipe.batch)
        self.steps = self.per_epoch * recipe.epochs
        self.step = 0
        self.seconds = 0.0
        # Biases and norms of a whole model do not decay, as transformers' Trainer has it; heads and prompts decay as one.
        whole = method.name == "full"
        decaying = [tensor for tensor in method.trainable.values() if not whole or tensor.dim() > 1]
        still = [tensor for tensor in method.trainable.values() if whole and tensor.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": decaying}, {"params": still, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=recipe.weight_decay)
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def run(self, on_step: Callable[[int, float], None], on_epoch: Callable[[int], Mapping[str, float]] | None = None) -> None:
        """Train to the end. on_step: finished steps and loss. on_epoch: figures to log after each epoch, from its number."""
        began = time.monotonic() - self.seconds
        saved = time.monotonic()
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            while self.step < self.steps:
                loss = self._step()
                self.seconds = time.monotonic() - began
                row: dict[str, Any] = {"step": self.step, "loss": round(loss, 5), "seconds": round(self.seconds, 2)}
                ended = self.step % self.per_epoch == 0
                if ended and on_epoch is not None:
                    self.method.train(False)
                    row |= {"epoch": self.step // self.per_epoch, **on_epoch(self.step // self.per_epoch)}
                log.write(json.dumps(row) + "\n")
                log.flush()
                if ended or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self._save()
                    saved = time.monotonic()
                on_step(self.step, loss)
        self.method.train(False)

    def epochs(self) -> list[dict[str, Any]]:
        """Log lines at the end of epochs, with their figures."""
        lines = [json.loads(line) for line in (self.folder / LOG).read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if "epoch" in line]

    def _step(self) -> float:
        """One batch; the loss before it."""
        self.method.train(True)
        epoch, place = divmod(self.step, self.per_epoch)
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(self.count)
        rows = order[place * self.recipe.batch : (place + 1) * self.recipe.batch]
        torch.manual_seed(int(np.random.default_rng((self.seed, 1, self.step)).integers(1 << 62)))
        loss = self.loss(rows)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"the loss is {value} at step {self.step}: try a lower learning rate than {self.recipe.learning_rate}")
        self.optimizer.zero_grad()
        loss.backward()
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.method.trainable.values(), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * rate(self.recipe, self.step, self.steps)
        self.optimizer.step()
        self.step += 1
        return value

    def _save(self) -> None:
        tensors: Tensors = {f"parameter/{name}": tensor.detach() for name, tensor in self.method.trainable.items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}.{name}": tensor for name, tensor in values.items()}
        write_state(self.folder, tensors, {"identity": self.identity, "step": self.step, "seconds": self.seconds})

    def _resume(self) -> None:
        """Take over an earlier run's state; log lines of steps that it does not know are dropped."""
        read = read_state(self.folder, self.identity)
        if read is not None:
            tensors, values = read
            self.step, self.seconds = values["step"], values["seconds"]
            state: dict[int, Tensors] = {}
            with torch.no_grad():
                for name, tensor in self.method.trainable.items():
                    tensor.copy_(tensors[f"parameter/{name}"])
            for key in (key for key in tensors if key.startswith("optimizer/")):
                index, name = key.removeprefix("optimizer/").split(".", 1)
                state.setdefault(int(index), {})[name] = tensors[key]
            self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        path = self.folder / LOG
        if path.exists():
            whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            path.write_text("".join(line for line in whole if json.loads(line)["step"] <= self.step), encoding="utf-8")


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """Share of the peak learning rate at a step, from 0: linear warm-up, then as the schedule has it (transformers' own schedules)."""
    warm = int(recipe.warmup) if recipe.warmup >= 1 else int(recipe.warmup * steps)
    if step < warm:
        return step / warm
    return 1.0 if recipe.schedule == "constant" else max(0.0, (steps - step) / max(1, steps - warm))
