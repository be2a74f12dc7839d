"""The frozen prompt encoder: text to one standardized feature vector.

A backbone (any Hugging Face text encoder; the embeddings or first layers of a causal language model), pooling, for wide
backbones a projection, optional L2 normalization (as the paper's embedding encoders have it), and a standardization with
constants from a population or from `probes`. The last one matters: the entries of a normalized vector of width h are about 1/sqrt(h) with a
large common part, and heads that start small then give every input nearly the same prompt.

Legend: b batch, t tokens, c backbone's width, h encoder width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn

from lopa_exporters.backbone import POOLINGS, Pooling, author_pooling, load_backbone, load_tokenizer, plain_tokenizer, positions_of
from lopa_exporters.projection import random_signs
from lopa_exporters.static import StaticEmbeddings

Ids = NDArray[np.int64]
MAX_ENCODER_TOKENS = 1 << 16
"""As a manifest may say."""
ONNX_BYTES = 2**31
"""A file of one protobuf message is smaller."""


@dataclass(frozen=True)
class EncoderConfig:
    """Where features come from."""

    folder: str
    """A Hugging Face folder or model id, or a folder of static token embeddings (`lopa_exporters.static`)."""
    layers: int | None = None
    """Keep the backbone's first layers only; 0 keeps none, so that the token embeddings are read; None keeps all."""
    pooling: str = "mean"
    """"mean" over real tokens, "cls" for the first, "last" for the last real token, "pooler" for the model's own trained pooler;
    "auto" is what its authors use, normalization included."""
    normalize: bool = True
    """L2-normalize the pooled vector before it is standardized."""
    features: int = 0
    """A wider vector is projected to so many numbers by random signs, which keeps distances (Achlioptas 2003): a user's corrections of
    the heads' first layers grow with them. 0: never."""
    max_tokens: int = 128
    truncation_side: str = "left"
    """Which end of a longer input is dropped."""
    name: str = ""
    """What the manifest says; empty is the folder's last part and the layers. Never a path."""

    def __post_init__(self) -> None:
        if self.pooling not in (*POOLINGS, "auto"):
            raise ValueError(f"pooling is {self.pooling!r}; known are {', '.join(POOLINGS)} and auto")
        if self.truncation_side not in ("left", "right"):
            raise ValueError(f"truncation_side is {self.truncation_side!r}; it must be left or right")
        if self.layers == 0 and self.pooling not in ("mean", "auto"):
            raise ValueError(f"pooling is {self.pooling!r}; token embeddings alone are averaged: mean or auto")
        if not 1 <= self.max_tokens <= MAX_ENCODER_TOKENS:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be from 1 to {MAX_ENCODER_TOKENS}")
        if (self.layers or 0) < 0:
            raise ValueError(f"layers is {self.layers}; it must not be negative")
        if self.features < 0 or self.features == 1:
            raise ValueError(f"features is {self.features}; it must be 0, for no projection, or at least 2")

    @property
    def label(self) -> str:
        kept = "" if self.layers is None else f"[:{self.layers}]" if self.layers else " token embeddings"
        return self.name or Path(self.folder).name + kept


