"""`lopa export build`: from models and a population to a bundle. Nothing here imports torch until the command runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from lopa_exporters import defaults
from lopa_exporters.cli.options import (
    CORRECTIONS,
    FEATURES_HELP,
    HEAD_WIDTH_HELP,
    LAYERS_HELP,
    OF_RUN,
    OF_TRAINING,
    TUNING_RATE_HELP,
    Composition,
    Pooling,
    Profile,
    Side,
    encoder_of,
    given_in,
    method_of,
    method_rules,
    rate_of,
    refuse_unused,
)
from lopa_exporters.cli.output import TerminalReporter, failing, show

Scheme = Literal["none", "fp16", "int8", "int4"]
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
    truncation_side: Annotated[Side, typer.Option(help="Which end is cut.", rich_help_panel=_ENCODER)] = "left",
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
    from lopa_exporters.hub import resolve_folder
    from lopa_exporters.pipeline import ExportPlan, make_bundle
    from lopa_exporters.population import PopulationConfig
    from lopa_exporters.quality import Gate

    chatter.disable_progress_bar()
    chatter.set_verbosity_error()
    with failing():
        rules: dict[str, tuple[bool, Sequence[str]]] = {
            "with --trained, whose run decides": (trained is not None, OF_RUN),
            **method_rules(profile, composition),
            "without --population": (population is None, OF_TRAINING),
            "without --quantize": (quantize == "none", ("max_loss", "examples")),
        }
        refuse_unused(given_in(context), rules)
        folder = resolve_folder(fm)
        rate = rate_of(profile, tuning_rate, trained)
        plan = ExportPlan(
            fm=folder,
            fm_name="" if Path(fm).exists() else fm,
            out=out,
            encoder=encoder_of(folder, profile, encoder, encoder_layers, pooling, features, max_tokens, truncation_side),
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
