"""`lopa export priors`: starts for kinds of tasks, tuned on a population. Nothing here imports torch until the command runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lopa_exporters.cli.check import BundleFolder
from lopa_exporters.cli.output import TerminalReporter, describe, failing, print_table


def priors(
    bundle: BundleFolder,
    fm: Annotated[str, typer.Option(help="The bundle's foundation model: a Hugging Face folder or id. It stays frozen.")],
    population: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="JSONL or Parquet: user, task, prompt, target.")],
    out: Annotated[Path, typer.Option(help="Folder of the new bundle.")],
    tasks: Annotated[str, typer.Option(help='Kinds of tasks that get a prior: "naming,docstring". Default: all in the population.')] = "",
    steps: Annotated[int, typer.Option(min=1, help="Steps for each prior.")] = 300,
    persons: Annotated[int, typer.Option(min=1, help="Persons in one step, with one example each.")] = 16,
    learning_rate: Annotated[float, typer.Option(min=0, help="0: the bundle's own, for devices.")] = 0.0,
    rate: Annotated[float, typer.Option(min=0, help="Part of their learning rate that devices take from a prior.")] = 0.1,
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the order.")] = 0,
) -> None:
    """Copy a bundle and give it priors: factors tuned on everybody's examples of a kind of task.

    Devices whose persona was never tuned go on from the prior that fits their examples, if one does. Good for tasks whose answers mean the
    same for everybody; where each user has labels of their own, leave the task out.
    """
    from lopa.bundle import Bundle
    from lopa.encoder import PromptEncoder
    from lopa.factors import Factors
    from lopa.manifest import check_prior_names
    from transformers.utils import logging as chatter

    from lopa_exporters.bundle import check_place, read_fm_spec
    from lopa_exporters.data import by_task, read_examples
    from lopa_exporters.frozen import FrozenModel
    from lopa_exporters.hub import resolve_folder
    from lopa_exporters.priors import PriorConfig, add_priors, train_prior

    chatter.disable_progress_bar()
    chatter.set_verbosity_error()
    reporter = TerminalReporter()
    with failing():
        check_place(out)
        opened, folder = Bundle.open(bundle), resolve_folder(fm)
        if read_fm_spec(folder).fingerprint != opened.manifest.fm.fingerprint:
            raise ValueError(f"{fm} is not the model of this bundle, {opened.manifest.fm.name}")
        config = PriorConfig(steps, persons, learning_rate or opened.manifest.tuning.learning_rate, rate=rate, seed=seed)
        examples = by_task(read_examples(population), [task for task in tasks.split(",") if task])
        check_prior_names(list(examples))
        with reporter.task("Loading the model", None):
            model, encoder = FrozenModel.load(folder, bf16=bf16), PromptEncoder(opened)
        tuned: dict[str, Factors] = {}
        for task, own in examples.items():
            with reporter.task(f"Prior of {task}, {len(own)} examples", steps) as advance:
                tuned[task] = train_prior(model, encoder, own, config, partial(_tell, advance))
        with reporter.task("Writing and verifying", None):
            made = add_priors(opened, tuned, rate, out)
    print_table(f"Bundle {made.manifest.id[:16]} in {made.folder}", describe(made))


def _tell(advance: Callable[[int, str], None], _step: int, loss: float) -> None:
    advance(1, f"NLL {loss:.3f} per token")
