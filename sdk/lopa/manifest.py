"""The bundle's manifest: what the device knows of a bundle before it opens a file of it, parsed with suspicion."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lopa.errors import BundleError

SCHEMA = 1
MANIFEST = "manifest.json"
FILES = ("tokenizer.json", "encode.onnx", "compose.onnx", "update.onnx", "factors.safetensors")
"""Those that every bundle has."""
PRIORS = "priors.safetensors"
READS = "reads.onnx"
OPTIONAL = (PRIORS, READS)
MAX_PRIORS = 32
MAX_MANIFEST_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 30
MAX_AXES = 8
MAX_ELEMENTS = 1 << 28
"""Of one tensor: 1 GiB as float32."""
MAX_INSTANCE = 1 << 20
"""Numbers that encode gives for one text, which are kept for every example of a run."""
MAX_READ = 1 << 17
"""Numbers that reads gives for one example."""
MAX_LABEL = 1000
"""Characters of a name for people."""
_HEX = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_.]{1,100}")
_PRIOR = re.compile(r"[A-Za-z0-9_-]{1,40}")


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor. `dtype` is how it is stored at rest ("F16" or "F32"); graphs always take float32."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "F32"


@dataclass(frozen=True)
class FileSpec:
    sha256: str
    size: int
    """Bytes."""


@dataclass(frozen=True)
class FMSpec:
    """The foundation model that the bundle was trained for."""

    name: str
    fingerprint: str
    hidden_size: int


@dataclass(frozen=True)
class EncoderSpec:
    name: str
    max_tokens: int
    """Longer inputs are truncated to this many tokens."""
    truncation_side: str = "left"
    """"left" drops the beginning and keeps what stands right before the target; "right" drops the end."""


@dataclass(frozen=True)
class TuningDefaults:
    """Hyper-parameters that suit this bundle; `tune` takes them unless told otherwise."""

    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    clip: float = 1.0
    steps: int = 100
    batch_size: int = 8


@dataclass(frozen=True)
class PriorSpec:
    """Personal tensors to start from, other than the plain start."""

    name: str
    rate: float = 1.0
    """Part of the learning rate that a run takes which starts here: what is close already needs smaller steps."""


@dataclass(frozen=True)
class AlignedSpec:
    """A personal tensor that a new user's own examples may set before the first step, without changing a soft prompt (`lopa.alignment`)."""

    name: str
    """Of a personal tensor (h, s); reads.onnx gives what it reads (b, h)."""
    spread: float = 1.0
    """Standard deviation, over the examples, of what a column gives."""


