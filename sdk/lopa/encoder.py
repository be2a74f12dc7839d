"""The prompt encoder: a tokenizer and the bundle's ONNX graphs, run with ONNX Runtime on the CPU. It knows tensors by name,
no method's meaning.

Legend: b batch, t tokens, m soft-prompt rows, d hidden size of the foundation model. The graph contract is in `lopa.bundle`.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from lopa.bundle import Bundle
from lopa.errors import BundleError, FactorsError
from lopa.manifest import TensorSpec
from lopa.values import Float32, unicode_text

Tensors = Mapping[str, Float32]
"""Named float32 tensors."""
SCALARS = ("learning_rate", "weight_decay", "clip", "step")


@dataclass(frozen=True)
class Moments:
    """The optimizer's state: AdamW's running means of gradient and squared gradient, shaped like the personal tensors."""

    exp_avg: Tensors
    exp_avg_sq: Tensors

    @classmethod
    def zeros(cls, personal: Sequence[TensorSpec]) -> Moments:
        """The state before the first step."""
        return cls(*({spec.name: np.zeros(spec.shape, np.float32) for spec in personal} for _ in range(2)))


@dataclass(frozen=True)
class Composed:
    """Soft prompts on their way to a gradient."""

    soft_prompts: Float32
    """(b, m, d)."""
    carried: Tensors
    """What `PromptEncoder.update` takes over, so that it needs not compute it again."""


@dataclass(frozen=True)
class Update:
    """What one optimizer step gives."""

    personal: Tensors
    moments: Moments
    gradient_norm: float
    """L2 norm over all personal gradients together, before clipping."""


class PromptEncoder:
    """From text to soft prompts, and from their gradients to new personal tensors. Safe between threads.

    Sessions are made on first use: a device that only generates never loads update.onnx.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 1) -> None:
        self.bundle = bundle
        self._threads = threads
        self._lock = threading.Lock()
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._tokenizer: Tokenizer | None = None

    def encode(self, texts: Sequence[str], *, batch_size: int = 1) -> dict[str, Float32]:
        """Instance tensors of each text, in the order given: name -> (b, ...), as manifest.instance says.

        Too long a text loses the side that the manifest names. Texts run one by one unless `batch_size` says otherwise: in an int8 encoder
        the texts of a batch share the ranges of their activations, so that a text's result would depend on its neighbours.

        Raises:
            BundleError: a graph that breaks the contract. InvalidRequest: a text with a lone surrogate.
        """
        specs = self.bundle.manifest.instance
        ids = self.tokenize(texts)
        result = {spec.name: np.empty((len(texts), *spec.shape), np.float32) for spec in specs}
        if not specs or not texts:
            return result
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            outputs = self._run("encode.onnx", _pad([ids[i] for i in rows]))
            for spec in specs:
                result[spec.name][rows] = outputs[spec.name]
        return result

    def compose(self, instance: Tensors, personal: Tensors) -> Float32:
        """Soft prompts from instance and personal tensors: (b, m, d).

        Raises:
            BundleError: a graph that breaks the contract. FactorsError: the soft prompts have values that are not finite.
        """
        return self._composed(instance, personal, []).soft_prompts

    def compose_to_update(self, instance: Tensors, personal: Tensors) -> Composed:
        """As `compose`, with what `update` can take over."""
        return self._composed(instance, personal, [spec.name for spec in self.bundle.manifest.carried])

    def _composed(self, instance: Tensors, personal: Tensors, carried: Sequence[str]) -> Composed:
        outputs = self._run("compose.onnx", {**instance, **personal}, ["soft_prompt", *carried])
        soft = outputs.pop("soft_prompt")
        if not np.isfinite(soft).all():
            raise FactorsError("these factors give soft prompts with values that are not finite; `rollback` to another version")
        return Composed(soft, outputs)

    def update(
        self,
        instance: Tensors,
        personal: Tensors,
        moments: Moments,
        gradient: Float32,
        *,
        learning_rate: float,
        weight_decay: float,
        clip: float,
        step: int,
        carried: Tensors | None = None,
    ) -> Update:
        """One optimizer step: back through compose, sum over the batch, clip, AdamW.

        gradient: (b, m, d), of the loss with respect to compose's soft prompts for the same instance and personal tensors.
        step: counts from 1.
        carried: what `compose_to_update` gave for the same instance and personal tensors; without it that is computed here.
        """
        if carried is None:
            carried = self.compose_to_update(instance, personal).carried if self.bundle.manifest.carried else {}
        scalars = zip(SCALARS, (learning_rate, weight_decay, clip, step), strict=True)
        feeds = {
            **instance,
            **personal,
            **{f"exp_avg.{name}": value for name, value in moments.exp_avg.items()},
            **{f"exp_avg_sq.{name}": value for name, value in moments.exp_avg_sq.items()},
            **carried,
            **{name: np.asarray(value, np.float32) for name, value in scalars},
            "gradient": gradient,
        }
        out = self._run("update.onnx", feeds)
        names = [spec.name for spec in self.bundle.manifest.personal]
        moved = Moments({name: out[f"new.exp_avg.{name}"] for name in names}, {name: out[f"new.exp_avg_sq.{name}"] for name in names})
        return Update({name: out[f"new.{name}"] for name in names}, moved, float(out["gradient_norm"]))

    def reads(self, instance: Tensors) -> dict[str, Float32]:
        """What each aligned tensor (`Manifest.aligned`) is multiplied with at the start, by the tensor's name: (b, h).

        Raises:
            BundleError: a graph that breaks the contract, or values that are not finite.
        """
        outputs = self._run("reads.onnx", instance)
        if not all(np.isfinite(value).all() for value in outputs.values()):
            raise BundleError(f"reads.onnx of bundle {self.bundle.manifest.id[:12]} gives values that are not finite")
        return {name.removeprefix("reads."): value for name, value in outputs.items()}

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The encoder's own token ids of each text, at least one.

        Raises:
            InvalidRequest: a text with a lone surrogate.
        """
        for i, text in enumerate(texts):
            unicode_text(text, f"texts[{i}]")
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _load_tokenizer(self.bundle)
            # An empty text without special tokens would have no positions to pool over: it is read as one token 0.
            return [encoding.ids or [0] for encoding in self._tokenizer.encode_batch(list(texts))]

    def _run(self, graph: str, feeds: Mapping[str, Any], outputs: Sequence[str] = ()) -> dict[str, Float32]:
        """Some outputs, or all."""
        session = self._session(graph)
        names = [*outputs] or [output.name for output in session.get_outputs()]
        try:
            found = dict(zip(names, session.run(names, dict(feeds)), strict=True))
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise BundleError(f"{graph} of bundle {self.bundle.manifest.id[:12]} failed: {str(error)[:300]}") from error
        _check_values(self.bundle, graph, feeds, found)
        return found

    def _session(self, graph: str) -> onnxruntime.InferenceSession:
        with self._lock:
            if graph not in self._sessions:
                self._sessions[graph] = _load_session(self.bundle, graph, self._threads)
            return self._sessions[graph]


def _load_tokenizer(bundle: Bundle) -> Tokenizer:
    spec = bundle.manifest.encoder
    try:
        tokenizer = Tokenizer.from_file(str(bundle.path("tokenizer.json")))
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(f"tokenizer.json of bundle {bundle.manifest.id[:12]}: {str(error)[:300]}") from error
    tokenizer.enable_truncation(spec.max_tokens, direction=spec.truncation_side)
    tokenizer.no_padding()
    return tokenizer


def _pad(ids: Sequence[Sequence[int]]) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """input_ids and attention_mask, (b, t), padded at the end; 1 in the mask is a real token."""
    width = max(map(len, ids))
    tokens = np.zeros((len(ids), width), np.int64)
    mask = np.zeros((len(ids), width), np.int64)
    for row, line in enumerate(ids):
        tokens[row, : len(line)] = line
        mask[row, : len(line)] = 1
    return {"input_ids": tokens, "attention_mask": mask}


def _load_session(bundle: Bundle, graph: str, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a phone's battery pays for spinning
    # Its fused kernel is slower than the two that it replaces: 11.6 ms against 12.8 ms for all-MiniLM-L6-v2 in int8 at 128 tokens.
    options.add_session_config_entry("optimization.disable_specified_optimizers", "SkipLayerNormFusion")
    _check_alone(bundle, graph)
    try:
        session = onnxruntime.InferenceSession(str(bundle.path(graph)), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise BundleError(f"{graph} of bundle {bundle.manifest.id[:12]} can't be loaded: {str(error)[:300]}") from error
    inputs, outputs = _contract(bundle, graph)
    _check_side(graph, "input", session.get_inputs(), inputs)
    _check_side(graph, "output", session.get_outputs(), outputs)
    return session


def _check_alone(bundle: Bundle, graph: str) -> None:
    """Refuse a graph whose weights lie in another file, by the one word that it needs to say so. It could name any file of the user's,
    which older ONNX Runtimes (1.20) read, and give it to the server as a soft prompt."""
    try:
        with bundle.path(graph).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            alone = data.find(b"location") < 0
    except (OSError, ValueError) as error:
        raise BundleError(f"{graph} of bundle {bundle.manifest.id[:12]} can't be loaded: {error}") from error
    if not alone:
        raise BundleError(f"{graph} of bundle {bundle.manifest.id[:12]} has weights in another file, or a name with `location` in it")


Axes = tuple[int | None, ...]
"""None is an axis of any size: batch or tokens."""


def _contract(bundle: Bundle, graph: str) -> tuple[dict[str, Axes], dict[str, Axes]]:
    """Inputs and outputs that a graph must have, by the manifest."""
    manifest = bundle.manifest
    instance: dict[str, Axes] = {spec.name: (None, *spec.shape) for spec in manifest.instance}
    personal: dict[str, Axes] = {spec.name: spec.shape for spec in manifest.personal}
    soft: Axes = (None, manifest.rows, manifest.fm.hidden_size)
    carried: dict[str, Axes] = {spec.name: (None, *spec.shape) for spec in manifest.carried}
    moments: dict[str, Axes] = {f"{kind}.{name}": shape for kind in ("exp_avg", "exp_avg_sq") for name, shape in personal.items()}
    if graph == "encode.onnx":
        return {"input_ids": (None, None), "attention_mask": (None, None)}, instance
    if graph == "compose.onnx":
        return {**instance, **personal}, {"soft_prompt": soft, **carried}
    if graph == "reads.onnx":
        return instance, {f"reads.{spec.name}": (None, personal[spec.name][0]) for spec in manifest.aligned}
    scalars: dict[str, Axes] = dict.fromkeys(SCALARS, ())
    new: dict[str, Axes] = {f"new.{name}": shape for name, shape in {**personal, **moments}.items()}
    return {**instance, **personal, **moments, **carried, **scalars, "gradient": soft}, {**new, "gradient_norm": ()}


def _check_values(bundle: Bundle, graph: str, feeds: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Shapes as they came: a graph may compute an axis that it declares without a size, and one that it declares is not held to it."""
    inputs, outputs = _contract(bundle, graph)
    batch = next((len(feeds[name]) for name, axes in inputs.items() if axes[:1] == (None,)), None)
    for name, value in found.items():
        axes = tuple(batch if size is None else size for size in outputs[name])
        if len(value.shape) != len(axes) or any(want not in (None, got) for got, want in zip(value.shape, axes, strict=True)):
            raise BundleError(f"{graph}: output {name} came as {list(value.shape)}; {list(axes)} is asked for")


def _check_side(graph: str, side: str, nodes: Sequence[Any], expected: Mapping[str, Axes]) -> None:
    """Names, then element types, then axes."""
    found = {node.name: node for node in nodes}
    if set(found) != set(expected):
        odd = sorted(set(found) ^ set(expected))
        raise BundleError(f"{graph} has other {side}s than the manifest asks for: {', '.join(odd)[:300]}")
    for name, axes in expected.items():
        kind = "tensor(int64)" if name in ("input_ids", "attention_mask") else "tensor(float)"
        shape = found[name].shape
        fits = len(shape) == len(axes) and all(
            want is None or not isinstance(got, int) or got == want for got, want in zip(shape, axes, strict=True)
        )
        if found[name].type != kind or not fits:
            raise BundleError(f"{graph}: {side} {name} is {found[name].type} {shape}; {kind} {list(axes)} is asked for")
