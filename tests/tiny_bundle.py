"""A tiny bundle with random shared heads for a tiny foundation model: the real exporter, in a few seconds."""

from __future__ import annotations

from pathlib import Path

from lopa.bundle import TuningDefaults


def build_tiny_bundle(fm: Path, out: Path, *, seed: int = 0, profile: str = "factors", personal_dtype: str | None = None) -> Path:
    """Write a bundle for the model folder `fm` to `out`. The encoder is the model's own first layer; 64 tokens at most.

    The same arguments always give the same bundle id. Two soft prompts for two inputs differ clearly.
    """
    import torch
    from lopa_exporters.bundle import export_bundle, read_fm_spec
    from lopa_exporters.encoder import Encoder, EncoderConfig, NoEncoder
    from lopa_exporters.lopa import LoPAConfig, init_lopa
    from transformers import AutoModelForCausalLM

    spec = read_fm_spec(fm)
    generator = torch.Generator().manual_seed(seed)
    encoder: Encoder | NoEncoder = Encoder.load(EncoderConfig(folder=str(fm), layers=1, max_tokens=64))
    if profile == "prompt":
        encoder = NoEncoder(encoder.tokenizer)
    else:
        encoder.standardize(encoder.encode(["def add(a, b):", "import os", "class Point:", "for name in names:", "x = 1", "return None"]))
    config = LoPAConfig(
        hidden=spec.hidden_size,
        features=encoder.width,
        rows=4,
        rank=2,
        profile=profile,
        composition="none" if profile == "prompt" else "product",
        output_std=0.5,
        inner_std=0.2,
    )
    embeddings = AutoModelForCausalLM.from_pretrained(fm).get_input_embeddings().weight
    lopa = init_lopa(config, embeddings, generator)
    export_bundle(out, fm=spec, encoder=encoder, lopa=lopa, tuning=TuningDefaults(steps=20, batch_size=4), personal_dtype=personal_dtype)
    return out
