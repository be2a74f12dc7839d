"""A trained shared part on disk, ready to be exported: trained.safetensors and trained.json in the folder of its run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from lopa_exporters.encoder import Encoder, EncoderConfig, NoEncoder
from lopa_exporters.lopa import LoPA, Tensors, config_from_dict, config_to_dict

TENSORS, VALUES = "trained.safetensors", "trained.json"
UNWRITTEN_RATE = 1e-2
"""The tuning rate of runs that did not write theirs down."""


@dataclass(frozen=True)
class Trained:
    """What training gave. fingerprint: of the foundation model. constants: `Encoder.constants`; none without an encoder.

    tuning_rate: of the persons in training, and so of devices.
    """

    fingerprint: str
    encoder: EncoderConfig
    lopa: LoPA
    constants: Tensors
    tuning_rate: float

    @classmethod
    def of(cls, fingerprint: str, encoder: Encoder | NoEncoder, lopa: LoPA, tuning_rate: float) -> Trained:
        """From a finished run."""
        constants = {name: tensor.cpu() for name, tensor in encoder.constants.items()} if isinstance(encoder, Encoder) else {}
        return cls(fingerprint, encoder.config, lopa, constants, tuning_rate)

    def save(self, folder: Path) -> None:
        """Write both files; the values last, by one rename, so that they stand for both."""
        groups = {"shared": self.lopa.shared, "start": self.lopa.start, "encoder": self.constants}
        save_file(
            {f"{kind}/{name}": tensor.contiguous() for kind, group in groups.items() for name, tensor in group.items()}, folder / TENSORS
        )
        values = {
            "fingerprint": self.fingerprint,
            "encoder": dataclasses.asdict(self.encoder),
            "method": config_to_dict(self.lopa.config),
            "tuning_rate": self.tuning_rate,
            "names": {"shared": list(self.lopa.shared), "start": list(self.lopa.start)},
        }
        staged = folder / f"{VALUES}.new"
        staged.write_text(json.dumps(values, indent=1), encoding="utf-8")
        staged.replace(folder / VALUES)

    @classmethod
    def load(cls, folder: Path) -> Trained:
        """Read a finished run.

        Raises:
            ValueError: the run is not finished, or the files are not such a result. OSError: they cannot be read.
        """
        if not (folder / VALUES).is_file():
            raise ValueError(f"{folder} has no {VALUES}: train it to the end with `lopa train-encoder` first")
        try:
            values = json.loads((folder / VALUES).read_text(encoding="utf-8"))
            tensors = load_file(folder / TENSORS)
            parts = {kind: {name: tensors[f"{kind}/{name}"] for name in names} for kind, names in values["names"].items()}
            constants = {key.removeprefix("encoder/"): tensor for key, tensor in tensors.items() if key.startswith("encoder/")}
            lopa = LoPA(config_from_dict(values["method"]), parts["shared"], parts["start"])
            rate = float(values.get("tuning_rate", UNWRITTEN_RATE))
            encoder = values["encoder"]
            if "features" not in encoder:  # written when 0 layers stood for all of them
                encoder = {**encoder, "layers": encoder["layers"] or None}
            return cls(values["fingerprint"], EncoderConfig(**encoder), lopa, constants, rate)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder} does not hold a trained encoder: {type(error).__name__}: {error}") from error

    def apply(self, encoder: Encoder | NoEncoder) -> None:
        """Give a freshly loaded encoder the constants of training.

        Raises:
            ValueError: they are not this encoder's.
        """
        own = encoder.constants if isinstance(encoder, Encoder) else {}
        if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in self.constants.items()}:
            raise ValueError(f"the run's encoder constants are not those of {encoder.config.label}")
        if not all(tensor.isfinite().all() for tensor in self.constants.values()):
            raise ValueError("the run's encoder constants are not finite")
        for name, tensor in self.constants.items():
            own[name].copy_(tensor)
