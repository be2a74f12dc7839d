"""Static token embeddings as an encoder's backbone: one vector a token, wherever it stands.

The folder format is sentence-transformers' `StaticEmbedding`: `tokenizer.json` and `model.safetensors` with one tensor,
`embedding.weight` (v, h). On a device such an encoder costs microseconds.

Legend: b batch, t tokens, h width, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from lopa_exporters.projection import random_signs

TABLE = "embedding.weight"


@dataclass(frozen=True)
class States:
    """What a transformers encoder would return: (b, t, h) float32."""

    last_hidden_state: Tensor


class StaticEmbeddings(nn.Module):
    """(b, t) token ids -> (b, t, h)."""

    def __init__(self, table: Tensor) -> None:
        """table: (v, h), any float dtype."""
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table.float(), freeze=True)
        self.config = SimpleNamespace(hidden_size=table.shape[1], use_cache=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> States:
        """The mask is only for whoever pools."""
        del attention_mask
        return States(self.table(input_ids))

    def get_input_embeddings(self) -> nn.Embedding:
        """As models of transformers have it."""
        return self.table

    def projected(self, features: int) -> StaticEmbeddings:
        """The same with each token's vector projected to so many numbers: their mean is the projected mean, and costs a device nothing."""
        return StaticEmbeddings(self.table.weight.detach() @ random_signs(self.table.embedding_dim, features))


def find_static(folder: Path) -> Path | None:
    """The folder that holds the table: `folder` itself or its part `0_StaticEmbedding`; None if this is another kind of model."""
    for place in (folder, folder / "0_StaticEmbedding"):
        if (place / "model.safetensors").is_file() and (place / "tokenizer.json").is_file() and not (place / "config.json").is_file():
            return place
    return None


def load_static(place: Path) -> StaticEmbeddings:
    """The backbone of a folder that `find_static` found.

    Raises:
        ValueError: the file does not hold exactly one (v, h) table, or it has fewer rows than the tokenizer has tokens.
    """
    tensors = load_file(place / "model.safetensors")
    table = tensors.get(TABLE)
    if table is None or len(tensors) != 1 or table.dim() != 2 or not table.is_floating_point():
        raise ValueError(f"{place / 'model.safetensors'} must hold one float tensor {TABLE} of shape (vocabulary, width)")
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    if table.shape[0] < tokenizer.get_vocab_size():
        raise ValueError(f"{TABLE} has {table.shape[0]} rows; the tokenizer has {tokenizer.get_vocab_size()} tokens")
    return StaticEmbeddings(table)


def save_static(place: Path, table: Tensor, tokenizer: Tokenizer) -> None:
    """Write a folder that `load_static` reads. table: (v, h)."""
    place.mkdir(parents=True, exist_ok=True)
    save_file({TABLE: table.to(torch.float32).contiguous()}, place / "model.safetensors")
    tokenizer.save(str(place / "tokenizer.json"))
