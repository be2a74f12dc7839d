"""Training the shared part over a population, so that a new user gets far in few steps.

A cohort of persons is tuned just as devices will be; on the way, the shared tensors follow the persons' mean gradient. What kind of
training that is depends on how long a person lives:

- `lifetime` 0: everybody keeps the personal tensors for good; shared and personal parts are trained jointly.
- `lifetime` n: after n steps a person starts anew from the start values. Each shared step then averages over persons of all ages,
  which is first-order meta-learning over inner runs of n steps (FOMAML: Finn et al. 2017; Nichol et al. 2018, section 5). With
  `start_rate` the start values follow what the persons reached (Reptile: Nichol et al. 2018).

A run is a pure function of (data, configuration): one that was interrupted and resumed gives what an unbroken one gives.

Legend: p persons a step, n rows of each, h encoder width, m soft-prompt rows, d hidden size.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn

from lopa_exporters.checkpoint import Checkpoint
from lopa_exporters.cohort import Cohort, StepSettings, soft_prompts
from lopa_exporters.data import Dataset, Indices
from lopa_exporters.encoder import EncoderConfig
from lopa_exporters.frozen import FrozenModel
from lopa_exporters.lopa import LoPA, LoPAConfig, config_to_dict


@dataclass(frozen=True)
class PopulationConfig:
    """How the shared part is trained."""

    steps: int = 2000
    persons: int = 4
    """p, persons in one step."""
    rows: int = 8
    """n, examples of each; the device's batch size."""
    lifetime: int = 100
    """Steps until a person starts anew; 0 is never."""
    personal: StepSettings = dataclasses.field(default_factory=lambda: StepSettings(learning_rate=1e-2))
    """The device's own optimizer settings."""
    shared_rate: float = 1e-3
    """Peak learning rate of the shared tensors; linear warm-up, then a cosine down to a twentieth."""
    shared_warmup: int = 50
    """Steps."""
    shared_decay: float = 0.01
    """AdamW's weight decay of the shared tensors."""
    shared_clip: float = 1.0
    shared_every: int = 1
    """Steps whose gradients are averaged into one shared step."""
    start_rate: float = 0.0
    """How far the start values move towards what a person reached at the end of its life; 0 leaves them."""
    validation: int = 8
    """Examples of each person that are never trained on."""
    checkpoint_every: int = 200
    """Steps between checkpoints, and between validations where nobody starts anew."""
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            min(self.steps, self.persons, self.rows, self.shared_every, self.checkpoint_every) < 1
            or min(self.lifetime, self.validation) < 0
        ):
            raise ValueError(
                "steps, persons, rows, shared_every and checkpoint_every must be at least 1, lifetime and validation not negative"
            )
        if self.checkpoint_every % self.shared_every:
            raise ValueError(f"checkpoint_every is {self.checkpoint_every}; it must be a multiple of shared_every, {self.shared_every}")


