"""What `lopa export` and `lopa train-encoder` make of a model unless told otherwise. Nothing here imports torch.

Chosen on development packages, without a population, for 64 KiB of factors a user at d = 4096, whatever the encoder
(`factors_exported` in docs/quality.md). V's last matrix, whose corrections d * r multiplies, stays shared: the personal
prompt and the heads' first layers make more of the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FEATURES = 512
"""Of profile factors: what the heads read at most. A wider encoder is projected to them, and the bytes saved are worth more than its width:
on two development packages, 4,096 features at ranks for 64 KiB gave worse answers than 512 projected ones at the ranks below."""
HEAD_WIDTH = 128
"""Of profile factors. The paper's heads are as wide as the encoder, which a device's share of the bundle need not be."""
Z_RANK = 6
CORRECTIONS: Mapping[str, int] = {"W1u": 1, "W2u": 4, "W1v": 4}
Z_GAIN = 15.0
"""In root mean squares of the model's embeddings: rows that steer a model go far (Lester et al. 2021 tune at a rate of 0.3)."""
CORRECTION_GAIN, SPREAD = 0.03, 10.0
"""Q starts at the user's own answers, and this large it stays there for a while (`LoPAConfig.spread`)."""
TUNING_RATES: Mapping[str, float] = {"factors": 3e-2, "heads": 1e-2, "prompt": 1e-2}
"""Learning rate of devices by profile."""


def factors() -> dict[str, Any]:
    """Fields of `LoPAConfig` for profile factors, but for `z_gain`, which the model's embeddings decide."""
    return {
        "head_width": HEAD_WIDTH,
        "z_rank": Z_RANK,
        "corrections": dict(CORRECTIONS),
        "correction_gain": CORRECTION_GAIN,
        "spread": SPREAD,
    }
