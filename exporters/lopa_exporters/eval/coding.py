"""MBPP and CruxEval: train a method on one half, let the model write on the other, execute what it wrote."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopa_exporters.data import Indices
from lopa_exporters.eval import cruxeval, mbpp
from lopa_exporters.eval.code import CodeTask, Problem, halves
from lopa_exporters.eval.generation import Writing, continue_prompts
from lopa_exporters.eval.methods import Features, Method, build_method
from lopa_exporters.eval.metrics import Figure, proportion
from lopa_exporters.eval.plan import PREDICTIONS, EvalPlan, claim, write_report
from lopa_exporters.eval.sandbox import Limits, Sandbox, Verdict
from lopa_exporters.eval.training import Trainer
from lopa_exporters.frozen import FrozenModel, TokenPair
from lopa_exporters.pipeline import Reporter

log = logging.getLogger(__name__)
TASKS = {task.name: task for task in (mbpp.TASK, cruxeval.INPUT, cruxeval.OUTPUT)}


@dataclasses.dataclass(frozen=True)
class Reader:
    """How one model reads problems within its recipe's lengths."""

    fm: FrozenModel
    task: CodeTask
    plan: EvalPlan
    soft_rows: int

    @property
    def most(self) -> int:
        """Tokens of prompt and answer together."""
        return min(self.plan.recipe.max_tokens, self.fm.context - self.soft_rows)

    def prompts(self, problems: Sequence[Problem]) -> list[list[int]]:
        """Token ids, cut on the left to the recipe's prompt length."""
        rows = self.fm.tokenize_prompts([problem.prompt for problem in problems])
        first = self.fm.tokenizer.bos_token_id
        if self.task.starts_with_bos and first is not None:
            rows = [row if row[:1] == [first] else [first, *row] for row in rows]
        return [row[-self.plan.recipe.max_prompt :] if self.plan.recipe.max_prompt else row for row in rows]

    def pairs(self, problems: Sequence[Problem]) -> list[TokenPair]:
        """Prompts with targets: a target that is too long is cut at its end, then a prompt at its beginning."""
        targets = self.fm.tokenize_targets([problem.target for problem in problems], [self.task.ends_with_eos] * len(problems))
        pairs = []
        for prompt, target in zip(self.prompts(problems), targets, strict=True):
            kept = prompt if self.plan.recipe.max_prompt else prompt[-max(1, self.most - len(target)) :]
            pairs.append(TokenPair(kept, target[: max(1, self.most - len(kept))]))
        return pairs

    def room(self, prompt: Sequence[int]) -> int:
        """Tokens that may be written after a prompt; 0 or less: it is too long to be answered."""
        left = self.fm.context - self.soft_rows - len(prompt)
        return min(self.plan.recipe.max_new or self.most - len(prompt), left)


def evaluate_code(plan: EvalPlan, reporter: Reporter) -> dict[str, Any]:
    """Run a plan to its report.

    Raises:
        ValueError: data, model, recipe or run folder that do not fit; CodeExecutionRefused. SandboxError: programs can't be executed here.
    """
    task = TASKS[plan.task]
    sandbox = Sandbox(Limits(cpu_seconds=task.cpu_seconds), allow_code_execution=plan.allow_code_execution)
    measured = try_out(sandbox)
    files = [plan.data] if plan.test is None else [plan.data, plan.test]
    train, test = halves(task.read(plan.data)) if plan.test is None else (task.read(plan.data), task.read(plan.test))
    train, test = plan.limited(train), plan.limited(test)
    identity = plan.identity(files)
    claim(plan.run, identity)

    # Full fine-tuning needs float32 weights under autocast; frozen ones may be smaller.
    fm = FrozenModel.load(plan.fm, device=plan.device, bf16=plan.bf16 and plan.method != "full")
    method = build_method(plan.method, plan.recipe, fm, plan.seed)
    fm = dataclasses.replace(fm, model=method.model, bf16=plan.bf16)
    reader = Reader(fm, task, plan, method.soft.config.soft_prompt_rows if method.soft else 0)
    trained = _train(plan, method, reader, train, identity, reporter) if method.trainable else {}
    features = method.soft.features([problem.prompt for problem in test]) if method.soft else None
    method.train(False)
    nll = _nll(method, features, reader, test)
    written = _write(plan, method, features, reader, test, reporter)
    verdicts = judge(sandbox, task, test, written, plan.processes, reporter)
    found = {
        "n": len(test),
        "nll_per_token": nll,
        "unanswered": sum(reader.room(prompt) < 1 for prompt in reader.prompts(test)),
        "n_train": len(train) if method.trainable else 0,
        "trained_numbers": method.count(),
        **trained,
        "sandbox": {**measured, "limits": dataclasses.asdict(sandbox.limits)},
        "failures": reasons(verdicts),
    }
    return write_report(plan, identity, [proportion(task.metric, [verdict.passed for verdict in verdicts])], found)


def try_out(sandbox: Sandbox) -> dict[str, Any]:
    """`Sandbox.measure`; what programs could still do here is told before any is executed.

    Raises:
        SandboxError: no confined process could be started.
    """
    measured = sandbox.measure()
    possible = [name for name, still in measured["possible"].items() if still]
    if possible:
        log.warning("not prevented on this machine for code that a model wrote: %s", ", ".join(possible))
    return measured


