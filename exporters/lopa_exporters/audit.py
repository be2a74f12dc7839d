"""Checks of a finished bundle without torch: its graphs against the manifest, against each other, and against numpy.

update is compared with compose by finite differences and with AdamW written out in numpy; neither shares code with what made the graphs.

Legend: b batch, t tokens, m rows, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from lopa.bundle import Bundle
from lopa.encoder import Moments, PromptEncoder
from lopa.priors import read_priors
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from lopa_exporters.quantize import session_of
from lopa_exporters.structure import ExportError, Structure, check_structure

Array = NDArray[Any]
Tensors = Mapping[str, Array]
BATCHES = (1, 2, 64)
TOLERANCE = 1e-5
SLOPE_TOLERANCE = 0.02
"""Relative, of finite differences in float32."""
STEP = 0.01
"""Of finite differences of fourth order, along a direction of length 1."""
QUANTIZED_COSINE = 0.9
"""Least cosine between a text alone and among others, where activations of a call share their ranges."""
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what was found."""

    name: str
    found: str


class Audit:
    """All checks of one bundle, in order."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.manifest = bundle, bundle.manifest
        self.encoder = PromptEncoder(bundle)
        self.rng = np.random.default_rng(0)
        self.structures: dict[str, Structure] = {}

    def run(self) -> Iterator[Check]:
        """Each check as it is done.

        Raises:
            ExportError: a check that failed. BundleError: a graph that breaks the contract or cannot be loaded.
        """
        checks: tuple[tuple[str, Callable[[], str]], ...] = (
            ("structure", self._structure),
            ("starting factors", self._factors),
            ("priors", self._priors),
            ("aligned tensors", self._aligned),
            ("encode: lengths and batches", self._encode),
            ("compose: batches", self._compose),
            ("update: gradient of compose", self._slope),
            ("update: clipping and AdamW", self._adamw),
        )
        for name, check in checks:
            yield Check(name, check())

    def _structure(self) -> str:
        for name in self.manifest.graphs:
            self.structures[name] = check_structure(self.bundle.path(f"{name}.onnx"))
        return ", ".join(f"{name} opset {structure.opset}" for name, structure in self.structures.items())

    def _factors(self) -> str:
        self.start = {name: value.astype(np.float32) for name, value in load_file(self.bundle.path("factors.safetensors")).items()}
        wanted = {spec.name: spec.shape for spec in self.manifest.personal}
        if {name: value.shape for name, value in self.start.items()} != wanted:
            raise ExportError("factors.safetensors has other tensors than the manifest names")
        if not all(np.isfinite(value).all() for value in self.start.values()):
            raise ExportError("factors.safetensors has values that are not finite")
        return f"{sum(value.size for value in self.start.values()):,} values"

    def _priors(self) -> str:
        """Names, shapes and dtypes as the manifest says; every prior composes."""
        priors, instance = read_priors(self.bundle), self._instance(1)
        for name, prior in priors.items():
            if not prior.finite:
                raise ExportError(f"prior {name} has values that are not finite")
            self.encoder.compose(instance, prior.tensors)
        return ", ".join(priors) or "none"

    def _aligned(self) -> str:
        """reads runs, row by row the same; whatever an aligned tensor holds, the starting factors give the same soft prompts."""
        names = [spec.name for spec in self.manifest.aligned]
        if not names:
            return "none"
        instance = self._instance(BATCHES[-1])
        together = self.encoder.reads(instance)
        alone = self.encoder.reads({name: value[-1:] for name, value in instance.items()})
        if not all(np.allclose(together[name][-1:], alone[name], atol=TOLERANCE * max(1.0, np.abs(alone[name]).max())) for name in names):
            raise ExportError("reads.onnx: a row depends on the other rows of its batch")
        moved = {**self.start, **{name: self._noise(self.start[name]) for name in names}}
        if not np.array_equal(self.encoder.compose(instance, self.start), self.encoder.compose(instance, moved)):
            raise ExportError(f"the starting factors' soft prompts depend on {', '.join(names)}, which the manifest calls aligned")
        return ", ".join(names)

    def _encode(self) -> str:
        """One token to the longest, every batch size; a text alone and padded among others; what the mask hides."""
        session = session_of(self.bundle.path("encode.onnx"))
        vocabulary = Tokenizer.from_file(str(self.bundle.path("tokenizer.json"))).get_vocab_size()
        longest = self.manifest.encoder.max_tokens
        lowest = 1.0
        for batch in BATCHES[:2]:
            lengths = np.array([longest, 1][:batch])
            ids = self.rng.integers(0, vocabulary, (batch, longest))
            ids[0, :1] = vocabulary - 1
            mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
            together = self._features(session, ids, mask)
            hidden = self._features(session, np.where(mask == 1, ids, 0), mask)
            for row, length in enumerate(lengths):
                alone = self._features(session, ids[row : row + 1, :length], mask[row : row + 1, :length])[0]
                for other in (together[row], hidden[row]):
                    lowest = min(lowest, self._compare("encode.onnx", other, alone, f"row {row} of {batch}, {length} tokens"))
        short = self._features(session, self.rng.integers(0, vocabulary, (BATCHES[-1], 1)), np.ones((BATCHES[-1], 1), np.int64))
        if short.shape[0] != BATCHES[-1]:
            raise ExportError(f"encode.onnx gives {short.shape[0]} rows for a batch of {BATCHES[-1]}")
        return f"1 to {longest} tokens; lowest cosine between a text alone and padded {lowest:.5f}"

    def _features(self, session: Any, ids: Array, mask: Array) -> Array:
        """All instance tensors side by side: (b, n)."""
        outputs = session.run([spec.name for spec in self.manifest.instance], {"input_ids": ids, "attention_mask": mask})
        rows = np.concatenate([np.asarray(output).reshape(len(ids), -1) for output in outputs], axis=1)
        if not np.isfinite(rows).all():
            raise ExportError(f"encode.onnx gives values that are not finite for {ids.shape[1]} tokens")
        return rows

    def _compare(self, graph: str, found: Array, expected: Array, where: str) -> float:
        """The cosine of two vectors, or an ExportError."""
        scale = float(np.linalg.norm(found) * np.linalg.norm(expected))
        cosine = float(found @ expected / scale) if scale else 1.0
        error, limit = float(np.abs(found - expected).max()), TOLERANCE * max(1.0, float(np.abs(expected).max()))
        if self.structures["encode"].quantized:
            if not cosine >= QUANTIZED_COSINE:
                raise ExportError(f"{graph}: {where}: cosine {cosine:.4f} to the same text alone; at least {QUANTIZED_COSINE} is needed")
        elif not error <= 10 * limit:
            raise ExportError(f"{graph}: {where}: differs by {error:.3g} from the same text alone; the limit is {10 * limit:.3g}")
        return cosine

    def _compose(self) -> str:
        norms = []
        for batch in BATCHES:
            instance, personal = self._instance(batch), self._personal()
            together = self.encoder.compose(instance, personal)
            row = batch - 1
            alone = self.encoder.compose({name: value[row : row + 1] for name, value in instance.items()}, personal)
            if not np.allclose(together[row], alone[0], atol=TOLERANCE * max(1.0, float(np.abs(alone).max()))):
                raise ExportError(f"compose.onnx: row {row} depends on the other rows of its batch")
            norms.append(float(np.linalg.norm(together, axis=-1).max()))
        return f"batches {', '.join(map(str, BATCHES))}; largest row norm {max(norms):.3g}"

    def _instance(self, batch: int) -> dict[str, Array]:
        return {spec.name: self.rng.standard_normal((batch, *spec.shape)).astype(np.float32) for spec in self.manifest.instance}

    def _personal(self) -> dict[str, Array]:
        return {name: value + 0.05 * self._noise(value) for name, value in self.start.items()}

    def _noise(self, like: Array) -> Array:
        return self.rng.standard_normal(like.shape).astype(np.float32)

    def _gradient(self, batch: int) -> Array:
        return self.rng.standard_normal((batch, self.manifest.rows, self.manifest.fm.hidden_size)).astype(np.float32)

    def _step(self, instance: Tensors, personal: Tensors, moments: Moments, gradient: Array, **settings: Any) -> Any:
        values = {"learning_rate": 0.0, "weight_decay": 0.0, "clip": 1e30, "step": 1, **settings}
        return self.encoder.update(instance, personal, moments, gradient, **values)

    def _slope(self) -> str:
        """With fresh moments exp_avg is a tenth of the gradient: along each tensor's own, compose must rise by that gradient's norm."""
        zeros, worst = Moments.zeros(self.manifest.personal), 0.0
        for batch in BATCHES[:2]:
            instance, personal, gradient = self._instance(batch), self._personal(), self._gradient(batch)
            moved = self._step(instance, personal, zeros, gradient).moments.exp_avg
            slopes = {name: value.astype(np.float64) / (1 - BETA1) for name, value in moved.items()}
            total = float(np.sqrt(sum((slope**2).sum() for slope in slopes.values())))
            rounding = 1e-6 * float(np.linalg.norm(gradient * self.encoder.compose(instance, personal)))
            for name, slope in slopes.items():
                norm = float(np.linalg.norm(slope))
                direction = (slope / max(norm, 1e-30)).astype(np.float32)
                near, far = (self._rise(instance, personal, name, h * direction, gradient) for h in (STEP, 2 * STEP))
                error = max(0.0, abs((8 * near - far) / (12 * STEP) - norm) - rounding / STEP) / max(norm, 0.05 * total)
                if not error <= SLOPE_TOLERANCE:
                    raise ExportError(
                        f"update.onnx: its gradient of {name} is {error:.1%} off compose's finite difference; the limit is 2 %"
                    )
                worst = max(worst, error)
        return f"each tensor, largest relative difference {worst:.1e}"

    def _rise(self, instance: Tensors, personal: Tensors, name: str, way: Array, gradient: Array) -> float:
        """Difference of <gradient, compose> between one tensor moved forth and moved back."""
        ends = (self.encoder.compose(instance, {**personal, name: personal[name] + sign * way}) for sign in (1, -1))
        high, low = (float((end.astype(np.float64) * gradient).sum()) for end in ends)
        return high - low

    def _adamw(self) -> str:
        """Clipping and three steps with decay beside numpy; a learning rate of zero moves nothing."""
        personal: Tensors = self._personal()
        moments, first, second = Moments.zeros(self.manifest.personal), _zeros(personal), _zeros(personal)
        expected = {name: value.astype(np.float64) for name, value in personal.items()}
        rate, decay, clip = 1e-2, 0.1, 0.5
        for step in range(1, 4):
            instance, gradient = self._instance(2), self._gradient(2)
            raw = self._step(instance, personal, Moments.zeros(self.manifest.personal), gradient)
            if any((raw.personal[name] != value).any() for name, value in personal.items()):
                raise ExportError("update.onnx moves factors although the learning rate is zero")
            slopes = {name: value.astype(np.float64) / (1 - BETA1) for name, value in raw.moments.exp_avg.items()}
            norm = float(np.sqrt(sum((slope**2).sum() for slope in slopes.values())))
            scale = min(1.0, clip / (norm + 1e-6))
            result = self._step(instance, personal, moments, gradient, learning_rate=rate, weight_decay=decay, clip=clip, step=step)
            for name, slope in slopes.items():
                first[name] = BETA1 * first[name] + (1 - BETA1) * scale * slope
                second[name] = BETA2 * second[name] + (1 - BETA2) * (scale * slope) ** 2
                size = np.sqrt(second[name] / (1 - BETA2**step)) + EPSILON
                expected[name] = (1 - rate * decay) * expected[name] - rate * first[name] / (1 - BETA1**step) / size
                noise = rate * 1e-5 * size.max() / size
                if not (np.abs(result.personal[name] - expected[name]) <= TOLERANCE * max(1.0, np.abs(expected[name]).max()) + noise).all():
                    raise ExportError(f"update.onnx: {name} after step {step} is not AdamW's")
            if abs(result.gradient_norm / norm - 1) > 1e-4:
                raise ExportError(f"update.onnx: gradient_norm is {result.gradient_norm}; the gradients' is {norm}")
            personal, moments = result.personal, result.moments
            expected = {name: value.astype(np.float64) for name, value in personal.items()}
        return f"3 steps, norm {norm:.3g} clipped to {clip}"


def _zeros(tensors: Tensors) -> dict[str, Array]:
    return {name: np.zeros(value.shape) for name, value in tensors.items()}
