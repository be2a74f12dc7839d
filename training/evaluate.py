"""Measure lopa-nano on the held-out packages and write its model card.

    python training/evaluate.py --model build/lopa_nano/model --corpus build/corpus --card build/lopa_nano/model/README.md

Bits per byte: the sum of -log2 p over a window's tokens, divided by the window's UTF-8 bytes; windows of 512 tokens, the metadata header
itself not counted. Every held-out package of this machine is measured with and without the header.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

import torch
from lopa.demo.users import HELD_OUT, NoSuchUser, package_folder, read_modules
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 512
MAX_WINDOWS = 24
PROMPTS = (
    "<|code|>def read_json(path):\n    ",
    "<|repo|>requests<|file|>sessions<|code|>class Session",
    "<|code|>import os\nimport sys\n\n\ndef main():\n    parser = argparse.",
)


def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str]]) -> float:
    """Bits per byte over (header, code) windows."""
    bits, size = 0.0, 0
    for header, code in texts:
        head = tokenizer(header)["input_ids"]
        body = tokenizer(code)["input_ids"][:WINDOW]
        ids = torch.tensor([head + body])
        logits = model(input_ids=ids).logits[0, len(head) - 1 : -1]
        bits += nn.functional.cross_entropy(logits.float(), ids[0, len(head) :], reduction="sum").item() / 0.6931471805599453
        size += len(tokenizer.decode(body).encode())
    return bits / size


def windows(user: str, header: bool) -> list[tuple[str, str]]:
    """Up to MAX_WINDOWS windows of a package, spread over its files."""
    found = []
    for name, text in read_modules(package_folder(user)).items():
        front = f"<|repo|>{user}<|file|>{name}<|code|>" if header else "<|code|>"
        found += [(front, text[at : at + 4 * WINDOW]) for at in range(0, len(text) - 2 * WINDOW, 4 * WINDOW)]
    return found[:: max(1, len(found) // MAX_WINDOWS)][:MAX_WINDOWS]


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    torch.manual_seed(0)
    out = model.generate(ids, max_new_tokens=80, do_sample=True, temperature=0.6, top_p=0.9, pad_token_id=0)
    return str(tokenizer.decode(out[0], skip_special_tokens=False))


CARD = """---
license: apache-2.0
language: code
library_name: transformers
---
# lopa-nano

The foundation model embedded in lopa: a {parameters:.1f} M parameter Llama for Python code, made to be steered by a prompt.
It exists to show and test personalization on a machine without a GPU or a network; it is no coding assistant.

| | |
| --- | --- |
| architecture | Llama: {layers} layers, width {width}, {heads} heads, tied embeddings, context {context} |
| tokenizer | byte-level BPE, {vocab} tokens |
| weights | bfloat16 safetensors, {megabytes:.1f} MB |
| training | {steps} steps of {tokens_per_step:,} tokens ({total:.1f} M tokens), final loss {loss} |
| data | {train_mb:.0f} MB of Python from {packages} permissively licensed packages; licences in `training/corpus.json` |
| held out | {heldout} |
| population | {population} other packages, for the shared encoder heads only: not seen by this model |

## Format

    <|repo|>NAME<|file|>MODULE<|code|>source ...            repository and file dropped at random in training
    <|code|>snippet<|file|>MODULE<|end|>                     which file is this from?
    <|files|>MODULE<|file|>MODULE<|file|> ...                optional list of a repository's files, before snippets

## Held-out bits per byte

Windows of {window} tokens of packages that no part of the product was trained on; near-duplicates of their files were
removed from the training data.

| package | without header | with repository and file |
| --- | --- | --- |
{rows}
| **mean** | **{mean_plain:.3f}** | **{mean_header:.3f}** |

## Samples (temperature 0.6, top-p 0.9, seed 0)

{samples}

## How it was made

The commands are in `training/README.md`; this card was written by `training/evaluate.py`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("build/lopa_nano/model"))
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument("--log", type=Path, default=Path("build/lopa_nano/log.jsonl"))
    parser.add_argument("--tokens-per-step", type=int, default=12_288)
    parser.add_argument("--card", type=Path, help="write the model card here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    figures = {}
    with torch.inference_mode():
        for user in HELD_OUT:
            try:
                figures[user] = [bits_per_byte(model, tokenizer, windows(user, header)) for header in (False, True)]
            except NoSuchUser as error:
                print(f"left out: {error}")
                continue
            print(f"{user:16s} {figures[user][0]:.3f} {figures[user][1]:.3f}", flush=True)
        samples = [sample(model, tokenizer, prompt) for prompt in PROMPTS]
    plain, header = (fmean(row[k] for row in figures.values()) for k in (0, 1))
    print(f"{'mean':16s} {plain:.3f} {header:.3f} bits per byte")
    if args.json:
        args.json.write_text(json.dumps({"bits_per_byte": figures, "mean": [plain, header]}, indent=1) + "\n")
    if args.card:
        last = json.loads(args.log.read_text().splitlines()[-1])
        with safe_open(args.log.with_name("checkpoint.safetensors"), "pt") as file:
            steps = int(file.metadata()["step"])
        corpus = json.loads((args.corpus / "corpus.json").read_text())
        roles = [package["role"] for package in corpus["packages"].values()]
        config = model.config
        args.card.write_text(
            CARD.format(
                parameters=model.num_parameters() / 1e6,
                layers=config.num_hidden_layers,
                width=config.hidden_size,
                heads=config.num_attention_heads,
                context=config.max_position_embeddings,
                vocab=config.vocab_size,
                megabytes=(args.model / "model.safetensors").stat().st_size / 1e6,
                steps=steps,
                tokens_per_step=args.tokens_per_step,
                total=steps * args.tokens_per_step / 1e6,
                loss=last["loss"],
                train_mb=corpus["bytes"]["train"] / 1e6,
                packages=roles.count("train"),
                population=roles.count("population"),
                heldout=", ".join(HELD_OUT),
                window=WINDOW,
                rows="\n".join(f"| {user} | {row[0]:.3f} | {row[1]:.3f} |" for user, row in figures.items()),
                mean_plain=plain,
                mean_header=header,
                samples="\n\n".join("    " + text.replace("\n", "\n    ") for text in samples),
            )
        )


if __name__ == "__main__":
    main()
