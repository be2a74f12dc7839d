"""Train lopa-nano's prompt encoder: a 2 M parameter BERT that knows which file a snippet is from.

    python training/encoder.py --corpus build/corpus --fm build/lopa_nano/model --out build/lopa_nano_encoder

InfoNCE (van den Oord et al. 2018): two snippets of one file attract each other, the other files of the batch repel.
Few repositories with many files each: telling apart the modules of one repository is what a user's filing task asks for.
The result is a plain `AutoModel` folder; pooled (mean) and frozen it is what the LoPA heads read.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pretrain import CONTEXT
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from windows import CODE, END, SPECIAL_TOKENS, Corpus

MAX_TOKENS = 128
TEMPERATURE = 0.05


def build_encoder(vocab_size: int, end_id: int) -> BertModel:
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=MAX_TOKENS,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=end_id,
    )
    return BertModel(config, add_pooling_layer=False)


def pool(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens, L2-normalized: (rows, tokens) int64 -> (rows, h) float32."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[..., None].float()
    return nn.functional.normalize((states.float() * weights).sum(1) / weights.sum(1), dim=-1)


def draw_pairs(
    corpus: Corpus, rng: np.random.Generator, repos: int, files: int, length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Snippets 2i and 2i+1 are of one file: ids and mask, (2 * repos * files, length) int64, and each row's file."""
    sizes = np.array([min(len(shelf), 40) for shelf in corpus.shelves], dtype=np.float64)
    rows: list[list[int]] = []
    owners: list[int] = []
    for shelf in rng.choice(len(sizes), repos, replace=False, p=sizes / sizes.sum()):
        indices = rng.permutation(corpus.shelves[shelf])
        for index in np.resize(indices, files):
            rows += [[corpus.special[CODE], *corpus.snippet(int(index), int(rng.integers(24, length)), rng)] for _ in range(2)]
            owners += [int(index)] * 2
    ids = np.full((len(rows), length), corpus.special[END], dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row[:length], 1
    return ids, mask, np.array(owners)


def contrast(features: Tensor, labels: Tensor) -> Tensor:
    """InfoNCE over (2n, h) features; rows with equal labels other than the partner are left out, not repelled."""
    scores = features @ features.T / TEMPERATURE
    partner = torch.arange(len(features), device=features.device) ^ 1
    same = labels[:, None] == labels[None, :]
    keep = ~same
    keep[torch.arange(len(features)), partner] = True
    return nn.functional.cross_entropy(scores.masked_fill(~keep, float("-inf")), partner)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument("--fm", type=Path, default=Path("build/lopa_nano/model"), help="its tokenizer; its token embeddings are the start")
    parser.add_argument("--out", type=Path, default=Path("build/lopa_nano_encoder"))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--repos", type=int, default=4, help="per step")
    parser.add_argument("--files", type=int, default=24, help="per repository and step")
    parser.add_argument("--length", type=int, default=MAX_TOKENS, help="tokens of a snippet at most")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.from_file(str(args.fm / "tokenizer.json"))
    corpus = Corpus(args.corpus / "train.jsonl", tokenizer)
    model = build_encoder(tokenizer.get_vocab_size(), tokenizer.token_to_id(END)).to(device)
    start = load_file(args.fm / "model.safetensors")["model.embed_tokens.weight"].float()
    model.embeddings.word_embeddings.weight.data.copy_(start * (0.02 / start.std()))
    forward = torch.compile(model, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01)
    args.out.mkdir(parents=True, exist_ok=True)
    mean, started = None, time.monotonic()
    with (args.out / "log.jsonl").open("w") as log:
        for step in range(args.steps):
            rng = np.random.default_rng((args.seed, step))
            ids, mask, labels = (torch.from_numpy(a).to(device) for a in draw_pairs(corpus, rng, args.repos, args.files, args.length))
            loss = contrast(pool(forward, ids, mask), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = args.rate * min((step + 1) / 50, 1.0) * (1 - step / args.steps)
            optimizer.step()
            mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
            if (step + 1) % 20 == 0:
                row = {"step": step + 1, "loss": round(mean, 4), "seconds": round(time.monotonic() - started)}
                print(json.dumps(row), file=log, flush=True)
                print(row, flush=True)
            if (step + 1) % 200 == 0 or step + 1 == args.steps:
                model.save_pretrained(args.out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=SPECIAL_TOKENS[1:],
        model_max_length=min(MAX_TOKENS, CONTEXT),
    )
    fast.save_pretrained(args.out)


if __name__ == "__main__":
    main()
