"""Hugging Face text encoders as frozen backbones: weights, tokenizer, positions, and the pooling that their authors use.

A sentence-transformers folder says how it pools (modules.json and its Pooling module's config.json). Other bidirectional encoders
are read at their first token, as the paper reads RoBERTa and CodeBERT; a causal model's layers and static token embeddings are averaged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from lopa_exporters.static import StaticEmbeddings, find_static, load_static

POOLINGS = ("mean", "cls", "last", "pooler")
_SENTENCE_TRANSFORMERS = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls", "lasttoken": "last", "last": "last"}
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Model types whose first position is the padding id + 1."""


@dataclass(frozen=True)
class Pooling:
    """How token states become one vector. kind: one of POOLINGS. normalize: to length 1."""

    kind: str
    normalize: bool


def author_pooling(folder: str) -> Pooling:
    """How the authors of a model folder or id pool.

    Raises:
        ValueError: a sentence-transformers pipeline with a module or pooling that is not known here.
    """
    from transformers import AutoConfig

    from lopa_exporters.hub import resolve_folder

    if find_static(Path(folder)) is not None:
        return Pooling("mean", normalize=True)
    place = resolve_folder(folder)
    if (place / "modules.json").is_file():
        return _sentence_pooling(place)
    config = AutoConfig.from_pretrained(place)
    causal = any("CausalLM" in name or "LMHead" in name for name in getattr(config, "architectures", None) or ())
    return Pooling("mean", normalize=True) if causal else Pooling("cls", normalize=False)


def _sentence_pooling(folder: Path) -> Pooling:
    """From modules.json: a transformer, a pooling, and at most a normalization."""
    modules = [(str(module["type"]).rsplit(".", 1)[-1], str(module["path"])) for module in _read(folder / "modules.json")]
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(f"{folder.name} is a pipeline of {', '.join(kinds)}; known is Transformer, Pooling and, possibly, Normalize")
    config = _read(folder / modules[1][1] / "config.json")
    chosen = config.get("pooling_mode")
    modes = [chosen] if isinstance(chosen, str) else [key.removeprefix("pooling_mode_") for key, on in config.items() if on is True]
    modes = [mode for mode in modes if mode != "include_prompt"]
    if len(modes) != 1 or modes[0] not in _SENTENCE_TRANSFORMERS:
        raise ValueError(
            f"{folder.name} pools by {', '.join(modes) or 'nothing'}; known are {', '.join(POOLINGS)}: choose one with pooling"
        )
    return Pooling(_SENTENCE_TRANSFORMERS[modes[0]], normalize=len(kinds) == 3)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def load_backbone(folder: str, layers: int | None, pooling: str) -> nn.Module:
    """A frozen float32 model, its first `layers` blocks (None: all; 0: its token embeddings).

    Raises:
        OSError, ValueError: not a Hugging Face model, fewer layers, or weights that the pooling needs are missing.
    """
    from transformers import AutoModel

    static = find_static(Path(folder))
    if static is not None:
        if layers:
            raise ValueError(f"layers is {layers}; {Path(folder).name} holds static token embeddings, which have none")
        return load_static(static)
    dtype: Any = "auto" if layers == 0 else torch.float32
    backbone, info = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    missing = [name for name in info["missing_keys"] if pooling == "pooler" or "pooler" not in name]
    if missing:
        raise ValueError(f"{folder} has no weights for {', '.join(sorted(missing)[:5])}: they would be random")
    if layers == 0:
        return StaticEmbeddings(backbone.get_input_embeddings().weight.detach())
    if pooling == "pooler" and getattr(backbone, "pooler", None) is None:
        raise ValueError(f"pooling is pooler; {type(backbone).__name__} has none")
    if layers is not None:
        keep_first_layers(backbone, layers)
    backbone.config.use_cache = False
    return backbone


def positions_of(backbone: nn.Module) -> int | None:
    """Tokens that the backbone can number; None without a bound."""
    config: Any = backbone.config
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if positions and config.model_type in _OFFSET_POSITIONS:
        positions -= (config.pad_token_id or 0) + 1
    return positions


def load_tokenizer(folder: str) -> Tokenizer:
    """A fast tokenizer without padding and truncation.

    Raises:
        ValueError: the model has no tokenizer.json.
    """
    from transformers import AutoTokenizer

    static = find_static(Path(folder))
    if static is not None:
        return plain_tokenizer(Tokenizer.from_file(str(static / "tokenizer.json")))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        raise ValueError(f"{folder} has no tokenizer.json: the device needs a fast tokenizer")
    return plain_tokenizer(tokenizer.backend_tokenizer)


def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """A copy without padding and truncation: the manifest says how inputs are cut, and nothing else does."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


def keep_first_layers(backbone: nn.Module, count: int) -> None:
    """Drop all transformer blocks after the first `count`; embeddings and the final norm stay.

    Raises:
        ValueError: the backbone has fewer blocks, or none that can be found.
    """
    config: Any = backbone.config
    total = config.num_hidden_layers
    if count > total:
        raise ValueError(f"layers is {count}; the backbone has {total}")
    for module in backbone.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == total:
                setattr(module, name, child[:count])
                config.num_hidden_layers = count
                return
    raise ValueError(f"no list of {total} layers was found in {type(backbone).__name__}")