class Encoder(nn.Module):
    """(b, t) token ids and mask -> (b, h) features, float32. Padding goes on the right and never changes a row's result."""

    mean: Tensor
    scale: Tensor
    projection: Tensor | None

    def __init__(self, config: EncoderConfig, backbone: nn.Module, width: int, tokenizer: Tokenizer) -> None:
        """width: c, the backbone's."""
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.register_buffer("projection", random_signs(width, config.features) if 0 < config.features < width else None)
        self.width = width if self.projection is None else config.features
        self.register_buffer("mean", torch.zeros(self.width))
        self.register_buffer("scale", torch.ones(self.width))
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, config: EncoderConfig) -> Encoder:
        """Read backbone and tokenizer.

        Raises:
            OSError, ValueError: not a Hugging Face folder with a fast tokenizer, too few layers or positions, no such pooling, or more
                weights than an ONNX file holds.
        """
        if config.pooling == "auto":
            chosen = Pooling("mean", normalize=True) if config.layers == 0 else author_pooling(config.folder)
            config = dataclasses.replace(config, pooling=chosen.kind, normalize=chosen.normalize)
        backbone: Any = load_backbone(config.folder, config.layers, config.pooling)
        tokenizer, rows = load_tokenizer(config.folder), backbone.get_input_embeddings().num_embeddings
        if rows < tokenizer.get_vocab_size():
            raise ValueError(f"{config.label} has {rows} token embeddings; its tokenizer has {tokenizer.get_vocab_size()} tokens")
        if isinstance(backbone, StaticEmbeddings) and 0 < config.features < backbone.config.hidden_size:
            backbone = backbone.projected(config.features)
        positions = positions_of(backbone)
        if positions is not None and config.max_tokens > positions:
            raise ValueError(f"max_tokens is {config.max_tokens}; the encoder {config.label} has {positions} positions")
        encoder = cls(config, backbone, int(backbone.config.hidden_size), tokenizer)
        if encoder.weight_bytes >= ONNX_BYTES:
            size = f"{encoder.weight_bytes / 2**30:.1f} GiB of weights; an ONNX file holds less than 2"
            raise ValueError(f"encoder {encoder.config.label} has {size}: keep fewer layers, or project token embeddings to fewer features")
        return encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        outputs = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        own = self.config.pooling == "pooler"
        pooled = outputs.pooler_output if own else pool(self.config.pooling, outputs.last_hidden_state, attention_mask)
        if self.projection is not None:
            pooled = pooled @ self.projection
        if self.config.normalize:
            pooled = nn.functional.normalize(pooled, dim=-1)
        return (pooled - self.mean) * self.scale

    @property
    def weight_bytes(self) -> int:
        """What its weights take in encode.onnx before they are quantized."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    @property
    def constants(self) -> dict[str, Tensor]:
        """What a trained run keeps of this encoder: mean and scale (h,), and the projection (c, h) if there is one."""
        return {name: tensor for name, tensor in self.named_buffers(recurse=False) if tensor is not None}

    def standardize(self, raw: Tensor) -> None:
        """Set mean and scale from features (n, h) of a population, taken while both still are neutral: zero mean, unit variance after."""
        spread = raw.std(dim=0, correction=0)
        self.mean.copy_(raw.mean(dim=0))
        # A feature that hardly varies over the population carries noise; it is not blown up to unit variance.
        self.scale.copy_(1 / spread.clamp_min(0.05 * spread.max().clamp_min(1e-6)))

    def restandardize(self, features: Tensor) -> Tensor:
        """`standardize` from features (n, h) that this encoder gave with its present constants; returns them under the new ones."""
        raw = features / self.scale.cpu() + self.mean.cpu()
        self.standardize(raw)
        return (raw - self.mean.cpu()) * self.scale.cpu()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as the device makes them: special tokens added, truncated to max_tokens on the configured side."""
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.enable_truncation(self.config.max_tokens, direction=self.config.truncation_side)
        # A text without any token is read as one token 0, since there would be nothing to pool over.
        return [encoding.ids or [0] for encoding in tokenizer.encode_batch(list(texts))]

    def encode(self, texts: Sequence[str], batch_size: int = 32, on_progress: Callable[[int], None] = lambda _: None) -> Tensor:
        """Features (n, h) of texts, in their order. Batches hold texts of about one length.

        on_progress: called with the number of texts that a batch finished.
        """
        ids = self.tokenize(texts)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        features = torch.empty(len(ids), self.width)
        device = self.mean.device
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            input_ids, mask = pad_right([ids[i] for i in chunk])
            with torch.inference_mode():
                rows = self(torch.from_numpy(input_ids).to(device), torch.from_numpy(mask).to(device))
            features[chunk] = rows.cpu().clone()
            on_progress(len(chunk))
        return features


def pool(pooling: str, states: Tensor, mask: Tensor) -> Tensor:
    """(b, t, h) states and (b, t) int64 mask, right-padded -> (b, h). A row without real tokens gives zeros under "mean"."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        ends = mask.sum(dim=1).clamp_min(1) - 1
        return states.gather(1, ends[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]
    weights = mask.to(states.dtype)
    return (states * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp_min(1.0)


def pad_right(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Ids, Ids]:
    """Ids and mask, (b, t) int64; t is the longest row, at least 1."""
    ids = np.full((len(rows), max(1, *map(len, rows))), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


class NoEncoder(nn.Module):
    """For compositions without an instance part: the instance tensor is a constant, so that the device needs no special case."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = EncoderConfig(folder="none", max_tokens=16, name="none")
        self.width = 1
        self.tokenizer = plain_tokenizer(tokenizer)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(b, t) ids and mask -> (b, 1) zeros."""
        return 0.0 * (input_ids[:, :1] + attention_mask[:, :1]).to(torch.float32)

    def encode(self, texts: Sequence[str], batch_size: int = 32, on_progress: Callable[[int], None] = lambda _: None) -> Tensor:
        """(n, 1) zeros, one row a text."""
        del batch_size
        on_progress(len(texts))
        return torch.zeros(len(texts), 1)
