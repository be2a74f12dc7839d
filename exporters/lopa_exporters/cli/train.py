"""`lopa train-encoder`: the shared part, trained over a population. Nothing here imports torch until the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lopa_exporters import defaults
from lopa_exporters.cli.options import (
    CORRECTIONS,
    FEATURES_HELP,
    HEAD_WIDTH_HELP,
    LAYERS_HELP,
    TUNING_RATE_HELP,
    Composition,
    Pooling,
    Profile,
    encoder_of,
    given_in,
    method_of,
    method_rules,
    rate_of,
    refuse_unused,
)
from lopa_exporters.cli.output import TerminalReporter, failing


def train_encoder(
    context: typer.Context,
    fm: Annotated[str, typer.Option(help="Foundation model: a Hugging Face folder or id. It stays frozen.")],
    population: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="JSONL or Parquet: user, task, prompt, target.")],
    run: Annotated[Path, typer.Option(help="Folder of the run. An interrupted run there goes on.")],
    encoder: Annotated[
        str, typer.Option(help='Text encoder: folder or id; "fm" takes the model\'s own embeddings or layers. It stays frozen.')
    ] = "fm",
    encoder_layers: Annotated[int | None, typer.Option(min=0, help=LAYERS_HELP, show_default=False)] = None,
    pooling: Annotated[Pooling, typer.Option(help="Tokens to one vector; auto: as its authors do.")] = "auto",
    features: Annotated[int | None, typer.Option(min=0, help=FEATURES_HELP, show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longer inputs are cut.")] = 128,
    profile: Annotated[Profile, typer.Option(help="What is personal.")] = "factors",
    composition: Annotated[Composition, typer.Option(help="How Z_S and U V^T become Z.")] = "product",
    rows: Annotated[int, typer.Option(min=1, help="m, rows of the soft prompt; they start from vocabulary embeddings.")] = 10,
    rank: Annotated[int, typer.Option(min=1, help="r, rank of the instance part.")] = 4,
    head_width: Annotated[int | None, typer.Option(min=0, help=HEAD_WIDTH_HELP, show_default=False)] = None,
    z_rank: Annotated[int, typer.Option(min=1, help="k, rank of the personal prompt; at most m.")] = defaults.Z_RANK,
    corrections: Annotated[str, typer.Option(help='Personal rank by head matrix: "W1u=1,W2v=2"; "none" for none.')] = CORRECTIONS,
    output_std: Annotated[float, typer.Option(min=0, help="Start of the heads' output weights.")] = 0.02,
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    persons: Annotated[int, typer.Option(min=1, help="Persons in one step.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Examples of each person in one step.")] = 8,
    lifetime: Annotated[int, typer.Option(min=0, help="Steps until a person starts anew; 0: joint training.")] = 100,
    tuning_rate: Annotated[float | None, typer.Option(min=0, help=TUNING_RATE_HELP, show_default=False)] = None,
    shared_rate: Annotated[float, typer.Option(min=0, help="Learning rate of the shared part.")] = 1e-3,
    start_rate: Annotated[float, typer.Option(min=0, max=1, help="Reptile rate of the start values.")] = 0.0,
    bf16: Annotated[bool | None, typer.Option(help="bfloat16 autocast. Default: on CUDA.")] = None,
    seed: Annotated[int, typer.Option(help="Of start values and order.")] = 0,
) -> None:
    """Train heads and starting factors on the examples of many users; `lopa export --trained RUN` makes a bundle of them."""
    from transformers.utils import logging as chatter

    from lopa_exporters.cohort import StepSettings
    from lopa_exporters.hub import resolve_folder
    from lopa_exporters.pipeline import ExportPlan, train
    from lopa_exporters.population import PopulationConfig

    chatter.disable_progress_bar()
    chatter.set_verbosity_error()
    with failing():
        refuse_unused(given_in(context), method_rules(profile, composition))
        folder = resolve_folder(fm)
        rate = rate_of(profile, tuning_rate)
        training = PopulationConfig(
            steps=steps,
            persons=persons,
            rows=batch,
            lifetime=lifetime,
            personal=StepSettings(rate),
            shared_rate=shared_rate,
            start_rate=start_rate,
            seed=seed,
        )
        plan = ExportPlan(
            fm=folder,
            out=run,
            encoder=encoder_of(folder, profile, encoder, encoder_layers, pooling, features, max_tokens),
            method=method_of(profile, composition, rows, rank, head_width, z_rank, corrections, output_std),
            population=population,
            run=run,
            training=training,
            bf16=_has_cuda() if bf16 is None else bf16,
            seed=seed,
        )
        picture = train(plan, TerminalReporter())
    typer.echo(f"trained: {run}; curves: {picture}; TensorBoard: tensorboard --logdir {run}")
    typer.echo(f"next: lopa export --fm {fm} --trained {run} --out BUNDLE")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