@dataclass(frozen=True)
class Manifest:
    """Everything that the device needs to know about a bundle. It sees tensors and graphs by name, no profile's meaning."""

    fm: FMSpec
    encoder: EncoderSpec
    rows: int
    """m, rows of the soft prompt."""
    rank: int
    """r, rank of the instance part U V^T; 0 without one."""
    composition: str
    """"product", "add", "concat", "max" or "none"."""
    profile: str
    """"factors", "heads" or "prompt": a label for people."""
    instance: tuple[TensorSpec, ...]
    """What encode gives per input; shapes without the batch axis."""
    personal: tuple[TensorSpec, ...]
    """What the user owns and tunes."""
    files: Mapping[str, FileSpec]
    tuning: TuningDefaults = dataclasses.field(default_factory=TuningDefaults)
    carried: tuple[TensorSpec, ...] = ()
    """What compose hands on to update, so that nothing large is computed twice; shapes without the batch axis. A manifest without any
    doesn't name it."""
    priors: tuple[PriorSpec, ...] = ()
    """What is in `priors.safetensors`. A manifest without any doesn't name it."""
    aligned: tuple[AlignedSpec, ...] = ()
    """What `reads.onnx` is for. A manifest without any doesn't name it."""
    schema: int = SCHEMA
    signature: str = ""
    """Ed25519 over the id (`lopa.signing`): 128 hex digits, or empty. Not part of what the id is made of."""

    @property
    def file_names(self) -> tuple[str, ...]:
        """Of every file but the manifest itself, in the archive's order."""
        return (*FILES, *([PRIORS] if self.priors else []), *([READS] if self.aligned else []))

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the ONNX graphs, without `.onnx`."""
        return tuple(name.removesuffix(".onnx") for name in self.file_names if name.endswith(".onnx"))

    @property
    def id(self) -> str:
        """SHA-256 of the canonical JSON, which holds every file's digest: 64 hex digits."""
        return hashlib.sha256(self._canonical().encode()).hexdigest()

    def _canonical(self) -> str:
        return json.dumps(self._content(), sort_keys=True, separators=(",", ":"))

    def _content(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        del content["signature"]
        for optional in ("carried", "priors", "aligned"):
            if not content[optional]:
                del content[optional]
        return content

    def to_json(self) -> str:
        """The manifest file's text; its `id` is redundant and checked on reading."""
        signature = {"signature": self.signature} if self.signature else {}
        return json.dumps({"id": self.id, **signature, **self._content()}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check a manifest.

        Raises:
            BundleError: not JSON, a field missing, of the wrong type or out of range, or an id that doesn't fit the content.
        """
        try:
            document = json.loads(text)
            schema = document["schema"]
            if schema != SCHEMA:
                raise BundleError(f"manifest.schema is {reprlib.repr(schema)}; this version reads {SCHEMA}: upgrade lopa")
            manifest = cls(
                fm=FMSpec(**document["fm"]),
                encoder=EncoderSpec(**document["encoder"]),
                rows=document["rows"],
                rank=document["rank"],
                composition=document["composition"],
                profile=document["profile"],
                instance=_specs(document["instance"]),
                personal=_specs(document["personal"]),
                files={name: FileSpec(**spec) for name, spec in document["files"].items()},
                tuning=TuningDefaults(**document["tuning"]),
                carried=_specs(document.get("carried", ())),
                priors=tuple(PriorSpec(**prior) for prior in document.get("priors", ())),
                aligned=tuple(AlignedSpec(**spec) for spec in document.get("aligned", ())),
                signature=document.get("signature", ""),
            )
            _check(manifest)
            if document.get("id") != manifest.id:
                raise BundleError(f"{MANIFEST} says id {reprlib.repr(document.get('id'))}, its content has {manifest.id}: it was changed")
        except BundleError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BundleError(f"{MANIFEST} is not a bundle manifest: {type(error).__name__}: {str(error)[:200]}") from error
        return manifest


def _specs(rows: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(str(row["name"]), tuple(row["shape"]), str(row["dtype"])) for row in rows)


def _integer(field: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise BundleError(f"{field} is {reprlib.repr(value)}; it must be an integer from {low} to {high}")


def _check(manifest: Manifest) -> None:
    """Types and ranges of a manifest that came from outside."""

    def integer(field: str, value: object, low: int, high: int) -> None:
        _integer(f"manifest.{field}", value, low, high)

    def real(field: str, value: object, *, zero: bool = False) -> None:
        largest = float(np.finfo(np.float32).max)  # what update.onnx can take
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= largest or (value == 0 and not zero):
            raise BundleError(f"manifest.{field} is {reprlib.repr(value)}; it must be a finite number {'from' if zero else 'above'} 0")

    labels = {"fm.name": manifest.fm.name, "encoder.name": manifest.encoder.name}
    labels |= {"profile": manifest.profile, "composition": manifest.composition}
    labels |= {f"priors.{i}.name": prior.name for i, prior in enumerate(manifest.priors)}
    labels |= {f"aligned.{i}.name": spec.name for i, spec in enumerate(manifest.aligned)}
    for field, label in labels.items():
        if not isinstance(label, str) or len(label) > MAX_LABEL:
            raise BundleError(f"manifest.{field} is {reprlib.repr(label)}; it must be text of up to {MAX_LABEL} characters")
    integer("rows", manifest.rows, 1, 4096)
    integer("rank", manifest.rank, 0, 1024)
    integer("fm.hidden_size", manifest.fm.hidden_size, 1, 1 << 16)
    integer("encoder.max_tokens", manifest.encoder.max_tokens, 1, 1 << 16)
    integer("tuning.steps", manifest.tuning.steps, 1, 1 << 20)
    integer("tuning.batch_size", manifest.tuning.batch_size, 1, 1 << 12)
    real("tuning.learning_rate", manifest.tuning.learning_rate)
    real("tuning.clip", manifest.tuning.clip)
    real("tuning.weight_decay", manifest.tuning.weight_decay, zero=True)
    if manifest.encoder.truncation_side not in ("left", "right"):
        raise BundleError(f"manifest.encoder.truncation_side is {reprlib.repr(manifest.encoder.truncation_side)}; it must be left or right")
    if manifest.signature != "" and not re.fullmatch("[0-9a-f]{128}", str(manifest.signature)):
        raise BundleError("manifest.signature must be 128 lower-case hex digits")
    if not _HEX.fullmatch(str(manifest.fm.fingerprint)):
        raise BundleError("manifest.fm.fingerprint must be 64 lower-case hex digits")
    for kind, specs in (("instance", manifest.instance), ("personal", manifest.personal), ("carried", manifest.carried)):
        check_tensors(f"manifest.{kind}", specs)
    integer("instance, all elements", sum(math.prod(spec.shape) for spec in manifest.instance), 0, MAX_INSTANCE)
    check_prior_names([prior.name for prior in manifest.priors])
    for prior in manifest.priors:
        real(f"priors.{prior.name}.rate", prior.rate)
    check_aligned(manifest)
    for spec in manifest.aligned:
        real(f"aligned.{spec.name}.spread", spec.spread)
    if set(manifest.files) != set(manifest.file_names):
        expected, found = ", ".join(manifest.file_names), ", ".join(sorted(manifest.files))[:200]
        raise BundleError(f"manifest.files must be exactly {expected}; it has {found}")
    for name, file in manifest.files.items():
        integer(f"files.{name}.size", file.size, 1, MAX_FILE_BYTES)
        if not _HEX.fullmatch(str(file.sha256)):
            raise BundleError(f"manifest.files.{name}.sha256 must be 64 lower-case hex digits")


def check_prior_names(names: Sequence[str]) -> None:
    """Raises BundleError: names that a bundle's priors cannot have."""
    if len(names) > MAX_PRIORS or len(set(names)) != len(names) or not all(map(_PRIOR.fullmatch, names)):
        odd = ", ".join(names)[:200]
        raise BundleError(f"manifest.priors has {odd}; it may have {MAX_PRIORS} different names of up to 40 letters, digits, _ and -")


def check_aligned(manifest: Manifest) -> None:
    """Raises BundleError: names that are not different personal tensors of two axes, or that read too much."""
    names = [spec.name for spec in manifest.aligned]
    heights = {spec.name: spec.shape[0] for spec in manifest.personal if len(spec.shape) == 2}
    if len(set(names)) != len(names) or not set(names) <= set(heights):
        raise BundleError(f"manifest.aligned has {', '.join(names)[:200]}; it may have different personal tensors of two axes")
    _integer("manifest.aligned, all that is read", sum(heights[name] for name in names), 0, MAX_READ)


def check_tensors(field: str, specs: Sequence[TensorSpec]) -> None:
    """Names, dtypes and sizes of tensors that came from outside.

    Raises:
        BundleError: one is out of range; the message names it below `field`.
    """
    if len({spec.name for spec in specs}) != len(specs):
        raise BundleError(f"{field} names a tensor twice")
    for spec in specs:
        if not _NAME.fullmatch(spec.name):
            raise BundleError(f"{field} has a tensor of name {spec.name[:100]!r}; letters, digits, _ and . are allowed")
        if spec.dtype not in ("F16", "F32"):
            raise BundleError(f"{field}.{spec.name}.dtype is {reprlib.repr(spec.dtype)}; it must be F16 or F32")
        if len(spec.shape) > MAX_AXES:
            raise BundleError(f"{field}.{spec.name}.shape has {len(spec.shape)} axes; the limit is {MAX_AXES}")
        for size in spec.shape:
            _integer(f"{field}.{spec.name}.shape", size, 1, 1 << 24)
        if math.prod(spec.shape) > MAX_ELEMENTS:
            raise BundleError(f"{field}.{spec.name}.shape is {list(spec.shape)}; a tensor has at most {MAX_ELEMENTS} elements")
