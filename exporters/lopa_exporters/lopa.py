"""LoPA in torch, written once: training, the exported graphs and their checks all come from here.

Low-Rank Prompt Adaptation (Jain, Chaudhuri, Reps, Jermaine, NeurIPS 2024), section 4:

    Z = Z_S * sigmoid(U V^T)        U = W2u tanh(W1u x + b1u) + b2u  as (m, r),   V likewise as (d, r)

Everything is a pure function over named tensors, so that torch.func can differentiate it and ONNX can hold it.

Legend: b batch, m rows, d hidden size of the foundation model, r rank of U V^T, k rank of the personal prompt,
s rank of a correction, h encoder width, w width of the heads' inner layer. All tensors are float32.

| name | shape | | name | shape |
| --- | --- | --- | --- | --- |
| `Z` | (m, d) | | `Z.A`, `Z.B` | (m, k), (d, k): Z_S = Z + g A B^T |
| `W1u`, `W1v` | (w, h) | | `NAME.P`, `NAME.Q` of a matrix (out, in) | (out, s), (in, s): W + c P Q^T |
| `b1u`, `b1v` | (w,) | | `NAME.delta` of a bias | as the bias: b + c delta |
| `W2u`, `b2u` | (m r, w), (m r,) | | | |
| `W2v`, `b2v` | (d r, w), (d r,) | | | |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

Tensors = dict[str, Tensor]
PROFILES = ("factors", "heads", "prompt")
COMPOSITIONS = ("product", "add", "concat", "max", "none")
Z_STARTS = ("direct", "product")
MATRICES = ("W1u", "W2u", "W1v", "W2v")
BIASES = ("b1u", "b2u", "b1v", "b2v")


@dataclass(frozen=True)
class LoPAConfig:
    """Shapes, composition, and what is personal. Checked on creation.

    Raises:
        ValueError: a value out of range, or values that don't go together.
    """

    hidden: int
    """d, the foundation model's hidden size."""
    features: int
    """h, the encoder's width."""
    rows: int = 10
    """m, rows of Z_S. The soft prompt has as many, twice as many under "concat"."""
    rank: int = 4
    """r, rank of U V^T."""
    head_width: int = 0
    """w, width of the heads' inner layer; 0 is the encoder's width, as in the paper."""
    composition: str = "product"
    """"product" is the method; "add", "concat" and "max" of Z_S and U V^T are the paper's ablations; "none" is Z_S alone."""
    profile: str = "factors"
    """"factors": low-rank corrections are personal; "heads": Z_S and the heads are (the paper); "prompt": Z_S is (prompt tuning)."""
    z_rank: int = 1
    """k (factors only)."""
    corrections: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(MATRICES, 1))
    """s of each corrected head matrix (factors only); matrices not named stay shared."""
    bias_corrections: tuple[str, ...] = ()
    """Head biases with a personal correction (factors only)."""
    z_gain: float = 1.0
    """g: one step of Adam moves every tensor alike, so the size of an embedding's entries belongs here (factors only)."""
    correction_gain: float = 1.0
    """c, likewise for the heads' corrections (factors only)."""
    spread: float = 1.0
    """Standard deviation of what a column of Q gives at the start, x having unit variance (factors only). Adam moves Q by the learning rate
    whatever its size: the larger it is, with a smaller c, the longer it keeps its directions."""
    z_start: str = "direct"
    """Which side of a new user's A B^T is zero (factors only). "direct": B, and A has orthogonal columns, so that the first step moves
    Z as freely as k allows; "product": A, and B is N(0, 1)."""
    inner_std: float = 0.02
    """Start of W1u and W1v: N(0, inner_std)."""
    output_std: float = 0.02
    """Start of W2u and W2v: N(0, output_std), zero bias. The paper has 0.02; 0.2 moves the gate sooner."""
    dropout: float = 0.1
    """Before each head, in training from a population only."""

    def __post_init__(self) -> None:
        for name in ("hidden", "features", "rows", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.profile not in PROFILES:
            raise ValueError(f"profile is {self.profile!r}; known are {', '.join(PROFILES)}")
        if self.composition not in COMPOSITIONS:
            raise ValueError(f"composition is {self.composition!r}; known are {', '.join(COMPOSITIONS)}")
        if self.profile == "prompt" and self.composition != "none":
            raise ValueError(f"profile prompt has no instance part: its composition is none, not {self.composition}")
        if not self.spread > 0:
            raise ValueError(f"spread is {self.spread}; it must be above 0")
        if self.z_rank < 1 or any(name not in MATRICES or rank < 1 for name, rank in self.corrections.items()):
            raise ValueError(f"z_rank and every rank of corrections must be at least 1, for matrices of {', '.join(MATRICES)}")
        if self.z_start not in Z_STARTS:
            raise ValueError(f"z_start is {self.z_start!r}; known are {', '.join(Z_STARTS)}")
        if any(name not in BIASES for name in self.bias_corrections):
            raise ValueError(f"bias_corrections is {self.bias_corrections}; known are {', '.join(BIASES)}")
        if not 0 <= self.dropout < 1 or self.head_width < 0:
            raise ValueError("dropout must be in [0, 1) and head_width not negative")

    @property
    def has_instance_part(self) -> bool:
        return self.composition != "none"

    @property
    def soft_prompt_rows(self) -> int:
        """Rows of the soft prompt that reaches the model."""
        return 2 * self.rows if self.composition == "concat" else self.rows

    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of both heads; none without an instance part."""
        if not self.has_instance_part:
            return {}
        width = self.head_width or self.features
        shapes: dict[str, tuple[int, ...]] = {}
        for side, size in (("u", self.rows * self.rank), ("v", self.hidden * self.rank)):
            shapes |= {f"W1{side}": (width, self.features), f"b1{side}": (width,), f"W2{side}": (size, width), f"b2{side}": (size,)}
        return shapes

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Z_S and the heads: what `heads` and `prompt` own, and what `factors` shares."""
        return {"Z": (self.rows, self.hidden), **self.head_shapes()}

    def personal_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what one user owns, in the bundle's order."""
        if self.profile != "factors":
            return self.full_shapes()
        heads = self.head_shapes()
        shapes: dict[str, tuple[int, ...]] = {"Z.A": (self.rows, self.z_rank), "Z.B": (self.hidden, self.z_rank)}
        for name in (name for name in MATRICES if name in self.corrections and name in heads):
            out, inner = heads[name]
            shapes |= {f"{name}.P": (out, self.corrections[name]), f"{name}.Q": (inner, self.corrections[name])}
        return shapes | {f"{name}.delta": heads[name] for name in self.bias_corrections if name in heads}

    def personal_count(self) -> int:
        """Numbers that one user owns."""
        return sum(math.prod(shape) for shape in self.personal_shapes().values())


@dataclass(frozen=True)
class LoPA:
    """One trained or random instance of the method.

    shared: frozen in the bundle; empty unless the profile is "factors".
    start: the personal tensors that every new user begins with.
    """

    config: LoPAConfig
    shared: Tensors
    start: Tensors

    def __call__(self, x: Tensor, personal: Mapping[str, Tensor] | None = None) -> Tensor:
        """(b, h) features -> (b, m, d) soft prompts."""
        return soft_prompt(self.config, self.shared, self.start if personal is None else personal, x)


def soft_prompt(
    config: LoPAConfig,
    shared: Mapping[str, Tensor],
    personal: Mapping[str, Tensor],
    x: Tensor,
    dropout: float = 0.0,
    v: Tensor | None = None,
) -> Tensor:
    """Z for every row of x: (b, h) -> (b, m, d), (b, 2m, d) under "concat".

    dropout: probability, before each head with a mask of its own; the exported graphs have none.
    v: V (b, d, r) where it is known already, the largest piece of work by far; Z then depends on no tensor of its head.
    """
    tensors = {**shared, **personal}
    z = tensors["Z"]
    if "Z.A" in tensors:
        z = z + config.z_gain * (tensors["Z.A"] @ tensors["Z.B"].mT)
    z = z.expand(x.shape[0], *z.shape)
    if not config.has_instance_part:
        return z
    u = instance_factor(config, tensors, "u", x, dropout)
    v = instance_factor(config, tensors, "v", x, dropout) if v is None else v
    return compose(config.composition, z, u @ v.mT)


def instance_factors(config: LoPAConfig, tensors: Mapping[str, Tensor], x: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """U (b, m, r) and V (b, d, r) for x (b, h); tensors: shared and personal ones together."""
    return instance_factor(config, tensors, "u", x, dropout), instance_factor(config, tensors, "v", x, dropout)


def instance_factor(config: LoPAConfig, tensors: Mapping[str, Tensor], side: str, x: Tensor, dropout: float = 0.0) -> Tensor:
    """U (b, m, r) or V (b, d, r)."""
    values = _head(config, tensors, side, functional.dropout(x, dropout, training=dropout > 0))
    return values.reshape(-1, config.rows if side == "u" else config.hidden, config.rank)


def reads(config: LoPAConfig, shared: Mapping[str, Tensor], x: Tensor) -> Tensors:
    """What the Q of each correction is multiplied with while no correction acts yet: x (b, h) -> `NAME.Q` -> (b, in)."""
    if config.profile != "factors" or not config.has_instance_part:
        return {}
    inner = {side: torch.tanh(x @ shared[f"W1{side}"].mT + shared[f"b1{side}"]) for side in "uv"}
    return {f"{name}.Q": x if name.startswith("W1") else inner[name[-1]] for name in MATRICES if name in config.corrections}


def aligned(lopa: LoPA) -> list[str]:
    """Names of the personal tensors that a user's own examples may set before the first step: each Q whose P is zero.

    None where the start values came from the population (`PopulationConfig.start_rate`): there Q has learnt what to read.
    """
    return [name for name in lopa.start if name.endswith(".Q") and not lopa.start[name.replace(".Q", ".P")].any()]


def of_head(name: str, side: str) -> bool:
    """Whether a tensor belongs to the head that makes U or V."""
    return name.partition(".")[0] in {f"{kind}{side}" for kind in ("W1", "b1", "W2", "b2")}


def compose(composition: str, z: Tensor, instance: Tensor) -> Tensor:
    """Z_S (b, m, d) and Z_I = U V^T (b, m, d) -> Z (paper, section 4 and the ablation of the encoding function)."""
    match composition:
        case "product":
            return z * torch.sigmoid(instance)
        case "add":
            return z + instance
        case "max":
            return torch.maximum(z, instance)
        case "concat":
            return torch.cat((z, instance), dim=1)
    raise ValueError(f"composition {composition!r} has no instance part")


def _head(config: LoPAConfig, tensors: Mapping[str, Tensor], side: str, x: Tensor) -> Tensor:
    """W2 tanh(W1 x + b1) + b2 with this user's corrections: (b, h) -> (b, size)."""
    inner = torch.tanh(_linear(config, tensors, f"W1{side}", f"b1{side}", x))
    return _linear(config, tensors, f"W2{side}", f"b2{side}", inner)


def _linear(config: LoPAConfig, tensors: Mapping[str, Tensor], weight: str, bias: str, x: Tensor) -> Tensor:
    """(W + c P Q^T) x + b + c delta; the correction is never multiplied out, which would cost out * in numbers a user."""
    y = x @ tensors[weight].mT + tensors[bias]
    if f"{weight}.P" in tensors:
        y = y + config.correction_gain * ((x @ tensors[f"{weight}.Q"]) @ tensors[f"{weight}.P"].mT)
    if f"{bias}.delta" in tensors:
        y = y + config.correction_gain * tensors[f"{bias}.delta"]
    return y


def init_lopa(config: LoPAConfig, embeddings: Tensor, generator: torch.Generator) -> LoPA:
    """Start values. Rows of Z are rows of the vocabulary's embeddings, drawn at random (Lester et al. 2021).

    embeddings: (vocabulary, d), any float dtype.
    """
    picked = torch.randperm(embeddings.shape[0], generator=generator)[: config.rows]
    if len(picked) < config.rows:
        raise ValueError(f"rows is {config.rows}; the vocabulary has only {embeddings.shape[0]} embeddings to start from")
    full = {"Z": embeddings[picked].detach().float().cpu().clone()}
    for name, shape in config.head_shapes().items():
        std = {"W1": config.inner_std, "W2": config.output_std}.get(name[:2], 0.0)
        full[name] = std * torch.randn(shape, generator=generator)
    if config.profile != "factors":
        return LoPA(config, {}, full)
    return LoPA(config, full, init_corrections(config, generator))


def init_corrections(config: LoPAConfig, generator: torch.Generator) -> Tensors:
    """A new user's factors: the method's own prompt to begin with, and a gradient for every product.

    Of each product one side is zero, so nothing is changed yet: `P`, with `Q` N(0, spread^2 / in), and what `LoPAConfig.z_start` says
    of `Z`.
    """
    start = {}
    for name, shape in config.personal_shapes().items():
        kind = name.split(".")[1]
        if config.z_start == "direct" and kind in ("A", "B"):
            start[name] = _orthogonal(shape, generator) if kind == "A" else torch.zeros(shape)
            continue
        std = {"B": 1.0, "Q": config.spread * shape[0] ** -0.5}.get(kind, 0.0)
        start[name] = std * torch.randn(shape, generator=generator)
    return start


def _orthogonal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(m, k) with orthogonal columns and rows of unit norm in the mean; if k is m or more, the identity, then zeros."""
    rows, columns = shape
    if columns >= rows:
        return torch.eye(rows, columns)
    return (rows / columns) ** 0.5 * torch.linalg.qr(torch.randn(shape, generator=generator))[0]


def config_to_dict(config: LoPAConfig) -> dict[str, object]:
    """For JSON; `LoPAConfig(**dictionary)` reads it back, with lists for tuples."""
    return {**dataclasses.asdict(config), "corrections": dict(config.corrections), "bias_corrections": list(config.bias_corrections)}


def config_from_dict(values: Mapping[str, object]) -> LoPAConfig:
    """The inverse of `config_to_dict`.

    Raises:
        ValueError, TypeError: not such a dictionary.
    """
    return LoPAConfig(**{**values, "bias_corrections": tuple(values["bias_corrections"])})  # type: ignore[arg-type]
