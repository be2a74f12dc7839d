"""A tuning run between two steps: one file, from which it goes on as if it had never stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from lopa.encoder import Moments, Tensors
from lopa.errors import FactorsError, FolderError
from lopa.manifest import TensorSpec
from lopa.priors import trial_steps
from lopa.tensorfile import MAX_HEADER_BYTES, read_metadata, read_tensors, write_tensors
from lopa.values import Float32

if TYPE_CHECKING:
    from lopa.folder import PersonaStore

_KINDS = ("personal", "exp_avg", "exp_avg_sq", "best")


@dataclass
class Progress:
    """The numbers of a run so far."""

    step: int = 0
    """Steps done."""
    plain_nll: float = float("inf")
    """Of the plain model."""
    before_nll: float = float("inf")
    """Of the factors that the persona had."""
    best_nll: float = float("inf")
    best_step: int = 0
    candidate: str = ""
    """The bundle's prior that the run may take after its first steps; empty once that is decided."""
    candidate_nll: float = float("inf")
    prior: str = ""
    """The bundle's prior that it took; empty for none."""
    judged_step: int = 0
    """Steps done when that was decided; if a prior was taken, the optimizer began anew there."""
    outcome: Literal["running", "finished", "early_stopped", "diverged"] = "running"
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0

    @classmethod
    def from_json(cls, text: str, steps: int) -> Self:
        """Parse and check the progress of a run of `steps` steps.

        Raises:
            ValueError, TypeError, RecursionError: not such a progress.
        """
        progress = cls(**json.loads(text))
        progress.validation = [(step, nll) for step, nll in progress.validation]
        nll = [progress.plain_nll, progress.before_nll, progress.candidate_nll, progress.best_nll]
        measured = [*nll, *(nll for _, nll in progress.validation)]
        counts = [
            progress.step,
            progress.best_step,
            progress.judged_step,
            progress.sent_bytes,
            progress.received_bytes,
            *(step for step, _ in progress.validation),
        ]
        reals = [*measured, *progress.losses, *progress.gradient_norms, progress.seconds]
        if any(type(count) is not int or count < 0 for count in counts) or any(type(real) not in (int, float) for real in reals):
            raise TypeError("a number of the progress is of another type, or negative")
        if not isinstance(progress.prior, str) or not isinstance(progress.candidate, str):
            raise TypeError("a prior is not a name")
        past = [progress.best_step, progress.judged_step, *(step for step, _ in progress.validation)]
        if not max(past) <= progress.step <= steps:
            raise ValueError(f"it is at step {progress.step}, its best at {progress.best_step}; the run has {steps} steps")
        if not all(-math.inf < float(real) for real in reals) or not len(progress.losses) == len(progress.gradient_norms) == progress.step:
            raise ValueError("its losses don't fit its step")
        due, last = trial_steps(steps), max((step for step, _ in progress.validation), default=-1)
        if last < 0 or (progress.candidate and (progress.step > due or (progress.step == due and last < due))):
            raise ValueError("its measurements don't fit its step")
        ended: dict[Any, bool] = {
            "running": progress.step < steps,
            "finished": progress.step == steps,
            "early_stopped": True,
            "diverged": True,
        }
        if not ended.get(progress.outcome, False):
            raise ValueError(f"outcome {progress.outcome!r} doesn't fit step {progress.step}")
        return progress

    def to_json(self) -> str:
        return json.dumps(vars(self))

    def copy(self) -> Progress:
        """One that can go on without changing this one."""
        return replace(self, losses=[*self.losses], gradient_norms=[*self.gradient_norms], validation=[*self.validation])

    def stale(self) -> int:
        """Measurements since the best one, or since a prior was judged."""
        return sum(step > max(self.best_step, self.judged_step) for step, _ in self.validation)

    @property
    def optimizer_step(self) -> int:
        """Steps that the optimizer's moments know of."""
        return self.step - (self.judged_step if self.prior else 0)


@dataclass
class TuneState:
    """Everything that the next step depends on, and the best factors so far."""

    digest: str
    """SHA-256 of what the run is: bundle, starting factors, settings, examples."""
    personal: Tensors
    moments: Moments
    best: Tensors
    """Rounded as at rest."""
    progress: Progress = field(default_factory=Progress)

    def save(self, store: PersonaStore) -> None:
        """Write the persona's tuning file, whole or not at all; the values come back bit for bit.

        Raises:
            StorageError: it can't be written.
        """
        groups: Mapping[str, Tensors] = {
            "personal": self.personal,
            "exp_avg": self.moments.exp_avg,
            "exp_avg_sq": self.moments.exp_avg_sq,
            "best": self.best,
        }
        tensors = {f"{kind}.{name}": value for kind, group in groups.items() for name, value in group.items()}
        specs = [TensorSpec(name, value.shape) for name, value in tensors.items()]
        metadata = {"digest": self.digest, "progress": self.progress.to_json()}
        store.write(store.tuning_path, write_tensors(tensors, specs, metadata))


def load_state(store: PersonaStore, digest: str, specs: Sequence[TensorSpec], steps: int) -> TuneState | None:
    """The unfinished run of this digest; None when there is none or the file holds another run. steps: how many it has in all.

    Raises:
        FolderError: the file is damaged.
    """
    path = store.tuning_path
    if not path.exists():
        return None
    try:
        data = store.read(path, 8 + MAX_HEADER_BYTES + sum(len(_KINDS) * 4 * math.prod(spec.shape) for spec in specs))
        metadata = read_metadata(data)
        if metadata.get("digest") != digest:
            return None
        wanted = [TensorSpec(f"{kind}.{spec.name}", spec.shape, "F32") for kind in _KINDS for spec in specs]
        flat = read_tensors(data, wanted)
        if not all(np.isfinite(value).all() for name, value in flat.items() if name.startswith(("personal.", "best."))):
            raise ValueError("its factors have values that are not finite")
        progress = Progress.from_json(metadata["progress"], steps)
    except (OSError, FactorsError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise FolderError(f"{path} is damaged ({error}); remove it to tune from the start") from error
    groups: dict[str, dict[str, Float32]] = {kind: {spec.name: flat[f"{kind}.{spec.name}"] for spec in specs} for kind in _KINDS}
    return TuneState(digest, groups["personal"], Moments(groups["exp_avg"], groups["exp_avg_sq"]), groups["best"], progress)
