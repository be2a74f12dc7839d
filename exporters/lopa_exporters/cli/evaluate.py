"""`lopa eval`: the paper's own tasks on any model. Nothing here imports torch until the command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lopa_exporters.cli.output import TerminalReporter, failing, print_table

Task = Literal["mbpp", "cruxeval-i", "cruxeval-o", "glue-sst2", "glue-mnli", "glue-mrpc", "glue-qnli", "glue-qqp", "glue-rte"]
Method = Literal["none", "prompt-tuning", "idpg", "lopa", "lora", "full"]
_RECIPE, _LENGTHS = "Instead of the paper's hyper-parameters", "Instead of the paper's lengths and decoding"


def evaluate(
    task: Annotated[Task, typer.Option(help="What to solve.")],
    data: Annotated[
        Path, typer.Option(exists=True, help="JSONL, Parquet, CSV or TSV; for GLUE also a folder. A code task's file is split in halves.")
    ],
    fm: Annotated[str, typer.Option(help="Foundation model: a Hugging Face folder or id; for GLUE a masked language model.")] = "",
    method: Annotated[Method, typer.Option(help="How the model is adapted first.")] = "none",
    run: Annotated[
        Path | None, typer.Option(help="Folder of the run, to go on after an interruption. Default: eval/TASK-METHOD-MODEL-SEED.")
    ] = None,
    test: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Test file; then all of --data is for training.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many examples for training and for the test; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of start values, order and dropout.")] = 9876,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Execute what the model writes, in the sandbox. MBPP and CruxEval need it.")
    ] = False,
    reference: Annotated[bool, typer.Option("--reference", help="Score the data set's own answers instead of a model's.")] = False,
    each_epoch: Annotated[bool, typer.Option("--each-epoch", help="GLUE: score the test after every epoch too.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here as well.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: CUDA where there is one.")] = None,
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast.")] = False,
    answer_batch: Annotated[int, typer.Option(min=1, help="Inputs that are answered together.")] = 8,
    processes: Annotated[int, typer.Option(min=0, help="Programs executed at the same time; 0: as many as cores.")] = 0,
    rows: Annotated[int | None, typer.Option(help="m, rows of the soft prompt.", rich_help_panel=_RECIPE)] = None,
    rank: Annotated[int | None, typer.Option(help="r, rank of LoPA's instance part.", rich_help_panel=_RECIPE)] = None,
    head_width: Annotated[
        int | None, typer.Option(help="Inner width of LoPA's and IDPG's heads; 0: the encoder's.", rich_help_panel=_RECIPE)
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="Text encoder of LoPA and IDPG: folder or id.", rich_help_panel=_RECIPE)] = None,
    encoder_tokens: Annotated[int | None, typer.Option(help="Longer inputs are cut.", rich_help_panel=_RECIPE)] = None,
    train_encoder: Annotated[
        bool | None,
        typer.Option("--train-encoder", help="Train the encoder along, as the official GLUE code does.", rich_help_panel=_RECIPE),
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Before each head.", rich_help_panel=_RECIPE)] = None,
    prompt_start: Annotated[
        Literal["vocabulary", "random"] | None, typer.Option(help="Where soft prompts begin.", rich_help_panel=_RECIPE)
    ] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Peak learning rate.", rich_help_panel=_RECIPE)] = None,
    epochs: Annotated[int | None, typer.Option(rich_help_panel=_RECIPE)] = None,
    batch: Annotated[int | None, typer.Option(help="Training examples in one step.", rich_help_panel=_RECIPE)] = None,
    lora_rank: Annotated[int | None, typer.Option(rich_help_panel=_RECIPE)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of input and answer together.", rich_help_panel=_LENGTHS)] = None,
    max_new: Annotated[int | None, typer.Option(help="Tokens written at most.", rich_help_panel=_LENGTHS)] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy.", rich_help_panel=_LENGTHS)] = None,
) -> None:
    """Score a model on MBPP, CruxEval or GLUE, adapted by one of the paper's methods with the paper's hyper-parameters."""
    changes = {
        "rows": rows,
        "rank": rank,
        "head_width": head_width,
        "encoder": encoder,
        "encoder_tokens": encoder_tokens,
        "train_encoder": train_encoder,
        "dropout": dropout,
        "prompt_start": prompt_start,
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batch": batch,
        "lora_rank": lora_rank,
        "max_tokens": max_tokens,
        "max_new": max_new,
        "temperature": temperature,
    }
    own = {
        "task": task,
        "method": method,
        "data": data,
        "test": test,
        "limit": limit,
        "seed": seed,
        "bf16": bf16,
        "device": device,
        "allow_code_execution": allow_code_execution,
        "each_epoch": each_epoch,
        "batch": answer_batch,
        "processes": processes,
    }
    with failing():
        report = (
            _references(own)
            if reference
            else _evaluate(own, fm, run, {name: value for name, value in changes.items() if value is not None})
        )
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _show(report)


def _references(own: dict[str, Any]) -> dict[str, Any]:
    from lopa_exporters.eval.coding import TASKS, score_references

    if own["task"] not in TASKS:
        raise ValueError(f"reference answers are executed for {', '.join(TASKS)} only")
    names = ("allow_code_execution", "limit", "processes")
    return score_references(own["task"], own["data"], **{name: own[name] for name in names}, reporter=TerminalReporter())


def _evaluate(own: dict[str, Any], fm: str, run: Path | None, changes: dict[str, Any]) -> dict[str, Any]:
    import dataclasses

    from transformers.utils import logging as chatter

    from lopa_exporters.eval.classification import evaluate_glue
    from lopa_exporters.eval.coding import TASKS, evaluate_code
    from lopa_exporters.eval.plan import EvalPlan
    from lopa_exporters.eval.recipes import paper_recipe
    from lopa_exporters.hub import resolve_folder

    if not fm:
        raise ValueError("give a foundation model with --fm, or --reference")
    chatter.disable_progress_bar()
    chatter.set_verbosity_error()
    folder = resolve_folder(fm)
    recipe = dataclasses.replace(paper_recipe(own["task"], own["method"]), **changes)
    place = run or Path("eval") / f"{own['task']}-{own['method']}-{Path(fm).name}-{own['seed']}"
    plan = EvalPlan(**own, fm=folder, run=place, recipe=recipe)
    return (evaluate_code if own["task"] in TASKS else evaluate_glue)(plan, TerminalReporter())


def _show(report: dict[str, Any]) -> None:
    """The figures, and what the sandbox can't prevent here."""
    rows = {}
    for figure in report.get("metrics", [report["metric"]]):
        rows[figure["name"]] = f"{figure['value']:.2%} (95 % interval {figure['low']:.2%} to {figure['high']:.2%})"
    rows["examples"] = str(report["n"])
    for name, title in (
        ("n_train", "trained on"),
        ("trained_numbers", "trained numbers"),
        ("nll_per_token", "NLL per token of the references"),
    ):
        if report.get(name):
            rows[title] = f"{report[name]:,.4f}" if isinstance(report[name], float) else f"{report[name]:,}"
    if report.get("best_epoch"):
        name = report["metric"]["name"]
        rows["best epoch"] = f"{report['best_epoch']['epoch']}: {report['best_epoch'][name]:.2%} (selected on the test examples)"
    for name, reason in list(report.get("failed", {}).items())[:20]:
        rows[f"failed: {name}"] = reason
    possible = [name for name, still in report.get("sandbox", {}).get("possible", {}).items() if still]
    if possible:
        rows["not prevented on this machine"] = ", ".join(possible)
    print_table(f"{report['task']}, {report['method']}", rows)
