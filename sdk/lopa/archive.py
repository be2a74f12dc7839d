"""A persona on the move: its files in one archive, hashed, and read back with the same suspicion as anything from outside.

The archive is a ZIP without compression. `index.json` comes first and names every other file with its size and SHA-256; there is nothing
else in it. An encrypted persona stays encrypted on the way.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from lopa.errors import FolderError, StorageError
from lopa.files import make_folder, read_limited, storage_error, write_atomic
from lopa.folder import DAMAGE, PersonaStore
from lopa.manifest import MAX_FILE_BYTES
from lopa.record import Record

FORMAT = "lopa.persona.1"
_INDEX = "index.json"
_ALLOWED = re.compile(r"persona\.json|tuning\.safetensors|examples\.jsonl|factors/[0-9]{6}\.safetensors")
_MAX_INDEX_BYTES = 1 << 20
_MAX_FILES = 100
_EPOCH = (1980, 1, 1, 0, 0, 0)


def export_persona(store: PersonaStore, path: Path) -> None:
    """Write one persona's versions, its kept examples and its unfinished run to an archive.

    Raises:
        FolderError: it is being tuned, or damaged. StorageError: the archive can't be written.
    """
    store.record()
    with store.lock():
        record = store.record()
        names = ["persona.json", *(f"factors/{version.version:06d}.safetensors" for version in record.versions)]
        names += [name for name in ("tuning.safetensors", "examples.jsonl") if (store.folder / name).exists()]
        try:
            files = {name: read_limited(store.folder / name, MAX_FILE_BYTES) for name in names}
        except (OSError, ValueError) as error:
            raise FolderError(f"persona {store.name} can't be exported: {error}") from error
    index = {"format": FORMAT, "files": {name: _entry(data) for name, data in files.items()}}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(zipfile.ZipInfo(_INDEX, _EPOCH), json.dumps(index, sort_keys=True))
            for name, data in files.items():
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise storage_error("write", path, error) from error


def import_persona(path: Path | str, folder: Path | str, persona: str | None = None) -> str:
    """Put an exported persona into a user's folder, under its own name or another. Its name there.

    Raises:
        FolderError: not such an archive, damaged, or the folder has a persona of this name. StorageError: it can't be written.
    """
    files = _read(Path(path).expanduser())
    try:
        record = Record.from_json(files["persona.json"].decode("utf-8"))
        missing = {f"factors/{version.version:06d}.safetensors" for version in record.versions} - set(files)
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except DAMAGE as error:
        raise FolderError(f"{path} holds no persona: {type(error).__name__}: {error}") from error
    name = persona or record.persona
    store = PersonaStore(folder, name)
    make_folder(store.folder / "factors")
    with store.lock():
        if store.exists:
            raise FolderError(f"{store.root} has a persona {name} already; import it under another name")
        store.prepare()
        try:
            for relative, data in files.items():
                if relative != "persona.json":
                    write_atomic(store.folder / relative, data)
            write_atomic(store.folder / "persona.json", replace(record, persona=name).to_json().encode())
        except StorageError:
            shutil.rmtree(store.folder / "factors", ignore_errors=True)
            raise
    return name


def _entry(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _read(path: Path) -> dict[str, bytes]:
    """Every file of an archive, sizes and digests checked before and after reading."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if not 2 <= len(entries) <= _MAX_FILES or entries[0].filename != _INDEX or entries[0].file_size > _MAX_INDEX_BYTES:
                raise ValueError("it doesn't begin with an index")
            index = json.loads(archive.read(entries[0]))
            wanted: dict[str, dict[str, Any]] = index["files"]
            if index["format"] != FORMAT or sorted(entry.filename for entry in entries[1:]) != sorted(wanted):
                raise ValueError("its files are not those of its index")
            files = {}
            for entry in entries[1:]:
                if not _ALLOWED.fullmatch(entry.filename) or entry.file_size != wanted[entry.filename]["size"]:
                    raise ValueError(f"{entry.filename[:80]!r} doesn't belong, or has another size than the index says")
                if entry.file_size > MAX_FILE_BYTES or entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{entry.filename} is too large or compressed")
                files[entry.filename] = archive.read(entry)
                if _entry(files[entry.filename]) != wanted[entry.filename]:
                    raise ValueError(f"{entry.filename} is damaged")
    except (zipfile.BadZipFile, NotImplementedError, EOFError, *DAMAGE) as error:
        raise FolderError(f"{path} is not an exported persona, or damaged: {error}") from error
    return files
