"""`lopa export build`: from models and a population to a bundle. Nothing here imports torch until the command runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lopa_exporters import defaults
from lopa_exporters.cli.output import TerminalReporter, failing, show

if TYPE_CHECKING:
    from lopa_exporters.lopa import LoPAConfig

Profile = Literal["factors", "heads", "prompt"]
Composition = Literal["product", "add", "concat", "max", "none"]
Pooling = Literal["auto", "mean", "cls", "last", "pooler"]
Scheme = Literal["none", "fp16", "int8", "int4"]
CORRECTIONS = ",".join(f"{name}={rank}" for name, rank in defaults.CORRECTIONS.items())
HEAD_WIDTH_HELP = f"Inner width of the heads; 0: the encoder's. Default: {defaults.HEAD_WIDTH} with factors, else the encoder's."
LAYERS_HELP = 'First layers to keep; 0: token embeddings alone. Default: all; of "fm" 0.'
FEATURES_HELP = (
    f"Numbers that a text becomes; a wider encoder is projected to them. 0: never. Default: {defaults.FEATURES} with factors, else 0."
)
TUNING_RATE_HELP = "Learning rate of devices, and of persons in training. Default: that of --trained; else " + ", ".join(
    f"{rate:g} with {profile}" for profile, rate in defaults.TUNING_RATES.items()
)
_OF_ENCODER = ("encoder", "encoder_layers", "pooling", "features", "max_tokens", "truncation_side")
_OF_INSTANCE = (*_OF_ENCODER, "rank", "head_width", "corrections", "output_std")
_OF_TRAINING = ("run", "steps", "lifetime", "shared_rate", "start_rate")
_OF_FACTORS = ("z_rank", "corrections")
_METHOD, _TRAINING, _ENCODER, _SIZE = "Method", "Training from a population", "Encoder", "Quantization"


def build(
    context: typer.Context,
    fm: Annotated[str, typer.Option(help="Foundation model: a Hugging Face folder or id.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle; an older bundle there is replaced.")],
    encoder: Annotated[
        str, typer.Option(help='Text encoder: folder or id; "fm" takes the model\'s own embeddings or layers.', rich_help_panel=_ENCODER)
    ] = "fm",
    encoder_layers: Annotated[int | None, typer.Option(min=0, help=LAYERS_HELP, show_default=False, rich_help_panel=_ENCODER)] = None,
    pooling: Annotated[Pooling, typer.Option(help="Tokens to one vector; auto: as its authors do.", rich_help_panel=_ENCODER)] = "auto",
    features: Annotated[int | None, typer.Option(min=0, help=FEATURES_HELP, show_default=False, rich_help_panel=_ENCODER)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longer inputs are cut.", rich_help_panel=_ENCODER)] = 128,
    truncation_side: Annotated[Literal["left", "right"], typer.Option(help="Which end is cut.", rich_help_panel=_ENCODER)] = "left",
    profile: Annotated[Profile, typer.Option(help="What is personal.", rich_help_panel=_METHOD)] = "factors",
    composition: Annotated[Composition, typer.Option(help="How Z_S and U V^T become Z.", rich_help_panel=_METHOD)] = "product",
    rows: Annotated[int, typer.Option(min=1, help="m, rows of the soft prompt.", rich_help_panel=_METHOD)] = 10,
    rank: Annotated[int, typer.Option(min=1, help="r, rank of the instance part.", rich_help_panel=_METHOD)] = 4,
    head_width: Annotated[int | None, typer.Option(min=0, help=HEAD_WIDTH_HELP, show_default=False, rich_help_panel=_METHOD)] = None,
    z_rank: Annotated[
        int, typer.Option(min=1, help="k, rank of the personal prompt; at most m.", rich_help_panel=_METHOD)
    ] = defaults.Z_RANK,
    corrections: Annotated[
        str, typer.Option(help='Personal rank by head matrix: "W1u=1,W2v=2"; "none" for none.', rich_help_panel=_METHOD)
    ] = CORRECTIONS,
    output_std: Annotated[float, typer.Option(min=0, help="Start of the heads' output weights.", rich_help_panel=_METHOD)] = 0.02,
    population: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="JSONL or Parquet: user, task, prompt, target, append_end.", rich_help_panel=_TRAINING
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of the run, to go on after an interruption; default OUT.run.", rich_help_panel=_TRAINING)
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.", rich_help_panel=_TRAINING)] = 2000,
    lifetime: Annotated[
        int, typer.Option(min=0, help="Steps until a person starts anew; 0: joint training.", rich_help_panel=_TRAINING)
    ] = 100,
    shared_rate: Annotated[float, typer.Option(min=0, help="Learning rate of the shared part.", rich_help_panel=_TRAINING)] = 1e-3,
    start_rate: Annotated[float, typer.Option(min=0, max=1, help="Reptile rate of the start values.", rich_help_panel=_TRAINING)] = 0.0,
    bf16: Annotated[bool, typer.Option(help="Train under bfloat16 autocast.", rich_help_panel=_TRAINING)] = False,
    tuning_rate: Annotated[float | None, typer.Option(min=0, help=TUNING_RATE_HELP, show_default=False)] = None,
    tuning_steps: Annotated[int, typer.Option(min=1, help="Steps that devices take by default.")] = 100,
    seed: Annotated[int, typer.Option(help="Of start values and order.")] = 0,
    trained: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Run of `lopa train-encoder`; it decides encoder and method.", rich_help_panel=_TRAINING
        ),
    ] = None,
    quantize: Annotated[Scheme, typer.Option(help="Make the encoder smaller.", rich_help_panel=_SIZE)] = "none",
    max_loss: Annotated[
        float, typer.Option(min=0, help="Percent that a quantized encoder may raise the model's loss.", rich_help_panel=_SIZE)
    ] = 0.5,
    examples: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="JSONL that this is measured on; default: held examples.", rich_help_panel=_SIZE),
    ] = None,
) -> None:
    """Make a bundle for a foundation model: train the shared part on a population, export the graphs, verify them against torch."""
    from lopa.manifest import TuningDefaults
    from transformers.utils import logging as chatter

    from lopa_exporters.cohort import StepSettings
    from lopa_exporters.encoder import EncoderConfig
    from lopa_exporters.hub import resolve_folder
    from lopa_exporters.pipeline import ExportPlan, make_bundle
    from lopa_exporters.population import PopulationConfig
    from lopa_exporters.quality import Gate

    chatter.disable_progress_bar()
    chatter.set_verbosity_error()
    with failing():
        by_run = (*_OF_INSTANCE, *_OF_TRAINING, "profile", "composition", "rows", "z_rank", "seed")
        rules: dict[str, tuple[bool, Sequence[str]]] = {
            "with --trained, whose run decides": (trained is not None, by_run),
            **method_rules(profile, composition),
            "without --population": (population is None, _OF_TRAINING),
            "without --quantize": (quantize == "none", ("max_loss", "examples")),
        }
        refuse_unused(given_in(context), rules)
        folder = resolve_folder(fm)
        own = encoder == "fm"
        rate = rate_of(profile, tuning_rate, trained)
        plan = ExportPlan(
            fm=folder,
            fm_name="" if Path(fm).exists() else fm,
            out=out,
            encoder=EncoderConfig(
                folder=str(folder if own else encoder),
                layers=0 if own and encoder_layers is None else encoder_layers,
                pooling=pooling,
                features=features_of(profile, features),
                max_tokens=max_tokens,
                truncation_side=truncation_side,
            ),
            method=method_of(profile, composition, rows, rank, head_width, z_rank, corrections, output_std),
            population=population,
            run=run or out.with_name(f"{out.name}.run"),
            training=PopulationConfig(
                steps=steps,
                lifetime=lifetime,
                personal=StepSettings(rate),
                shared_rate=shared_rate,
                start_rate=start_rate,
                seed=seed,
            ),
            tuning=TuningDefaults(learning_rate=rate, steps=tuning_steps),
            bf16=bf16,
            seed=seed,
            quantize=quantize,
            gate=Gate(loss=max_loss / 100),
            examples=examples,
            trained=trained,
        )
        made = make_bundle(plan, TerminalReporter())
    show(made, plan)


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
        "with profile prompt, which reads no input": (profile == "prompt", (*_OF_INSTANCE, "z_rank", "composition")),
        f"with profile {profile}": (profile != "factors", _OF_FACTORS),
        "with composition none, which reads no input": (composition == "none", _OF_INSTANCE),
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


def features_of(profile: Profile, given: int | None) -> int:
    """At most so many features: as given, else the profile's."""
    return (defaults.FEATURES if profile == "factors" else 0) if given is None else given


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
