"""The model of the serving benchmarks: a Llama of 88 million parameters with random weights from a seed, and LoRA adapters for it.

12 layers of width 768, 12 heads, feed-forward 2,048, lopa-nano's tokenizer (4,096 tokens), tied embeddings, context 2,048; bfloat16.
Adapters are r=8 on the query, key, value and output projections, in PEFT's format, with random weights too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK = 8


def make_model(folder: Path, adapters: int = 32) -> Path:
    """Write model, tokenizer and adapters, unless they are there."""
    if (folder / "complete").exists():
        return folder
    import torch
    from lopa_server.models import nano_folder
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(nano_folder() / name, folder / name)
    for index in range(adapters):
        _make_adapter(folder / "adapters" / str(index), config.num_hidden_layers, config.hidden_size, index)
    (folder / "complete").touch()
    return folder


def _make_adapter(folder: Path, layers: int, hidden: int, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1000 + seed)
    tensors = {}
    for layer in range(layers):
        for name in ADAPTED:
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator).mul_(0.02).bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(hidden, RANK, generator=generator).mul_(0.02).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": list(ADAPTED), "inference_mode": True}))
