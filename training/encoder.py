"""Make lopa-nano's prompt encoder: latent semantic analysis of code, as one static vector a token.

    python training/encoder.py --corpus build/corpus --fm build/lopa_nano/model --out build/lopa_nano_encoder

Snippets of the corpus as bags of tokens, weighted by inverse document frequency and normalized; the leading right singular
vectors of that matrix (Deerwester et al. 1990) give each token its vector. The mean over a snippet's tokens, normalized, is
what the LoPA heads read. There is nothing to train, it costs a device microseconds, and a linear probe finds the module of a
snippet better from it than from a two-layer transformer that was trained contrastively on the same corpus (`--probe` prints
the accuracy over the development packages, which neither was made from).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from lopa_exporters.data import Example, read_examples
from lopa_exporters.encoder import Encoder, EncoderConfig
from lopa_exporters.static import save_static
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

SNIPPET = 110
"""Tokens; as long as the snippets that users file."""
PROBE_TEST, PROBE_STEPS, PROBE_DECAY = 48, 300, 0.3


def snippets(path: Path, tokenizer: Tokenizer, every: int) -> Iterator[list[int]]:
    """Every `every`-th snippet of each file of a corpus."""
    with path.open() as file:
        while rows := [json.loads(line)["text"] for line in islice(file, 512)]:
            for encoding in tokenizer.encode_batch(rows):
                for start in range(0, max(1, len(encoding.ids) - SNIPPET), SNIPPET * every):
                    yield encoding.ids[start : start + SNIPPET]


def counts(rows: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """(n, v) float32: how often each token stands in each row."""
    table = torch.zeros(len(rows), vocab_size)
    for row, ids in zip(table, rows, strict=True):
        row.index_add_(0, torch.tensor(ids), torch.ones(len(ids)))
    return table


def analyse(source: Iterator[list[int]], vocab_size: int, width: int) -> Tensor:
    """(v, h) float32: each token's weight times its row of the leading right singular vectors."""
    frequency, documents = torch.zeros(vocab_size), 0
    parts = []
    while rows := list(islice(source, 4096)):
        table = counts(rows, vocab_size)
        parts.append(table.to_sparse_csr())
        frequency += (table > 0).sum(dim=0)
        documents += len(rows)
    weight = torch.log((1 + documents) / (1 + frequency)) + 1
    gram = torch.zeros(vocab_size, vocab_size, dtype=torch.float64)
    for part in parts:
        table = functional.normalize(part.to_dense() * weight, dim=-1)
        gram += (table.T @ table).double()
    print(f"{documents:,} snippets", flush=True)
    _, vectors = torch.linalg.eigh(gram)
    leading = vectors[:, -width:].flip(1)
    # A singular vector's sign is free: the largest entry is made positive, so that every machine gives the same table.
    leading = leading * leading.gather(0, leading.abs().argmax(dim=0, keepdim=True)).sign()
    return weight[:, None] * leading.float()


def probe(encoder: Encoder, examples: Sequence[Example]) -> float:
    """Mean over users: how often logistic regression on the features names the module of a user's last filing items."""
    right = []
    for user in dict.fromkeys(example.user for example in examples):
        own = [example for example in examples if example.user == user and example.task == "filing"]
        labels = sorted({example.target for example in own})
        wanted = torch.tensor([labels.index(example.target) for example in own])
        features = encoder.encode([example.prefix + example.prompt for example in own])
        features = (features - features[:-PROBE_TEST].mean(dim=0)) / features[:-PROBE_TEST].std()
        weight, bias = torch.zeros(features.shape[1], len(labels)).requires_grad_(), torch.zeros(len(labels)).requires_grad_()
        optimizer = torch.optim.AdamW([weight, bias], lr=0.02, weight_decay=PROBE_DECAY)
        for _ in range(PROBE_STEPS):
            loss = functional.cross_entropy(features[:-PROBE_TEST] @ weight + bias, wanted[:-PROBE_TEST])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        guess = (features[-PROBE_TEST:] @ weight + bias).argmax(dim=1)
        right.append((guess == wanted[-PROBE_TEST:]).float().mean().item())
    return fmean(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument("--fm", type=Path, default=Path("build/lopa_nano/model"), help="its tokenizer is the encoder's")
    parser.add_argument("--out", type=Path, default=Path("build/lopa_nano_encoder"))
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--every", type=int, default=8, help="take every so-many-th snippet")
    parser.add_argument("--probe", type=Path, metavar="JSONL", help="examples to probe with: build/people/development.jsonl")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.fm / "tokenizer.json"))
    source = snippets(args.corpus / "train.jsonl", tokenizer, args.every)
    save_static(args.out, analyse(source, tokenizer.get_vocab_size(), args.width), tokenizer)
    if args.probe:
        print(f"probe: {probe(Encoder.load(EncoderConfig(folder=str(args.out))), read_examples(args.probe)):.3f}")


if __name__ == "__main__":
    main()
