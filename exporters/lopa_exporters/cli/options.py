"""Options that `lopa export build` and `lopa train-encoder` share: types, texts, meaning. Nothing imports torch until it is called."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from lopa_exporters import defaults

if TYPE_CHECKING:
    from lopa_exporters.encoder import EncoderConfig
    from lopa_exporters.lopa import LoPAConfig

Profile = Literal["factors", "heads", "prompt"]
Composition = Literal["product", "add", "concat", "max", "none"]
Pooling = Literal["auto", "mean", "cls", "last", "pooler"]
Side = Literal["left", "right"]
CORRECTIONS = ",".join(f"{name}={rank}" for name, rank in defaults.CORRECTIONS.items())
HEAD_WIDTH_HELP = f"Inner width of the heads; 0: the encoder's. Default: {defaults.HEAD_WIDTH} with factors, else the encoder's."
LAYERS_HELP = 'First layers to keep; 0: token embeddings alone. Default: all; of "fm" 0.'
FEATURES_HELP = (
    f"Numbers that a text becomes; a wider encoder is projected to them. 0: never. Default: {defaults.FEATURES} with factors, else 0."
)
TUNING_RATE_HELP = "Learning rate of devices, and of persons in training. Default: that of --trained; else " + ", ".join(
    f"{rate:g} with {profile}" for profile, rate in defaults.TUNING_RATES.items()
)
OF_ENCODER = ("encoder", "encoder_layers", "pooling", "features", "max_tokens", "truncation_side")
OF_INSTANCE = (*OF_ENCODER, "rank", "head_width", "corrections", "output_std")
OF_TRAINING = ("run", "steps", "lifetime", "shared_rate", "start_rate")
OF_FACTORS = ("z_rank", "corrections")
OF_RUN = (*OF_INSTANCE, *OF_TRAINING, "profile", "composition", "rows", "z_rank", "seed")
"""Parameters of the encoder, the instance part, training, profile factors, and of what a finished run decides; for `refuse_unused`."""


def given_in(context: typer.Context) -> set[str]:
    """Names of the parameters that the command line gives."""
    return {name for name in context.params if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"}


def refuse_unused(given: set[str], rules: Mapping[str, tuple[bool, Sequence[str]]]) -> None:
    """Tell what would be dropped without a word. rules: reason -> (whether it holds, parameters that have no effect then).

    Raises:
        ValueError: an option that another one leaves nothing to say.
    """
    for reason, (holds, names) in rules.items():
        unused = [f"--{name.replace('_', '-')}" for name in names if name in given]
        if holds and unused:
            raise ValueError(f"{', '.join(unused)}: no effect {reason}")


def method_rules(profile: Profile, composition: Composition) -> dict[str, tuple[bool, Sequence[str]]]:
    """For `refuse_unused`: what the method leaves out."""
    return {
        "with profile prompt, which reads no input": (profile == "prompt", (*OF_INSTANCE, "z_rank", "composition")),
        f"with profile {profile}": (profile != "factors", OF_FACTORS),
        "with composition none, which reads no input": (composition == "none", OF_INSTANCE),
    }


def method_of(
    profile: Profile,
    composition: Composition,
    rows: int,
    rank: int,
    head_width: int | None,
    z_rank: int,
    corrections: str,
    output_std: float,
) -> LoPAConfig:
    """The method of these options; `hidden` and `features` are the models' to say.

    Raises:
        ValueError: a value out of range, or values that don't go together.
    """
    from lopa_exporters.lopa import LoPAConfig

    return LoPAConfig(
        hidden=1,
        features=1,
        rows=rows,
        rank=rank,
        head_width=(defaults.HEAD_WIDTH if profile == "factors" else 0) if head_width is None else head_width,
        composition="none" if profile == "prompt" else composition,
        profile=profile,
        z_rank=min(z_rank, rows),
        corrections=parse_corrections(corrections),
        correction_gain=defaults.CORRECTION_GAIN,
        spread=defaults.SPREAD,
        output_std=output_std,
    )


def encoder_of(
    fm: Path,
    profile: Profile,
    encoder: str,
    layers: int | None,
    pooling: Pooling,
    features: int | None,
    max_tokens: int,
    truncation_side: Side = "left",
) -> EncoderConfig:
    """The encoder of these options: of "fm", the model in folder `fm`, the token embeddings unless `layers` are given.

    Raises:
        ValueError: a value out of range, or values that don't go together.
    """
    from lopa_exporters.encoder import EncoderConfig

    own = encoder == "fm"
    return EncoderConfig(
        folder=str(fm if own else encoder),
        layers=0 if own and layers is None else layers,
        pooling=pooling,
        features=(defaults.FEATURES if profile == "factors" else 0) if features is None else features,
        max_tokens=max_tokens,
        truncation_side=truncation_side,
    )


def rate_of(profile: Profile, given: float | None, trained: Path | None = None) -> float:
    """The learning rate of devices: as given, else that of the run `trained`, else the profile's.

    Raises:
        ValueError, OSError: it is not above 0, or there is no such run.
    """
    if given is not None:
        if not 0 < given < math.inf:
            raise ValueError(f"tuning rate is {given}; it must be above 0 and finite")
        return given
    if trained is None:
        return defaults.TUNING_RATES[profile]
    from lopa_exporters.trained import Trained

    return Trained.load(trained).tuning_rate


def parse_corrections(text: str) -> dict[str, int]:
    """ "W1u=1,W2v=2" to ranks by matrix.

    Raises:
        ValueError: another form.
    """
    if text == "none":
        return {}
    pairs = [(name.strip(), rank.strip()) for name, _, rank in (part.partition("=") for part in text.split(","))]
    if any(not name or not rank.isdecimal() for name, rank in pairs) or len(dict(pairs)) < len(pairs):
        raise ValueError(f'corrections is {text!r}; a list such as "W1u=1,W2v=2", each matrix once, or "none", is needed')
    return {name: int(rank) for name, rank in pairs}
