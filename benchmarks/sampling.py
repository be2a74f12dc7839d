"""One step of choosing tokens for 32 requests, whatever they ask for, beside transformers' own processors row by row.

    python benchmarks/sampling.py --json benchmarks/results/sampling.json

Medians of processor time in milliseconds, torch on one thread, for the vocabularies of lopa-nano, Llama 2 and Llama 3. "json"
holds every row to a schema, over lopa-nano's tokenizer. The peer builds its processors beforehand; for each row it runs those
that the row asks for.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from lopa_server.engine.base import EngineSpec, SamplingParams
from lopa_server.engine.torch_engine.constraints import Grammars
from lopa_server.engine.torch_engine.sampling import Sampler
from lopa_server.models import nano_folder
from report import write
from transformers import AutoTokenizer, LogitsProcessorList
from transformers.generation import logits_process as hf

ROWS, PROMPT = 32, 64
VOCABULARIES = {"lopa-nano": 8192, "Llama 2": 32_000, "Llama 3": 128_256}
DRAWN = SamplingParams(1, temperature=0.8)
KINDS = {
    "greedy": [SamplingParams(1)],
    "drawn": [DRAWN],
    "top_p": [replace(DRAWN, top_p=0.95)],
    "top_k and min_p": [replace(DRAWN, top_k=40, min_p=0.05)],
    "penalties": [SamplingParams(1, repetition_penalty=1.1, presence_penalty=0.5)],
    "mixed": [
        SamplingParams(1),
        replace(DRAWN, top_p=0.95),
        replace(DRAWN, top_k=40, min_p=0.05),
        replace(DRAWN, repetition_penalty=1.1, frequency_penalty=0.5),
    ],
}
SCHEMA = """{"type": "object", "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}},
"required": ["name", "tags"], "additionalProperties": false}"""


def milliseconds(work: Callable[[torch.Tensor], object], vocabulary: int, steps: int) -> float:
    """Median processor time of a step, after two to warm up. Probabilities fall off by Zipf's law, in another order in each row."""
    times = []
    base = -1.5 * torch.arange(1, vocabulary + 1).log()
    orders = [torch.randperm(vocabulary, generator=torch.Generator().manual_seed(row)) for row in range(ROWS)]
    rows = torch.stack([base[order] for order in orders])
    for _ in range(steps + 2):
        logits = rows.clone()
        started = time.process_time()
        work(logits)
        times.append(time.process_time() - started)
    return 1000 * median(times[2:])


def ours(params: Sequence[SamplingParams], vocabulary: int, steps: int) -> float:
    sampler, names = Sampler(vocabulary, torch.device("cpu")), [f"r{row}" for row in range(ROWS)]
    for row, name in enumerate(names):
        sampler.add(name, replace(params[row % len(params)], seed=row), range(PROMPT))
    return milliseconds(lambda logits: sampler.choose(names, logits), vocabulary, steps)


def processors(params: SamplingParams) -> LogitsProcessorList:
    """transformers' processors for the same parameters; it has none for presence and frequency."""
    chosen = LogitsProcessorList()
    if params.repetition_penalty != 1:
        chosen.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature not in (0, 1):
        chosen.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chosen.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chosen.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        chosen.append(hf.MinPLogitsWarper(params.min_p))
    return chosen


def theirs(params: Sequence[SamplingParams], vocabulary: int, steps: int) -> float:
    rows = [params[row % len(params)] for row in range(ROWS)]
    lists, seen = [processors(row) for row in rows], torch.arange(PROMPT)[None]
    generators = [torch.Generator().manual_seed(row) for row in range(ROWS)]

    def step(logits: torch.Tensor) -> list[int]:
        tokens = []
        for row, one in enumerate(rows):
            scores = lists[row](seen, logits[row : row + 1])
            drawn = one.temperature > 0
            tokens.append(torch.multinomial(scores.softmax(1), 1, generator=generators[row]) if drawn else scores.argmax(1))
        return [int(token) for token in tokens]

    return milliseconds(step, vocabulary, steps)


def held_to_a_schema(steps: int) -> float:
    """Every row in a grammar of its own, advanced by the tokens that are drawn; texts that are complete begin again."""
    tokenizer = AutoTokenizer.from_pretrained(nano_folder())
    spec = EngineSpec("nano", "0" * 64, 1, 1, VOCABULARIES["lopa-nano"], "float32", 1.0, (tokenizer.eos_token_id,))
    grammars = Grammars.of(tokenizer, spec)
    if grammars is None:
        raise SystemExit("llguidance can't read lopa-nano's tokenizer")
    sampler, names = Sampler(spec.vocab_size, torch.device("cpu")), [f"r{row}" for row in range(ROWS)]

    def begin(row: int) -> None:
        sampler.remove(names[row])
        sampler.add(names[row], replace(DRAWN, seed=row), range(PROMPT), grammars.begin(SCHEMA))

    def step(logits: torch.Tensor) -> None:
        for row, choice in enumerate(sampler.choose(names, logits)):
            if choice.complete:
                begin(row)

    for row in range(ROWS):
        begin(row)
    result = milliseconds(step, spec.vocab_size, steps)
    grammars.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures, rows = {}, []
    print(f"{'kind':17}{'vocabulary':>12}{'ours ms':>10}{'row by row ms':>15}")
    for model, vocabulary in VOCABULARIES.items():
        for kind, params in KINDS.items():
            mine, other = ours(params, vocabulary, arguments.steps), theirs(params, vocabulary, arguments.steps)
            rows.append({"kind": kind, "model": model, "vocabulary": vocabulary, "ours_ms": mine, "row_by_row_ms": other})
            figures[f"{kind.replace(' ', '_')}_{vocabulary}_ms"] = mine
            print(f"{kind:17}{vocabulary:12}{mine:10.2f}{other:15.2f}")
    figures["json_8192_ms"] = held_to_a_schema(10 * arguments.steps)
    print(f"{'json':17}{VOCABULARIES['lopa-nano']:12}{figures['json_8192_ms']:10.2f}")
    write(arguments.json, figures, rows)


if __name__ == "__main__":
    main()
