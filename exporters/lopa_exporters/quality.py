"""What a smaller encoder costs: size, latency, features, U and V, and the frozen model's loss. An export that costs too much fails.

Legend: n texts, h encoder width, m soft-prompt rows, d hidden size, r rank.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lopa_exporters.data import Dataset, Example, build_dataset
from lopa_exporters.encoder import Encoder, EncoderConfig, pad_right
from lopa_exporters.frozen import FrozenModel
from lopa_exporters.graphs import INSTANCE, export_encode
from lopa_exporters.lopa import LoPA, LoPAConfig, init_lopa, instance_factors
from lopa_exporters.probes import PROBES
from lopa_exporters.quantize import Inputs, quantize, session_of
from lopa_exporters.structure import ExportError

LENGTHS = (32, 128, 256)
"""Tokens at which latency is measured."""
ROUNDS = 30


@dataclass(frozen=True)
class Gate:
    """What an export may cost at most."""

    loss: float = 0.005
    """Relative rise of the model's mean NLL per target token."""
    cosine: float = 0.0
    """Least mean cosine of features to float32's; 0 leaves that to the loss."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one text of so many tokens on one core: median."""

    tokens: int
    milliseconds: float
    float32_milliseconds: float


@dataclass(frozen=True)
class Quality:
    """One smaller encoder beside its float32 original. Cosines are means over texts; `x` is the instance tensor of the bundle."""

    scheme: str
    size: int
    """Bytes."""
    float32_size: int
    latency: tuple[Latency, ...]
    cosine_x: float
    cosine_x_lowest: float
    cosine_u: float
    cosine_v: float
    loss: float
    """NLL in nats per target token of the frozen model behind soft prompts from the smaller encoder."""
    float32_loss: float
    examples: int
    left_out: tuple[str, ...]
    """Nodes that stayed in float32."""

    @property
    def loss_change(self) -> float:
        """Relative to float32; positive is worse."""
        return self.loss / self.float32_loss - 1

    def to_json(self) -> str:
        """For a report beside the bundle."""
        return json.dumps({**dataclasses.asdict(self), "loss_change": self.loss_change}, indent=1) + "\n"

    def check(self, gate: Gate) -> None:
        """Raises ExportError for an encoder that costs more than the gate allows."""
        if not self.loss_change <= gate.loss:
            raise ExportError(
                f"{self.scheme}: the model's loss rises by {self.loss_change:.2%} (from {self.float32_loss:.4f} to {self.loss:.4f} on "
                f"{self.examples} examples); the gate is {gate.loss:.2%}"
            )
        if not self.cosine_x >= gate.cosine:
            raise ExportError(f"{self.scheme}: features have a mean cosine of {self.cosine_x:.4f} to float32; the gate is {gate.cosine}")