class PopulationTrainer:
    """One training run in `folder`: checkpoint/, log.jsonl. An earlier run there goes on."""

    def __init__(
        self, fm: FrozenModel, dataset: Dataset, start: LoPA, config: PopulationConfig, folder: Path, encoder: EncoderConfig | None = None
    ) -> None:
        """start: where a fresh run begins; not used when the folder holds a checkpoint of the same configuration.

        encoder: what made the features, if a run whose features came from another one is to be refused.

        Raises:
            ValueError: the folder holds a run of another configuration.
        """
        self.fm, self.dataset, self.config, self.folder = fm, dataset, config, folder
        self.train_rows, self.held_rows = dataset.split(config.validation)
        self.method: LoPAConfig = start.config
        folder.mkdir(parents=True, exist_ok=True)
        identity = {
            "population": dataclasses.asdict(config),
            "lopa": config_to_dict(start.config),
            "persons": [[*person, len(rows)] for person, rows in zip(dataset.persons, dataset.rows, strict=True)],
            "names": {"shared": list(start.shared), "start": list(start.start)},
            "encoder": None if encoder is None else {**dataclasses.asdict(encoder), "folder": Path(encoder.folder).name},
        }
        saved = Checkpoint.load(folder, identity)
        if saved is None:
            count = config.persons if config.lifetime else len(dataset.persons)
            saved = Checkpoint.fresh(start, Cohort.start(start.start, count), identity)
            for slot in range(count):
                self._seat(saved, slot)
                # Spread over all ages from the beginning, so that not everybody starts anew at the same step.
                saved.born[slot] = -(slot * config.lifetime // count)
        self.state = saved
        self.optimizer = torch.optim.AdamW(saved.shared.values(), weight_decay=config.shared_decay) if saved.shared else None
        if self.optimizer and saved.optimizer:
            self.optimizer.load_state_dict(saved.optimizer_state(self.optimizer))

    @property
    def lopa(self) -> LoPA:
        """The present result."""
        return LoPA(self.method, {name: tensor.detach().clone() for name, tensor in self.state.shared.items()}, dict(self.state.start))

    def run(self, on_step: Callable[[int, float], None] = lambda _step, _loss: None) -> LoPA:
        """Train to the end. `on_step` gets the number of finished steps and the mean NLL per token of the step's persons."""
        began = time.monotonic()
        path = self.folder / "log.jsonl"
        _forget_after(path, self.state.step)
        with path.open("a", encoding="utf-8") as log:
            while self.state.step < self.config.steps:
                loss = self._step()
                _write(log, step=self.state.step, loss=round(loss, 5), seconds=round(time.monotonic() - began, 2))
                self._end_lives(log)
                if self.state.step % self.config.checkpoint_every == 0 or self.state.step == self.config.steps:
                    if not self.config.lifetime:
                        self._validate(log, self._active())
                    self.state.save(self.folder, self.optimizer)
                on_step(self.state.step, loss)
        return self.lopa

    def _step(self) -> float:
        """One step of some persons and, every `shared_every`, of the shared part; the mean NLL per token before it."""
        config, state = self.config, self.state
        who = self._active()
        rows = np.stack([self._rows(int(slot)) for slot in who])
        personal = state.cohort.personal(state.start, who)
        for tensor in personal.values():
            tensor.requires_grad_()
        torch.manual_seed(int(np.random.default_rng((config.seed, 4, state.step)).integers(1 << 62)))
        soft = soft_prompts(self.method, state.shared, personal, self.dataset.features[rows], self.method.dropout)
        losses = self.fm.losses(soft.flatten(0, 1), self.dataset.pairs(rows.ravel()))
        means = losses.nll.view(rows.shape).sum(dim=1) / losses.tokens.view(rows.shape).sum(dim=1)
        means.sum().backward()
        gradients = {name: tensor.grad for name, tensor in personal.items() if tensor.grad is not None}
        state.cohort.step(who, gradients, config.personal, config.lifetime)
        state.step += 1
        if self.optimizer and state.step % config.shared_every == 0:
            self._step_shared(self.optimizer, config.shared_every * len(who))
        return means.mean().item()

    def _step_shared(self, optimizer: torch.optim.Optimizer, count: int) -> None:
        """AdamW on the mean of the `count` persons' gradients that were summed up."""
        config, step = self.config, self.state.step
        for tensor in self.state.shared.values():
            if tensor.grad is not None:
                tensor.grad /= count
        nn.utils.clip_grad_norm_(self.state.shared.values(), config.shared_clip)
        warm = min(1.0, step / max(1, config.shared_warmup))
        optimizer.param_groups[0]["lr"] = config.shared_rate * warm * (0.525 + 0.475 * math.cos(math.pi * step / config.steps))
        optimizer.step()
        optimizer.zero_grad()

    def _active(self) -> Tensor:
        """Slots that take this step: all of them, or `persons` of the whole population."""
        slots = len(self.state.person)
        if self.config.lifetime or slots <= self.config.persons:
            return torch.arange(slots)
        # Rounds over the whole population in a new order each, cut into steps.
        per_round = math.ceil(slots / self.config.persons)
        order = np.random.default_rng((self.config.seed, 1, self.state.step // per_round)).permutation(slots)
        return torch.from_numpy(np.array_split(order, per_round)[self.state.step % per_round])

    def _rows(self, slot: int) -> Indices:
        """The next n examples of the slot's person: its rows in random order, round after round, as its life goes on."""
        own = self.train_rows[self.state.person[slot]]
        first = int(self.state.cohort.ages[slot]) * self.config.rows
        places = np.arange(first, first + self.config.rows)
        orders = {
            int(r): np.random.default_rng((self.config.seed, 2, self.state.life[slot], int(r))).permutation(own)
            for r in set(places // len(own))
        }
        return np.array([orders[int(place) // len(own)][int(place) % len(own)] for place in places])

    def _seat(self, state: Checkpoint, slot: int) -> None:
        """Give a slot its next person: everybody once before anybody again, in random order."""
        count = len(self.dataset.persons)
        turn, place = divmod(state.lives, count)
        order = np.random.default_rng((self.config.seed, 3, turn)).permutation(count)
        state.person[slot] = int(order[place]) if self.config.lifetime else slot
        state.life[slot] = state.lives
        state.lives += 1
        state.born[slot] = state.step
        state.cohort.restart(slot, state.start)

    def _end_lives(self, log: IO[str]) -> None:
        """Persons that have lived long enough are validated, pull at the start values, and make room."""
        if not self.config.lifetime:
            return
        ended = [slot for slot, born in enumerate(self.state.born) if self.state.step - born >= self.config.lifetime]
        if ended:
            self._validate(log, torch.tensor(ended))
        for slot in ended:
            if self.config.start_rate:
                for name, tensor in self.state.start.items():
                    tensor += self.config.start_rate * (self.state.cohort.tensors[name][slot] - tensor)
            self._seat(self.state, slot)

    @torch.no_grad()
    def _validate(self, log: IO[str], who: Tensor) -> None:
        """Log NLL per token on rows never trained on: with a person's own tensors, and with the start values."""
        for slot in who.tolist():
            rows = self.held_rows[self.state.person[slot]]
            if not len(rows):
                continue
            own = self.state.cohort.personal(self.state.start, torch.tensor([slot]))
            fresh = {name: tensor[None] for name, tensor in self.state.start.items()}
            figures = {}
            for kind, personal in (("start_nll", fresh), ("nll", own)):
                soft = soft_prompts(self.method, self.state.shared, personal, self.dataset.features[rows][None])
                losses = self.fm.losses(soft[0], self.dataset.pairs(rows))
                figures[kind] = round(losses.mean().item(), 5)
            user, task = self.dataset.persons[self.state.person[slot]]
            _write(log, step=self.state.step, user=user, task=task, age=int(self.state.cohort.ages[slot]), **figures)


def _write(log: IO[str], **row: object) -> None:
    log.write(json.dumps(row) + "\n")
    log.flush()


def _forget_after(path: Path, step: int) -> None:
    """Drop log lines of steps that the checkpoint does not know: they will be taken again."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")
