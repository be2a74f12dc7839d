"""A tiny bundle with random shared heads for a tiny foundation model: the real exporter, in a few seconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lopa_exporters.encoder import Encoder, NoEncoder
    from lopa_exporters.lopa import LoPA

TEXTS = ("def add(a, b):", "import os", "class Point:", "for name in names:", "x = 1", "return None")


def build_tiny_parts(fm: Path, *, seed: int = 0, profile: str = "factors") -> tuple[Encoder | NoEncoder, LoPA]:
    """Encoder (the model's own first layer, 64 tokens at most) and LoPA (m 4, r 2) for the model folder `fm`, in torch."""
    import torch
    from lopa_exporters.encoder import Encoder, EncoderConfig, NoEncoder
    from lopa_exporters.lopa import LoPAConfig, init_lopa
    from transformers import AutoModelForCausalLM

    encoder: Encoder | NoEncoder = Encoder.load(EncoderConfig(folder=str(fm), layers=1, max_tokens=64, name="tiny"))
    embeddings = AutoModelForCausalLM.from_pretrained(fm).get_input_embeddings().weight
    if profile == "prompt":
        encoder = NoEncoder(encoder.tokenizer)
    else:
        encoder.standardize(encoder.encode(TEXTS))
    config = LoPAConfig(
        hidden=embeddings.shape[1],
        features=encoder.width,
        rows=4,
        rank=2,
        profile=profile,
        composition="none" if profile == "prompt" else "product",
        output_std=0.5,
        inner_std=0.2,
    )
    return encoder, init_lopa(config, embeddings, torch.Generator().manual_seed(seed))


def build_tiny_bundle(fm: Path, out: Path, *, seed: int = 0, profile: str = "factors", personal_dtype: str | None = None) -> Path:
    """Write a bundle for the model folder `fm` to `out`.

    The same arguments always give the same bundle id. Soft prompts for two different inputs differ clearly.
    """
    from lopa.manifest import TuningDefaults
    from lopa_exporters.bundle import export_bundle, read_fm_spec

    encoder, lopa = build_tiny_parts(fm, seed=seed, profile=profile)
    tuning = TuningDefaults(steps=20, batch_size=4)
    export_bundle(out, fm=read_fm_spec(fm), encoder=encoder, lopa=lopa, tuning=tuning, personal_dtype=personal_dtype)
    return out
