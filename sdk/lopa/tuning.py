"""Settings and results of a tuning run."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, Unpack, get_args

from lopa.control import Stopped
from lopa.errors import TuningError
from lopa.files import write_atomic
from lopa.manifest import Manifest
from lopa.values import Dtype, Placement

Schedule = Literal["constant", "linear", "cosine"]
Outcome = Literal["finished", "early_stopped", "diverged", "cancelled", "max_steps", "max_seconds", "max_bytes"]


class TuneOptions(TypedDict, total=False):
    """Keywords of `Persona.tune`; `TuneConfig` explains them."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    clip: float
    schedule: Schedule
    seed: int
    validate_every: int
    dtype: Dtype
    gradient_dtype: Dtype
    placement: Placement | None
    microbatch: int
    patience: float
    fresh: bool
    warmup: int
    early_stopping: int
    low_priority: bool
    max_steps: int | None
    max_seconds: float | None
    max_bytes: int | None


_HOW_NOT_WHAT = ("patience", "low_priority", "max_steps", "max_seconds", "max_bytes")
"""Settings that a resumed run may have otherwise."""
_WHOLE = ("steps", "batch_size", "seed", "validate_every", "microbatch", "warmup", "early_stopping", "max_steps", "max_bytes")
"""Settings that count something."""
_REAL = ("learning_rate", "weight_decay", "clip", "patience", "max_seconds")


