"""Tiny foundation models with random weights, built in a moment: real Hugging Face folders for tests of every part.

folder = build_tiny_fm(tmp_path / "fm")
AutoModelForCausalLM.from_pretrained(folder)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>")
CORPUS = (
    "def add(a, b):\n    return a + b\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n",
    "for name in names:\n    print(name)\n",
    "import os\nfrom pathlib import Path\n\nroot = Path(__file__).parent\n",
    "with open(path, encoding='utf-8') as file:\n    text = file.read()\n",
    "if value is None:\n    raise ValueError('value is missing')\n",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def _mixed(layers: int) -> list[str]:
    """Sliding windows and full attention in turn."""
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]


def _config(family: str, hidden: int, layers: int, vocab: int, context: int) -> Any:
    """A small configuration of one architecture. Heads are of width 8."""
    import transformers as hf

    heads = hidden // 8
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "vocab_size": vocab}
    common = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        **ids,
    }
    grouped = {**common, "num_key_value_heads": max(1, heads // 2)}
    builders = {
        "llama": lambda: hf.LlamaConfig(**grouped, tie_word_embeddings=True),
        "mistral": lambda: hf.MistralConfig(**grouped, sliding_window=24),
        "qwen2": lambda: hf.Qwen2Config(**grouped),
        "qwen3": lambda: hf.Qwen3Config(**grouped, head_dim=8),
        "gemma": lambda: hf.GemmaConfig(**grouped, head_dim=8),
        "gemma2": lambda: hf.Gemma2Config(**grouped, head_dim=8, sliding_window=16, layer_types=_mixed(layers)),
        "gemma3": lambda: hf.Gemma3TextConfig(**grouped, head_dim=8, sliding_window=16, layer_types=_mixed(layers)),
        "phi": lambda: hf.PhiConfig(**common),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**common),
        "gpt2": lambda: hf.GPT2Config(n_embd=hidden, n_layer=layers, n_head=heads, n_positions=context, **ids),
        "opt": lambda: hf.OPTConfig(
            hidden_size=hidden,
            ffn_dim=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=context,
            word_embed_proj_dim=hidden,
            **ids,
        ),
    }
    if family not in builders:
        raise ValueError(f"family is {family!r}; known are {', '.join(builders)}")
    return builders[family]()


def train_tokenizer(vocab: int) -> Any:
    """A byte-level BPE over a few lines of Python: every text round-trips. Id 0 ends a text, id 1 pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def build_tiny_fm(
    folder: Path | str,
    *,
    family: str = "llama",
    hidden: int = 32,
    layers: int = 2,
    vocab: int = 300,
    seed: int = 0,
    context: int = 512,
    chat: bool = False,
) -> Path:
    """Write a model, its configuration and its tokenizer to `folder`; the same arguments always give the same weights.

    family: llama, mistral (sliding windows of 24), qwen2, qwen3, gemma, gemma2 and gemma3 (every other layer with a sliding
    window of 16), phi, gpt_neox, gpt2 or opt.
    hidden: d, a multiple of 8. vocab: at least 258 (256 bytes and two special tokens).
    Weights are scaled so that different soft prompts give clearly different texts.
    """
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_config(family, hidden, layers, vocab, context))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(vocab), eos_token=SPECIAL_TOKENS[0], bos_token=SPECIAL_TOKENS[0], pad_token=SPECIAL_TOKENS[1]
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