@dataclass
class Shrinker:
    """Makes encode.onnx smaller in its place, measures the result, and refuses what costs too much.

    examples: (prompt, target)s whose loss is compared; `dataset` holds the same examples in the same order as the model reads them.
    """

    scheme: str
    encoder: Encoder
    lopa: LoPA
    fm: FrozenModel
    examples: Sequence[Example]
    dataset: Dataset
    gate: Gate = field(default_factory=Gate)
    quality: Quality | None = None
    """The report, once called."""

    def __call__(self, path: Path) -> Quality:
        """Replace the float32 graph at `path`; the report is kept in `quality`, too.

        Raises:
            ExportError: the gate is missed.
        """
        prompts = [example.prefix + example.prompt for example in self.examples]
        expected = self.encoder.encode(prompts)
        smaller = path.with_name("smaller.onnx")
        calibration = token_feeds(self.encoder, prompts)
        made = quantize(
            path, smaller, self.scheme, calibration, lambda graph: _cosine(self._features(graph, prompts), expected).mean().item()
        )
        found = self._features(smaller, prompts)
        x = _cosine(found, expected)
        u, v = (_cosine(*pair).mean().item() for pair in zip(self._factors(found), self._factors(expected), strict=True))
        loss, reference = (self._loss(features) for features in (found, expected))
        self.quality = Quality(
            scheme=self.scheme,
            size=smaller.stat().st_size,
            float32_size=path.stat().st_size,
            latency=measure_latency(path, smaller, self.encoder.config.max_tokens),
            cosine_x=x.mean().item(),
            cosine_x_lowest=x.min().item(),
            cosine_u=u,
            cosine_v=v,
            loss=loss,
            float32_loss=reference,
            examples=len(prompts),
            left_out=made.left_out,
        )
        self.quality.check(self.gate)
        smaller.replace(path)
        return self.quality

    def _features(self, graph: Path, texts: Sequence[str]) -> Tensor:
        return graph_features(session_of(graph), self.encoder, texts)

    def _factors(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return instance_factors(self.lopa.config, {**self.lopa.shared, **self.lopa.start}, features)

    @torch.inference_mode()
    def _loss(self, features: Tensor) -> float:
        losses = self.fm.losses(self.lopa(features), self.dataset.pairs(range(len(self.examples))))
        return losses.mean().item()


def assess(fm: Path, encoder: Path, scheme: str, *, examples: Sequence[Example] = PROBES, max_tokens: int = 256, seed: int = 0) -> Quality:
    """What quantizing a text encoder costs a model: both folders, random heads that let the input count (as lopa-nano's start), no gate.

    Raises:
        ValueError, OSError: a folder that cannot be used. DataError: an example that does not fit the model.
    """
    model = FrozenModel.load(fm)
    backbone = Encoder.load(EncoderConfig(folder=str(encoder), max_tokens=max_tokens))
    backbone.standardize(backbone.encode([example.prefix + example.prompt for example in examples]))
    config = LoPAConfig(hidden=model.hidden, features=backbone.width, inner_std=0.06, output_std=0.2)
    lopa = init_lopa(config, model.vocabulary(), torch.Generator().manual_seed(seed))
    dataset = build_dataset(examples, model, backbone, soft_rows=config.soft_prompt_rows, standardize=False)
    shrinker = Shrinker(scheme, backbone, lopa, model, examples, dataset, Gate(loss=math.inf))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encode.onnx"
        export_encode(backbone, max_tokens, path)
        return shrinker(path)


def token_feeds(encoder: Encoder, texts: Sequence[str]) -> Inputs:
    """Inputs of encode.onnx, one text each."""
    rows = [pad_right([ids]) for ids in encoder.tokenize(texts)]
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in rows]


def graph_features(session: Any, encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """Features (n, h) as a device computes them: text by text, since activations of one call share their ranges."""
    return torch.from_numpy(np.concatenate([session.run([INSTANCE], dict(feeds))[0] for feeds in token_feeds(encoder, texts)]))


def measure_latency(original: Path, smaller: Path, max_tokens: int) -> tuple[Latency, ...]:
    """Both graphs in turn at every length of `LENGTHS` that the encoder takes."""
    sessions = [session_of(path) for path in (original, smaller)]
    results = []
    for tokens in (length for length in LENGTHS if length <= max_tokens):
        shape = (1, tokens)
        feeds = {"input_ids": np.arange(tokens, dtype=np.int64).reshape(shape) % 100, "attention_mask": np.ones(shape, np.int64)}
        slow, fast = (_milliseconds(functools.partial(session.run, None, feeds)) for session in sessions)
        results.append(Latency(tokens, fast, slow))
    return tuple(results)


def _milliseconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS + 3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1000 * median(times[3:])


def _cosine(found: Tensor, expected: Tensor) -> Tensor:
    """(n, ...) twice -> (n,)."""
    return functional.cosine_similarity(found.flatten(1), expected.flatten(1), dim=1)


def rows_of(quality: Quality) -> Mapping[str, str]:
    """For people: what is printed, in order."""
    latency = {
        f"one core, {entry.tokens} tokens": f"{entry.milliseconds:.1f} ms (float32 {entry.float32_milliseconds:.1f} ms)"
        for entry in quality.latency
    }
    x = f"x {quality.cosine_x:.4f} (lowest {quality.cosine_x_lowest:.4f})"
    losses = f"{quality.loss:.4f} (float32 {quality.float32_loss:.4f})"
    return {
        "encoder": f"{quality.scheme}, {quality.size:,} bytes (float32 {quality.float32_size:,})",
        **latency,
        "cosine to float32": f"{x}, U {quality.cosine_u:.4f}, V {quality.cosine_v:.4f}",
        "model's loss": f"{losses}: {quality.loss_change:+.3%} on {quality.examples} examples",
        "left in float32": ", ".join(quality.left_out) or "nothing",
    }
