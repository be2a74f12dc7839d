"""What the demo measured, and how it is written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class UserResult:
    """One user and task. NLL in nats per target token over test items; accuracy: how often the right label is
    the likeliest, as a whole, of the user's own labels."""

    name: str
    task: str
    base_nll: float
    personal_nll: float
    other_nll: float
    """Mean over every other user's factors for this task."""
    base_accuracy: float | None
    """Filing only."""
    personal_accuracy: float | None
    chance_accuracy: float | None
    """One in so many labels."""
    factor_bytes: int
    """The factors file on disk."""
    tune_seconds: float
    sent_bytes: int
    received_bytes: int
    tuning_items: int
    test_items: int
    nll_by_factors: dict[str, float]
    """This user's test NLL under each user's factors: a row of the heat map."""

    @property
    def gain(self) -> float:
        """Relative fall of the NLL from the plain model's: 0.1 is 10 %."""
        return 1 - self.personal_nll / self.base_nll


@dataclass(frozen=True)
class MixedBatch:
    """All users generating at the same time, against the same requests without soft prompts. Medians over rounds."""

    users: int
    requests: int
    tokens_per_second: float
    plain_tokens_per_second: float


@dataclass(frozen=True)
class DemoResult:
    users: Sequence[UserResult]
    mixed_batch: MixedBatch
    fm: dict[str, str]
    """name and fingerprint."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each phase."""

    def of_task(self, task: str) -> list[UserResult]:
        return [user for user in self.users if user.task == task]

    def summary(self) -> dict[str, float]:
        """Means over users, by task."""
        figures: dict[str, float] = {}
        for task in dict.fromkeys(user.task for user in self.users):
            rows = self.of_task(task)
            figures[f"{task}.mean_gain_percent"] = 100 * fmean(row.gain for row in rows)
            figures[f"{task}.mean_base_nll"] = fmean(row.base_nll for row in rows)
            figures[f"{task}.mean_personal_nll"] = fmean(row.personal_nll for row in rows)
            figures[f"{task}.mean_other_nll"] = fmean(row.other_nll for row in rows)
            figures[f"{task}.users_better_than_plain"] = sum(row.personal_nll < row.base_nll for row in rows)
            for name in ("base", "personal", "chance"):
                values = [value for row in rows if (value := getattr(row, f"{name}_accuracy")) is not None]
                if values:
                    figures[f"{task}.mean_{name}_accuracy"] = fmean(values)
        figures["max_factor_bytes"] = max(row.factor_bytes for row in self.users)
        return figures

    def write(self, path: Path) -> None:
        """Write the result as JSON."""
        document: dict[str, Any] = asdict(self)
        document["summary"] = self.summary()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
