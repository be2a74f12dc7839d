"""The bundles that devices may fetch: opened, held against the model that is served, and packed."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lopa.bundle import Bundle, BundleError

from lopa_server.config import ConfigError, ServerConfig
from lopa_server.engine.base import EngineSpec


@dataclass(frozen=True)
class PublishedBundle:
    """A bundle's archive on this machine, ready to be sent."""

    id: str
    file: BinaryIO
    size: int

    @classmethod
    def build(cls, bundle: Bundle, folder: Path) -> PublishedBundle:
        """Write the archive into `folder`, where it may be removed at once."""
        path = folder / f"{bundle.manifest.id}.zip"
        bundle.write_archive(path)
        return cls(bundle.manifest.id, path.open("rb"), path.stat().st_size)

    def read(self, position: int, size: int) -> bytes:
        """So many bytes from a position on, fewer at the end. In any thread."""
        return os.pread(self.file.fileno(), size, position)


def open_bundles(config: ServerConfig) -> list[Bundle]:
    """The current one first.

    Raises:
        ConfigError: one is damaged, or not there.
    """
    try:
        return [Bundle.open(folder) for folder in (config.bundle, *config.older_bundles) if folder is not None]
    except BundleError as error:
        raise ConfigError(str(error)) from error


def publish(bundles: list[Bundle], spec: EngineSpec, config: ServerConfig) -> tuple[PublishedBundle, ...]:
    """Archives of all of them, in files without a name: however the server ends, none is left.

    Raises:
        ConfigError: one was made for another model, or its soft prompts have more rows than are allowed.
    """
    for bundle in bundles:
        _check(bundle, spec, config)
    with tempfile.TemporaryDirectory(prefix="lopa-bundle-") as folder:
        return tuple(PublishedBundle.build(bundle, Path(folder)) for bundle in bundles)


def _check(bundle: Bundle, spec: EngineSpec, config: ServerConfig) -> None:
    fm = bundle.manifest.fm
    if fm.fingerprint != spec.fingerprint:
        raise ConfigError(
            f"the bundle {bundle.folder} was made for {fm.name} ({fm.fingerprint[:16]}…), but {config.fm} is {spec.fingerprint[:16]}…: "
            "serve the model that it was made for, or export a bundle for this one"
        )
    rows, limit = bundle.manifest.rows, config.limits.max_virtual_tokens
    if rows > limit:
        raise ConfigError(f"the bundle's soft prompts have {rows} rows; max_virtual_tokens is {limit}: raise it")
