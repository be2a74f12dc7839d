"""The methods that are compared: what each one trains, and the soft prompt that it puts before an input.

The foundation model stays frozen except under "full"; LoRA's weights are PEFT's. LoPA's heads and prompt tuning are
`lopa_exporters.lopa` with the profiles "heads" and "prompt". IDPG (Wu et al. 2022), as the official LoPA repository has it, makes the
whole prompt of W2 tanh(W1 x + b1) + b2: the head that makes V (d, r), at r = m and by itself.

Legend: b examples, m soft-prompt rows, d hidden size, h encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lopa_exporters.data import Indices
from lopa_exporters.encoder import Encoder, EncoderConfig, pad_right
from lopa_exporters.eval.recipes import METHODS, WITH_ENCODER, Recipe
from lopa_exporters.lopa import LoPAConfig, Tensors, init_lopa, instance_factor, of_head, soft_prompt

_LORA_TARGETS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("qkv_proj",),
    ("query_key_value",),
    ("c_attn",),
    ("Wqkv",),
)
"""Names of queries, keys and values in one architecture after another."""


class Base(Protocol):
    """What is adapted: `lopa_exporters.frozen.FrozenModel` or `lopa_exporters.eval.masked.MaskedModel`."""

    @property
    def model(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def hidden(self) -> int: ...
    def vocabulary(self) -> Tensor: ...


@dataclass(frozen=True)
class Features:
    """What LoPA's heads see of each text: fixed (n, h) from a frozen encoder, or token ids for one that is trained."""

    fixed: Tensor | None
    ids: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class SoftPrompts:
    """Prompt tuning, LoPA or IDPG, on the device of the model. tensors: leaves, see `lopa_exporters.lopa`; IDPG has no Z."""

    config: LoPAConfig
    tensors: Tensors
    encoder: Encoder | None = None
    train_encoder: bool = False

    def features(self, texts: Sequence[str]) -> Features:
        """Read texts, once if the encoder is frozen."""
        if self.encoder is None:
            return Features(torch.zeros(len(texts), 1))
        if self.train_encoder:
            return Features(None, self.encoder.tokenize(texts))
        return Features(self.encoder.encode(texts))

    def __call__(self, features: Features, rows: Sequence[int] | Indices, *, train: bool) -> Tensor:
        """(b, m, d) for these examples; dropout in training only."""
        device = next(iter(self.tensors.values())).device
        if features.fixed is not None:
            x = features.fixed[torch.as_tensor(rows)].to(device)
        else:
            ids, mask = (torch.from_numpy(array).to(device) for array in pad_right([features.ids[row] for row in rows]))
            x = self.encoder(ids, mask)  # type: ignore[misc]
        dropout = self.config.dropout if train else 0.0
        if "Z" not in self.tensors:
            return instance_factor(self.config, self.tensors, "v", x, dropout).mT
        return soft_prompt(self.config, {}, self.tensors, x, dropout)


@dataclass(frozen=True)
class Method:
    """One method over one model. trainable: by name, in a fixed order; empty for "none"."""

    name: str
    model: Any
    """Torch module to run: the given one, or PEFT's around it."""
    trainable: Tensors
    soft: SoftPrompts | None = None
    _modules: tuple[nn.Module, ...] = field(default=(), repr=False)

    def count(self) -> int:
        """Numbers that are trained."""
        return sum(tensor.numel() for tensor in self.trainable.values())

    def train(self, on: bool) -> None:
        """Dropout of the model itself on or off; the official code has it on while training, frozen weights or not."""
        for module in self._modules:
            module.train(on)


def build_method(name: str, recipe: Recipe, base: Base, seed: int) -> Method:
    """A method at its start values.

    Raises:
        ValueError: an unknown name; LoRA without PEFT, or on an architecture whose attention is not known here.
        OSError: the encoder cannot be read.
    """
    if name == "none":
        return Method(name, base.model, {}, None, (base.model,))
    if name == "full":
        base.model.requires_grad_(True)
        return Method(name, base.model, dict(base.model.named_parameters()), None, (base.model,))
    if name == "lora":
        model = _with_lora(base.model, recipe, seed)
        return Method(name, model, {key: value for key, value in model.named_parameters() if value.requires_grad}, None, (model,))
    if name not in ("prompt-tuning", "idpg", "lopa"):
        raise ValueError(f"method is {name!r}; known are {', '.join(METHODS)}")
    soft = _soft_prompts(name, recipe, base, seed)
    trainable = dict(soft.tensors)
    if soft.encoder is not None and recipe.train_encoder:
        trainable |= {f"encoder.{key}": value for key, value in soft.encoder.backbone.named_parameters()}
        return Method(name, base.model, trainable, soft, (base.model, soft.encoder.backbone))
    return Method(name, base.model, trainable, soft, (base.model,))


def _soft_prompts(name: str, recipe: Recipe, base: Base, seed: int) -> SoftPrompts:
    encoder = None
    if name in WITH_ENCODER:
        encoder = Encoder.load(
            EncoderConfig(folder=recipe.encoder, pooling="auto", max_tokens=recipe.encoder_tokens, truncation_side=recipe.truncation_side)
        ).to(base.device)
        if recipe.train_encoder:
            encoder.backbone.requires_grad_(True)
    config = LoPAConfig(
        hidden=base.hidden,
        features=encoder.width if encoder else 1,
        rows=recipe.rows,
        rank=recipe.rows if name == "idpg" else recipe.rank,
        head_width=recipe.head_width,
        composition="product" if encoder else "none",
        profile="heads" if encoder else "prompt",
        dropout=recipe.dropout,
    )
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(recipe.rows, base.hidden, generator=generator) if recipe.prompt_start == "random" else base.vocabulary()
    start = init_lopa(config, table, generator).start
    own = {key: tensor for key, tensor in start.items() if name != "idpg" or of_head(key, "v")}
    leaves = {key: tensor.to(base.device).requires_grad_() for key, tensor in own.items()}
    return SoftPrompts(config, leaves, encoder, recipe.train_encoder)


def _with_lora(model: Any, recipe: Recipe, seed: int) -> Any:
    """PEFT's LoRA on queries, keys and values."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("method lora needs PEFT: pip install 'lopa[eval]'") from error
    present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = next((names for names in _LORA_TARGETS if set(names) <= present), None)
    if targets is None:
        raise ValueError(f"{type(model).__name__} has no attention that LoRA is known to go into")
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=list(targets),
        fan_in_fan_out=targets == ("c_attn",),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)
