"""A tuning run between two steps: one file, from which it goes on as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from lopa.bundle import TensorSpec
from lopa.encoder import Moments, Tensors
from lopa.errors import FactorsError, FolderError
from lopa.files import write_atomic
from lopa.tensorfile import read_metadata, read_tensors, write_tensors
from lopa.values import Float32

_KINDS = ("personal", "exp_avg", "exp_avg_sq", "best")


@dataclass
class Progress:
    """The numbers of a run so far."""

    step: int = 0
    """Steps done."""
    before_nll: float = float("inf")
    """Of the factors that the persona had."""
    best_nll: float = float("inf")
    best_step: int = 0
    outcome: Literal["running", "finished", "diverged"] = "running"
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0


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

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all; the values come back bit for bit.

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
        metadata = {"digest": self.digest, "progress": json.dumps(asdict(self.progress))}
        write_atomic(path, write_tensors(tensors, specs, metadata))


def load_state(path: Path, digest: str, specs: Sequence[TensorSpec]) -> TuneState | None:
    """The unfinished run of this digest; None when there is none or the file holds another run.

    Raises:
        FolderError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
        metadata = read_metadata(data)
        if metadata.get("digest") != digest:
            return None
        wanted = [TensorSpec(f"{kind}.{spec.name}", spec.shape, "F32") for kind in _KINDS for spec in specs]
        flat = read_tensors(data, wanted)
        progress = Progress(**json.loads(metadata["progress"]))
    except (OSError, FactorsError, ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{path} is damaged ({error}); remove it to tune from the start") from error
    progress.validation = [(int(step), float(nll)) for step, nll in progress.validation]
    groups: dict[str, dict[str, Float32]] = {kind: {spec.name: flat[f"{kind}.{spec.name}"] for spec in specs} for kind in _KINDS}
    return TuneState(digest, groups["personal"], Moments(groups["exp_avg"], groups["exp_avg_sq"]), groups["best"], progress)
