"""One user's device: a process of its own, with a folder of its own, that tunes and measures.

    python -m lopa.demo.device --address HOST:PORT --folder DIR --user email --task completion --task filing

Speaks JSON lines on standard output: `{"event": "step", ...}` while tuning, `{"event": "done", ...}` for each task.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lopa
from lopa.demo.users import Item, TaskData, load_task
from lopa.values import Placement

if TYPE_CHECKING:
    from lopa.client import Client
    from lopa.persona import Persona

PATIENT = lopa.ClientConfig(timeout=600.0)
"""All devices measure at the same time, on whatever cores the machine has left: an answer may take its time."""
VALIDATION = 0.1
"""The share of tuning items that is held back to measure on."""


@dataclass(frozen=True)
class Plan:
    """How a task is tuned. Completion has little to learn and long targets; filing has to learn the user's own answers."""

    steps: int
    batch_size: int
    placement: Placement
    validate_every: int


PLANS = {"completion": Plan(50, 8, "front", 25), "filing": Plan(200, 16, "after_prefix", 40)}


def examples(items: Sequence[Item]) -> list[lopa.Example]:
    return [lopa.Example(item.prompt, item.target, append_end=item.append_end, prefix=item.prefix or None) for item in items]


def nll_per_token(scores: Sequence[lopa.PairScore]) -> float:
    """Sum of NLL over sum of target tokens, in nats."""
    return sum(score.nll_sum for score in scores) / sum(score.target_tokens for score in scores)


def plain_scores(client: Client, items: Sequence[Item]) -> list[lopa.PairScore]:
    """What the plain model makes of each item."""
    return client.score([lopa.Pair(item.prompt, item.target, append_end=item.append_end, prefix=item.prefix or None) for item in items])


def personal_scores(persona: Persona, items: Sequence[Item]) -> list[lopa.PairScore]:
    """What the model makes of each item with a persona's factors."""
    return persona.score(examples(items))


def accuracy(client: Client, persona: Persona | None, data: TaskData) -> float:
    """The part of test items whose own label is the likeliest, as a whole, of all the user's labels.

    Without a persona: for the plain model.
    """
    soft = [None] * len(data.test) if persona is None else list(persona.soft_prompts([item.text for item in data.test]))
    choices = [
        lopa.Pair(item.prompt, label, append_end=True, prefix=item.prefix or None, soft_prompt=rows)
        for item, rows in zip(data.test, soft, strict=True)
        for label in data.labels
    ]
    nll = [score.nll_sum for score in client.score(choices, placement="front" if persona is None else persona.placement)]
    right, width = 0, len(data.labels)
    for at, item in enumerate(data.test):
        row = nll[at * width : (at + 1) * width]
        right += data.labels[row.index(min(row))] == item.target
    return right / len(data.test)


def say(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


def run_task(client: Client, folder: Path, data: TaskData, steps: int | None) -> None:
    """Tune one persona and measure it on test items."""
    persona = client.personal(folder, persona=data.task)

    def on_step(progress: lopa.TuneProgress) -> None:
        say("step", user=data.user, task=data.task, step=progress.step, steps=progress.steps, nll=progress.loss)

    plan = PLANS[data.task] if steps is None else replace(PLANS[data.task], steps=steps)
    filing = data.task == "filing"
    report = persona.tune(examples(data.tuning), validation=VALIDATION, on_step=on_step, **asdict(plan))
    say(
        "done",
        user=data.user,
        task=data.task,
        base_nll=nll_per_token(plain_scores(client, data.test)),
        personal_nll=nll_per_token(personal_scores(persona, data.test)),
        base_accuracy=accuracy(client, None, data) if filing else None,
        personal_accuracy=accuracy(client, persona, data) if filing else None,
        chance_accuracy=1 / len(data.labels) if filing else None,
        factor_bytes=persona.factor_bytes,
        tune_seconds=report.seconds,
        sent_bytes=report.sent_bytes,
        received_bytes=report.received_bytes,
        tuning_items=len(data.tuning),
        test_items=len(data.test),
        kept=report.kept,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--user", required=True)
    parser.add_argument("--task", action="append", required=True)
    parser.add_argument("--steps", type=int, help="default: as the task's plan says")
    args = parser.parse_args()
    try:
        with lopa.connect(args.address, config=PATIENT) as client:
            for task in args.task:
                run_task(client, args.folder, load_task(args.user, task), args.steps)
    except lopa.LopaError as error:
        print(f"{args.user}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
