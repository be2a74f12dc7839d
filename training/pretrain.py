"""Train lopa-nano, the embedded foundation model, from scratch.

    python training/pretrain.py --corpus build/corpus --out build/lopa_nano --stable-steps 700 --decay-steps 230

Warm-up, constant rate, linear decay to zero (Hu et al. 2024, section 4). Muon for the matrices inside the layers
(Jordan et al. 2024), AdamW for embeddings and norms. Killed at any moment, the same command goes on from the last checkpoint; a smaller
`--stable-steps` than the run has already made starts the decay from there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from windows import END, SPECIAL_TOKENS, Corpus, WindowMix, train_tokenizer

CONTEXT = 1024
"""Positions: training windows are 512 tokens, 1,024 during the decay."""


def build_model(vocab_size: int, end_id: int) -> LlamaForCausalLM:
    """5.9 M parameters: 6 layers of width 256, tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )
    return LlamaForCausalLM(config)


def get_tokenizer(path: Path, corpus: Path, vocab_size: int, megabytes: int = 40) -> Tokenizer:
    """The trained tokenizer at `path`, or a new one trained on every k-th file of the corpus."""
    if not path.exists():
        texts = [json.loads(line)["text"] for line in (corpus / "train.jsonl").open()]
        stride = max(1, sum(map(len, texts)) // (megabytes * 1_000_000))
        path.parent.mkdir(parents=True, exist_ok=True)
        train_tokenizer(texts[::stride], vocab_size).save(str(path))
    return Tokenizer.from_file(str(path))


def rate(step: int, warmup: int, stable: int, decay: int) -> float:
    """The learning rate's factor at a step."""
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if step < stable else max(0.0, 1 - (step - stable) / decay)


def optimizers(model: nn.Module, matrix_rate: float, other_rate: float) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    muon = torch.optim.Muon(matrices, lr=matrix_rate, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token cross-entropy of (rows, length) ids, in nats."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def save_checkpoint(path: Path, model: nn.Module, optims: list[torch.optim.Optimizer], step: int, stable: int) -> None:
    """Weights and optimizer state in one safetensors file, replaced atomically. `stable` is the step where the decay starts."""
    tensors = {f"model.{k}": v.contiguous() for k, v in model.named_parameters()}
    for o, optim in enumerate(optims):
        for p, state in optim.state_dict()["state"].items():
            tensors |= {f"optim.{o}.{p}.{k}": torch.as_tensor(v).clone() for k, v in state.items()}
    save_file(tensors, path.with_suffix(".new"), metadata={"step": str(step), "stable": str(stable)})
    path.with_suffix(".new").replace(path)


def load_checkpoint(path: Path, model: nn.Module, optims: list[torch.optim.Optimizer]) -> tuple[int, int]:
    """Restore weights and optimizer state; returns the step reached and the step where its decay starts."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for o, optim in enumerate(optims):
        document = optim.state_dict()
        for key, value in tensors.items():
            kind, *rest = key.split(".")
            if kind == "optim" and int(rest[0]) == o:
                document["state"].setdefault(int(rest[1]), {})[rest[2]] = value
        optim.load_state_dict(document)
    return int(metadata["step"]), int(metadata.get("stable", 10**9))


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write what `AutoModelForCausalLM` and `AutoTokenizer` read: bf16 safetensors, config, tokenizer."""
    model.to(torch.bfloat16).save_pretrained(out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, additional_special_tokens=SPECIAL_TOKENS[1:], model_max_length=CONTEXT
    )
    fast.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument("--out", type=Path, default=Path("build/lopa_nano"))
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--tokens-per-step", type=int, default=12_288)
    parser.add_argument("--warmup-steps", type=int, default=60)
    parser.add_argument("--stable-steps", type=int, default=700)
    parser.add_argument("--decay-steps", type=int, default=230)
    parser.add_argument("--matrix-rate", type=float, default=4e-3)
    parser.add_argument("--other-rate", type=float, default=4e-3)
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = get_tokenizer(args.out / "bpe.json", args.corpus, args.vocab_size)
    train = Corpus(args.corpus / "train.jsonl", tokenizer)
    print(f"{train.lengths.sum():,} tokens in {len(train.files):,} files", flush=True)
    model = build_model(args.vocab_size, tokenizer.token_to_id(END)).to(device)
    optims = optimizers(model, args.matrix_rate, args.other_rate)
    checkpoint, step, stable = args.out / "checkpoint.safetensors", 0, args.stable_steps
    if checkpoint.exists():
        step, planned = load_checkpoint(checkpoint, model, optims)
        stable = planned if step > planned else max(args.stable_steps, step)
        print(f"resumed at step {step}", flush=True)
    forward = model if args.no_compile else torch.compile(model, dynamic=False)
    log = (args.out / "log.jsonl").open("a")
    mean, started = None, time.monotonic()
    while step < stable + args.decay_steps:
        length = 512 if step < stable else 1024
        ids = torch.from_numpy(train.batch(step, args.tokens_per_step // length, length, WindowMix(), args.seed)).to(device)
        loss = loss_of(forward, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = rate(step, args.warmup_steps, stable, args.decay_steps)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = group["peak"] * factor
            optim.step()
            optim.zero_grad(set_to_none=True)
        step += 1
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if step % 20 == 0:
            row = {"step": step, "loss": round(mean, 4), "rate": round(factor, 4), "seconds": round(time.monotonic() - started)}
            print(json.dumps(row), file=log, flush=True)
            print(row, flush=True)
        if step % args.checkpoint_every == 0:
            save_checkpoint(checkpoint, model, optims, step, stable)
    save_checkpoint(checkpoint, model, optims, step, stable)
    export(model, tokenizer, args.out / "model")


if __name__ == "__main__":
    main()