def score_references(
    task: str, data: Path, *, allow_code_execution: bool, limit: int, processes: int, reporter: Reporter
) -> dict[str, Any]:
    """The data set's own answers through the same sandbox: what the scorer can give at most, and which problems it can't.

    Raises:
        As `evaluate_code`.
    """
    own = TASKS[task]
    sandbox = Sandbox(Limits(cpu_seconds=own.cpu_seconds), allow_code_execution=allow_code_execution)
    measured = try_out(sandbox)
    problems = own.read(data)[: limit or None]
    with reporter.task("Executing", len(problems)) as done:
        verdicts = []
        for verdict in sandbox.check_all([own.reference(problem) for problem in problems], processes):
            verdicts.append(verdict)
            done(1, "")
    failed = {problem.id: verdict.reason for problem, verdict in zip(problems, verdicts, strict=True) if not verdict.passed}
    figure: Figure = proportion(own.metric, [verdict.passed for verdict in verdicts])
    return {
        "task": task,
        "method": "reference",
        "metric": dataclasses.asdict(figure),
        "n": len(problems),
        "failed": failed,
        "sandbox": measured,
    }


def judge(
    sandbox: Sandbox, task: CodeTask, problems: Sequence[Problem], written: Sequence[str], processes: int, reporter: Reporter
) -> list[Verdict]:
    """Verdicts on what was written, in order."""
    checks = [task.check(problem, text) for problem, text in zip(problems, written, strict=True)]
    found = sandbox.check_all([check for check in checks if check is not None], processes)
    verdicts = []
    with reporter.task("Executing", len(checks)) as done:
        for check in checks:
            verdicts.append(Verdict(False, "not an answer") if check is None else next(found))
            done(1, "")
    return verdicts


def reasons(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How often programs failed by which kind of reason: the exception's name, not its text."""
    counts: dict[str, int] = {}
    for verdict in verdicts:
        if not verdict.passed:
            kind = verdict.reason.split(":")[0]
            counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda entry: -entry[1])[:20])


def _train(
    plan: EvalPlan, method: Method, reader: Reader, train: Sequence[Problem], identity: dict[str, Any], reporter: Reporter
) -> dict[str, Any]:
    """Train to the end; what the report says about it."""
    pairs = reader.pairs(train)
    features = method.soft.features([problem.prompt for problem in train]) if method.soft else None

    def loss(rows: Indices) -> Tensor:
        losses = reader.fm.losses(_soft(method, features, rows, train=True), [pairs[row] for row in rows])
        return losses.mean()

    trainer = Trainer(method, plan.recipe, loss, len(pairs), plan.run, identity)
    with reporter.task("Training", trainer.steps) as done:
        done(trainer.step, "")
        trainer.run(lambda _, value: done(1, f"loss {value:.3f}"))
    return {"steps": trainer.steps, "training_seconds": round(trainer.seconds, 1)}


def _soft(method: Method, features: Features | None, rows: Sequence[int] | Indices, *, train: bool) -> Tensor | None:
    return None if method.soft is None or features is None else method.soft(features, rows, train=train)


@torch.no_grad()
def _nll(method: Method, features: Features | None, reader: Reader, test: Sequence[Problem]) -> float:
    """Of the reference answers, in nats per token."""
    pairs = reader.pairs(test)
    nll, tokens = 0.0, 0
    for start in range(0, len(pairs), reader.plan.batch):
        rows = range(start, min(start + reader.plan.batch, len(pairs)))
        losses = reader.fm.losses(_soft(method, features, list(rows), train=False), [pairs[row] for row in rows])
        nll, tokens = nll + losses.nll.sum().item(), tokens + int(losses.tokens.sum())
    return nll / tokens


@torch.no_grad()
def _write(
    plan: EvalPlan, method: Method, features: Features | None, reader: Reader, test: Sequence[Problem], reporter: Reporter
) -> list[str]:
    """What the model writes for each problem; kept in predictions.jsonl as it comes, so an interrupted run goes on behind it."""
    path = plan.run / PREDICTIONS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    earlier = {row["id"]: row["written"] for row in (json.loads(line) for line in lines if line.endswith("\n"))}
    written: dict[str, str] = {}
    prompts = reader.prompts(test)
    with path.open("w", encoding="utf-8") as file, reporter.task("Writing", len(test)) as done:
        for start in range(0, len(test), plan.batch):
            rows = list(range(start, min(start + plan.batch, len(test))))
            names = [test[row].id for row in rows]
            # A batch that was cut off is written again as a whole: sampling draws for all of its rows.
            texts = (
                [earlier[name] for name in names]
                if earlier.keys() >= set(names)
                else _answers(plan, method, features, reader, prompts, rows)
            )
            written |= zip(names, texts, strict=True)
            file.writelines(json.dumps({"id": name, "written": text}) + "\n" for name, text in zip(names, texts, strict=True))
            file.flush()
            done(len(rows), "")
    return [written[problem.id] for problem in test]


def _answers(
    plan: EvalPlan, method: Method, features: Features | None, reader: Reader, prompts: Sequence[Sequence[int]], rows: Sequence[int]
) -> list[str]:
    """One batch; a prompt that leaves no room has no answer."""
    able = [row for row in rows if reader.room(prompts[row]) > 0]
    if not able:
        return [""] * len(rows)
    torch.manual_seed(plan.seed + rows[0])
    how = Writing(reader.task.stops, plan.recipe.temperature, plan.recipe.top_p)
    soft = _soft(method, features, able, train=False)
    texts = continue_prompts(reader.fm, soft, [prompts[row] for row in able], [reader.room(prompts[row]) for row in able], how)
    answers = dict(zip(able, texts, strict=True))
    return [answers.get(row, "") for row in rows]
