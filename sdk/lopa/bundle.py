"""The bundle: what the exporter hands the device (DESIGN section 3). A folder, and a single-file archive of it.

    manifest.json  tokenizer.json  encode.onnx  compose.onnx  update.onnx  factors.safetensors  priors.safetensors  reads.onnx

`factors.safetensors` is where a new user begins. `priors.safetensors`, which may be missing, holds further sets of personal tensors to go
on from (`lopa.priors`), each tuned on a population's examples of one kind of task: the tensors of a set stand there as `SET.NAME`.
`reads.onnx`, which may be missing too, tells what a new user's corrections read: see `lopa.alignment`.

Graph contract (all float tensors float32; b batch, t tokens, m rows, d hidden size):

    encode.onnx   input_ids, attention_mask: int64 (b, t)  ->  every instance tensor, by its name: (b, ...)
    compose.onnx  instance tensors, personal tensors, by name  ->  soft_prompt (b, m, d), every carried tensor: (b, ...)
    update.onnx   instance tensors, personal tensors, `exp_avg.NAME` and `exp_avg_sq.NAME` for each personal tensor,
                  every carried tensor, as compose gave it for the same instance and personal tensors,
                  gradient (b, m, d), and the scalars learning_rate, weight_decay, clip, step: float32 ()
                  ->  `new.NAME`, `new.exp_avg.NAME`, `new.exp_avg_sq.NAME`, gradient_norm ()
                  `step` counts from 1. `clip` bounds the L2 norm over all personal gradients together (torch's clip_grad_norm_).
    reads.onnx    instance tensors  ->  `reads.NAME` (b, h) for each aligned tensor (h, s): what compose multiplies by it at the start

The archive is a ZIP of exactly these files, stored without compression, in the manifest's order, timestamps fixed.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lopa.errors import BundleError
from lopa.files import read_limited, storage_error
from lopa.manifest import FILES, MANIFEST, MAX_MANIFEST_BYTES, OPTIONAL, FileSpec, Manifest

__all__ = ["Bundle", "BundleError", "digest_file", "extract_archive"]

_EPOCH = (1980, 1, 1, 0, 0, 0)


def digest_file(path: Path) -> FileSpec:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return FileSpec(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose every byte was checked against its manifest."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path | str) -> Bundle:
        """Read and verify a bundle's folder.

        Raises:
            BundleError: a file is missing, has another size or digest than the manifest says, or the manifest is bad.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        try:
            manifest = Manifest.from_json(read_limited(path, MAX_MANIFEST_BYTES).decode("utf-8"))
            for name, spec in manifest.files.items():
                file = folder / name
                if not file.is_file() or file.stat().st_size != spec.size or digest_file(file) != spec:
                    raise BundleError(f"{name} in {folder} is not what the manifest says: it was changed or only partly written")
        except BundleError:
            raise
        except (OSError, ValueError) as error:
            raise BundleError(f"{folder} is not a bundle: {error}") from error
        return cls(folder, manifest)

    def path(self, name: str) -> Path:
        return self.folder / name

    def write_archive(self, path: Path) -> None:
        """Write the single-file archive; the same bundle always gives the same bytes."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name in (MANIFEST, *self.manifest.file_names):
                info = zipfile.ZipInfo(name, _EPOCH)
                info.external_attr = 0o644 << 16
                archive.writestr(info, (self.folder / name).read_bytes())


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise storage_error("write", path, error) from error


def extract_archive(archive: Path, folder: Path) -> Bundle:
    """Unpack an archive into a new `folder` and verify it. Only the names and sizes that the manifest gives are read.

    Raises:
        BundleError: not such an archive, or its content doesn't verify. StorageError: no space. `folder` may then hold a partial copy.
    """
    try:
        with zipfile.ZipFile(archive) as source:
            sizes = {info.filename: info.file_size for info in source.infolist()}
            if not {MANIFEST, *FILES} <= set(sizes) <= {MANIFEST, *FILES, *OPTIONAL} or len(source.infolist()) != len(sizes):
                raise BundleError(
                    f"{archive.name} must hold exactly {', '.join((MANIFEST, *FILES))}, and {' and '.join(OPTIONAL)} if it has any"
                )
            if any(info.compress_type != zipfile.ZIP_STORED for info in source.infolist()):
                raise BundleError(f"{archive.name} has compressed files; a bundle's are stored as they are")
            if sizes[MANIFEST] > MAX_MANIFEST_BYTES:
                raise BundleError(f"{MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes")
            manifest = Manifest.from_json(source.read(MANIFEST).decode("utf-8"))
            if {name: spec.size for name, spec in manifest.files.items()} != {
                name: size for name, size in sizes.items() if name != MANIFEST
            }:
                raise BundleError(f"{archive.name} has other files, or of other sizes, than its manifest says")
            for name in sizes:
                _write(folder / name, source.read(name))
    except (zipfile.BadZipFile, OSError, UnicodeDecodeError, NotImplementedError, RuntimeError, EOFError) as error:
        raise BundleError(f"{archive.name} is not a bundle archive: {error}") from error
    return Bundle.open(folder)