@dataclass(frozen=True)
class TuneConfig:
    """How to tune. The first five come from the bundle unless given.

    Raises:
        TuningError: a value out of range.
    """

    steps: int
    """Optimizer steps."""
    batch_size: int
    """Examples a step; at most as many as there are to train on."""
    learning_rate: float
    """Of AdamW, at the first step."""
    weight_decay: float
    """Of AdamW, decoupled."""
    clip: float
    """Bound of the L2 norm over all personal gradients together."""
    schedule: Schedule = "linear"
    """"linear" and "cosine" fall to 0 after the last step."""
    seed: int = 0
    """Of the split and of the order."""
    validate_every: int = 10
    """Steps between measurements; the last step is always measured."""
    dtype: Dtype = "I8"
    """Of soft prompts on the wire. I8 was measured to cost nothing on completion; on filing that is not settled (docs/device.md).
    F32 sends them as they are."""
    gradient_dtype: Dtype = "I8"
    """Of gradients on the wire."""
    placement: Placement | None = None
    """Where the soft prompt stands; None takes what the persona was last tuned with, the front for a new one."""
    microbatch: int = 0
    """Gradient accumulation: pairs in one request at most, summed up to `batch_size` before each step; 0 leaves it to the
    server's limits."""
    patience: float = 120.0
    """Seconds to go on trying when the server can't be reached. Neither this nor what follows `early_stopping` is part of what
    a run is: a resumed run may have another."""
    fresh: bool = False
    """Start from the bundle's values instead of the persona's current factors."""
    warmup: int = 0
    """Steps over which the learning rate rises to its value; the schedule begins after them."""
    early_stopping: int = 0
    """End after so many measurements in a row without a better one; 0 never does."""
    low_priority: bool = False
    """Let the server put this run behind other users' work."""
    max_steps: int | None = None
    """Steps that this call may take; the run goes on with the next call."""
    max_seconds: float | None = None
    """Time that this call may take."""
    max_bytes: int | None = None
    """Message bytes, both ways, that this call may use."""

    def __post_init__(self) -> None:
        for names, types, kind in ((_WHOLE, int, "a whole number"), (_REAL, (int, float), "a number")):
            for name in names:
                value = getattr(self, name)
                left_out = value is None and name.startswith("max_")
                if not left_out and (isinstance(value, bool) or not isinstance(value, types)):
                    raise TuningError(f"{name} is {reprlib.repr(value)}, which is not {kind}")
        rules = {
            "steps": self.steps >= 1,
            "batch_size": self.batch_size >= 1,
            "learning_rate": 0 < self.learning_rate < math.inf,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "clip": 0 < self.clip < math.inf,
            "schedule": self.schedule in ("constant", "linear", "cosine"),
            "validate_every": self.validate_every >= 1,
            "placement": self.placement in (None, "front", "after_prefix"),
            "microbatch": self.microbatch >= 0,
            "patience": 0 <= self.patience < math.inf,
            "warmup": 0 <= self.warmup < self.steps,
            "early_stopping": self.early_stopping >= 0,
            "max_steps": self.max_steps is None or self.max_steps >= 1,
            "max_seconds": self.max_seconds is None or self.max_seconds > 0,
            "max_bytes": self.max_bytes is None or self.max_bytes >= 1,
        }
        for name, holds in rules.items():
            if not holds:
                raise TuningError(f"{name} is {getattr(self, name)!r}, which is out of range")

    @classmethod
    def for_bundle(cls, manifest: Manifest, **options: Unpack[TuneOptions]) -> Self:
        """The bundle's own settings, with these options on top."""
        return cls(**{**asdict(manifest.tuning), **options})

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        if step <= self.warmup:
            return self.learning_rate * step / (self.warmup + 1)
        done = (step - 1 - self.warmup) / (self.steps - self.warmup)
        if self.schedule == "linear":
            return self.learning_rate * (1 - done)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate

    def identity(self) -> str:
        """Everything that a run's result depends on, as canonical JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in _HOW_NOT_WHAT}
        return json.dumps(fields, sort_keys=True)


@dataclass(frozen=True)
class TuneProgress:
    """Told to the callback after every step, when the step is safe on disk, and while waiting for the server."""

    step: int
    """Steps done."""
    steps: int
    loss: float | None
    """Of the last step: nats per target token, before its update."""
    validation_nll: float | None
    """Last measured, nats per target token."""
    start_nll: float
    """The same before tuning."""
    waiting: str = ""
    """Why the run waits: "paused", or what keeps the server away; empty while it moves."""


@dataclass(frozen=True)
class TuneReport:
    """What a run did. NLL is in nats per target token on the validation examples.

    >>> report = me.tune(examples, steps=2)
    >>> report.save("report.json"), report.plot("curves.png")
    (None, None)
    >>> report.end_nll <= report.start_nll
    True
    """

    kept: bool
    """Whether the persona has new factors now. False: nothing changed, because nothing was found that is better than before and than the
    plain model."""
    version: int
    """The persona's current version."""
    outcome: Outcome
    """"diverged": the soft prompt left the range that the server allows; the best factors before that count. "early_stopped": no
    better measurement for a while. "cancelled", "max_steps", "max_seconds", "max_bytes": stopped; the same call goes on."""
    plain_nll: float
    """Of the plain model: factors that are no better than no soft prompt are not kept."""
    start_nll: float
    """Of the factors that the persona had before."""
    prior: str
    """The bundle's prior that the run went on from after its first steps; empty for none. A persona that was never tuned, or is tuned with
    `fresh`, begins at the bundle's plain start. If the bundle has a prior that fits the training examples, the run goes on from there
    unless those steps have taught more of the validation examples than the prior knows."""
    best_nll: float
    """The lowest that was measured, factors rounded as they rest on disk; of the start if no step was better."""
    end_nll: float
    """Of the factors that the persona has now."""
    best_step: int
    """0 when nothing was better than the start; the step after which the prior was taken when the prior itself was the best."""
    steps: int
    """Steps done."""
    resumed_from: int
    """Steps that an earlier, interrupted call had done."""
    losses: tuple[float, ...]
    """A step each: nats per target token of its batch, before its update."""
    gradient_norms: tuple[float, ...]
    """A step each: L2 norm over all personal gradients together, before clipping."""
    validation: tuple[tuple[int, float], ...]
    """(steps done, NLL). Twice after the same step when a prior was taken there."""
    training_examples: int
    validation_examples: int
    seconds: float
    """Of all calls that the run took."""
    sent_bytes: int
    received_bytes: int
    factor_bytes: int
    """The current factors file."""

    @property
    def resumable(self) -> bool:
        """Whether the run was stopped and the same call goes on with it. Until it has ended, the persona is as before."""
        return self.outcome in get_args(Stopped)

    def to_json(self) -> str:
        """One JSON object, a field each."""
        return json.dumps(asdict(self), indent=1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: Path | str) -> None:
        """Write the numbers as JSON.

        Raises:
            StorageError: it can't be written.
        """
        write_atomic(Path(path).expanduser(), (self.to_json() + "\n").encode())

    def plot(self, path: Path | str) -> None:
        """Draw the curves as a PNG file: training loss, validation, gradient norm.

        Raises:
            MissingDependency: matplotlib is not installed. StorageError: it can't be written.
        """
        from lopa.plotting import plot_report

        plot_report(self, Path(path).expanduser())
