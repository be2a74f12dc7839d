"""What a population is worth to LoRA: adapters tuned on everybody's examples of a kind of task, as the shipped bundle's priors are.

    python -m benchmarks.quality.lora_priors --population build/people/priors.jsonl

The population comes from `training/people.py` (training/README.md). An adapter's steps, persons in a step, warm-up and fall of the rate are
those of the bundle's priors; its learning rate is LoRA's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lopa.demo.run import compute_dtype
from lopa_exporters.data import Example, by_task, persons_of, read_examples, tokenize
from lopa_exporters.frozen import FrozenModel
from lopa_exporters.priors import PriorConfig, spread
from lopa_server.models import nano_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quality.grid import load_rates
from benchmarks.quality.learners.learner import AT_REST
from benchmarks.quality.learners.weights import ADAPTERS, RANK, lora

STEPS = 800
"""As in the command that made the bundle's priors."""
RATE_LIKE = {"completion": "completion"}
"""Task whose learning rate of LoRA an adapter is tuned with; of all others that of filing."""
print = partial(print, flush=True)


def train(fm: FrozenModel, examples: Sequence[Example], config: PriorConfig) -> dict[str, Tensor]:
    """Tune one adapter on everybody's examples of one kind.

    Raises:
        DataError: an example does not fit the model's context.
    """
    pairs, people = tokenize(examples, fm, 0), persons_of(examples)[1]
    learner, rng = lora(fm, config.seed, RANK), np.random.default_rng(config.seed)
    for number in range(1, config.steps + 1):
        rows = spread(people, config.persons, rng)
        learner.step(rows, [pairs[row] for row in rows], config.rate_at(number), number)
        if number % 50 == 0:
            print(f"  {number} of {config.steps} steps")
    return dict(learner.state())


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.quality.lora_priors", description=__doc__.splitlines()[0])
    parser.add_argument("--population", type=Path, default=Path("build/people/priors.jsonl"), help="made by training/people.py")
    parser.add_argument("--task", action="append", help="these kinds only, others stay as they are; default: all in the population")
    parser.add_argument("--out", type=Path, default=ADAPTERS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        population = by_task(read_examples(args.population), args.task or [])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    fm, rates = FrozenModel.load(nano_folder(), bf16=compute_dtype() == "bfloat16"), load_rates()
    tuned = dict(load_file(args.out)) if args.out.exists() else {}
    for task, examples in population.items():
        print(f"{task}, {len(examples)} examples")
        config = replace(PriorConfig(steps=STEPS), learning_rate=rates[RATE_LIKE.get(task, "filing")]["lora_r8"])
        tuned |= {f"{task}:{name}": tensor.to(AT_REST) for name, tensor in train(fm, examples, config).items()}
        save_file(tuned, args.out)


if __name__ == "__main__":
    main()
