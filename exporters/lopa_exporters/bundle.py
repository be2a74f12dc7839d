"""Writing a bundle: graphs, tokenizer, start values and manifest, verified and then published by one rename.

The same encoder and LoPA give the same bytes and so the same bundle id, on every run and in every folder.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lopa.bundle import Bundle, digest_file
from lopa.fingerprint import fingerprint_folder
from lopa.manifest import MANIFEST, OPTIONAL, READS, AlignedSpec, EncoderSpec, FMSpec, Manifest, TensorSpec, TuningDefaults
from safetensors.torch import save as serialize
from torch import Tensor

from lopa_exporters import graphs, verify
from lopa_exporters.audit import Audit
from lopa_exporters.encoder import Encoder, NoEncoder
from lopa_exporters.lopa import LoPA, aligned

DTYPES = {"F16": torch.float16, "F32": torch.float32}


def read_fm_spec(folder: Path, name: str = "") -> FMSpec:
    """Name (the folder's own unless given), fingerprint and hidden size of a foundation model on disk.

    Raises:
        FileNotFoundError: not a Hugging Face model folder.
    """
    from transformers import AutoConfig

    fingerprint = fingerprint_folder(folder)
    config = AutoConfig.from_pretrained(folder).get_text_config()
    return FMSpec(name or folder.resolve().name, fingerprint, int(config.hidden_size))


def export_bundle(
    out: Path,
    *,
    fm: FMSpec,
    encoder: Encoder | NoEncoder,
    lopa: LoPA,
    tuning: TuningDefaults | None = None,
    personal_dtype: str | None = None,
    shrink: Callable[[Path], object] | None = None,
) -> Bundle:
    """Write and verify a bundle at `out`, which is replaced as a whole or not at all.

    personal_dtype: how personal tensors rest on the device, "F16" or "F32"; by default F16 for profile "factors", else F32.
    shrink: makes the verified encode.onnx smaller in its place and refuses what costs too much (`lopa_exporters.quality.Shrinker`).

    Raises:
        ValueError: the parts don't fit each other, or `out` exists and is not a bundle.
        ExportError: a graph is not what torch computes.
    """
    if lopa.config.hidden != fm.hidden_size:
        raise ValueError(f"the soft prompt has hidden size {lopa.config.hidden}, the model {fm.name} has {fm.hidden_size}")
    if lopa.config.features != encoder.width:
        raise ValueError(f"the heads read {lopa.config.features} features, the encoder gives {encoder.width}")
    check_place(out)
    dtype = personal_dtype or ("F16" if lopa.config.profile == "factors" else "F32")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / "bundle"
        folder.mkdir()
        lopa = _at_rest(lopa, dtype)
        _write_encoder(folder, encoder)
        _write_method(folder, lopa, dtype)
        if shrink is not None:
            shrink(folder / "encode.onnx")
        _finish(folder, _manifest(fm, encoder, lopa, tuning or TuningDefaults(), dtype), out)
    return Bundle.open(out)


def replace_method(bundle: Bundle, lopa: LoPA, out: Path) -> Bundle:
    """Write a copy of a bundle with another method over the same encoder at `out`, which is replaced as a whole or not at all.

    The copy has no signature, and no priors: they were tuned with the other method.

    Raises:
        ValueError: the method does not fit the bundle, or `out` exists and is not a bundle.
        ExportError: a graph is not what torch computes.
    """
    (instance,) = bundle.manifest.instance
    if (lopa.config.hidden, (lopa.config.features,)) != (bundle.manifest.fm.hidden_size, instance.shape):
        raise ValueError(f"the method's hidden size and features are not those of bundle {bundle.manifest.id[:12]}")
    check_place(out)
    dtype = bundle.manifest.personal[0].dtype
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / "bundle"
        shutil.copytree(bundle.folder, folder)
        for name in OPTIONAL:
            (folder / name).unlink(missing_ok=True)
        lopa = _at_rest(lopa, dtype)
        _write_method(folder, lopa, dtype)
        changed = dataclasses.replace(bundle.manifest, priors=(), signature="", **_method(lopa, dtype))
        _finish(folder, changed, out)
    return Bundle.open(out)


def _finish(folder: Path, manifest: Manifest, out: Path) -> None:
    """Digests, the audit, and the bundle in its place."""
    files = {name: digest_file(folder / name) for name in manifest.file_names}
    (folder / MANIFEST).write_text(dataclasses.replace(manifest, files=files).to_json(), encoding="utf-8")
    for _ in Audit(Bundle.open(folder)).run():
        pass
    publish(folder, out)


def check_place(out: Path) -> None:
    """Raises ValueError: something is there that is no bundle, and so is not replaced. Ask before long work, too."""
    if out.exists() and not (out / MANIFEST).is_file():
        raise ValueError(f"{out} exists and is not a bundle; give a new folder")


def _at_rest(lopa: LoPA, dtype: str) -> LoPA:
    """Start values as a device reads them back, so that what is verified is what is used."""
    start = {name: tensor.to(DTYPES[dtype]).float() for name, tensor in lopa.start.items()}
    return dataclasses.replace(lopa, start=start)


def _write_encoder(folder: Path, encoder: Encoder | NoEncoder) -> None:
    """Tokenizer and encode.onnx, verified."""
    encoder.tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    encode = folder / "encode.onnx"
    graphs.export_encode(encoder, encoder.config.max_tokens, encode)
    verify.verify_encode(encode, encoder, encoder.width, encoder.tokenizer.get_vocab_size(), encoder.config.max_tokens)


def _write_method(folder: Path, lopa: LoPA, dtype: str) -> None:
    """Starting factors, and the other graphs; each is verified as soon as it is written."""
    compose, update = folder / "compose.onnx", folder / "update.onnx"
    graphs.export_compose(lopa, compose)
    verify.verify_compose(compose, lopa)
    graphs.export_update(lopa, update)
    verify.verify_update(update, lopa)
    if aligned(lopa):
        graphs.export_reads(lopa, folder / READS)
        verify.verify_reads(folder / READS, lopa)
    tensors: dict[str, Tensor] = {name: tensor.to(DTYPES[dtype]).contiguous() for name, tensor in lopa.start.items()}
    (folder / "factors.safetensors").write_bytes(serialize(tensors))


def _manifest(fm: FMSpec, encoder: Encoder | NoEncoder, lopa: LoPA, tuning: TuningDefaults, dtype: str) -> Manifest:
    """All but the files' digests."""
    return Manifest(
        fm=fm,
        encoder=EncoderSpec(encoder.config.label, encoder.config.max_tokens, encoder.config.truncation_side),
        instance=(TensorSpec(graphs.INSTANCE, (lopa.config.features,)),),
        files={},
        tuning=tuning,
        **_method(lopa, dtype),
    )


def _method(lopa: LoPA, dtype: str) -> dict[str, Any]:
    """The manifest's fields that say what the method is."""
    config = lopa.config
    return {
        "rows": config.soft_prompt_rows,
        "rank": config.rank if config.has_instance_part else 0,
        "composition": config.composition,
        "profile": config.profile,
        "personal": tuple(TensorSpec(name, tuple(tensor.shape), dtype) for name, tensor in lopa.start.items()),
        "carried": tuple(TensorSpec(name, shape) for name, shape in graphs.carried(config).items()),
        "aligned": tuple(AlignedSpec(name, config.spread) for name in aligned(lopa)),
    }


def publish(folder: Path, out: Path) -> None:
    """Put a finished folder in its place. An old bundle is moved aside first and removed last."""
    aside = folder.parent / "old"
    if out.exists():
        out.replace(aside)
    folder.replace(out)
    shutil.rmtree(aside, ignore_errors=True)
