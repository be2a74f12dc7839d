"""Looks at everything that the settings name before anything is started, so that a wrong file is told together with all other problems.

Nothing is written, asked over the network or loaded here: a port that is taken, a database that doesn't answer and a model that can't be
served are found by the start itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lopa.bundle import Bundle, BundleError

if TYPE_CHECKING:
    from lopa_server.config import ServerConfig

DATABASES = ("postgresql", "postgresql+psycopg", "sqlite")


def findings(config: ServerConfig) -> Iterator[str]:
    """What is there and can't be used, one sentence each. What isn't there is the settings' own matter (`AccessConfig.problems`)."""
    yield from _model(config)
    yield from _access(config)
    yield from _usage(config.usage)


def _model(config: ServerConfig) -> Iterator[str]:
    if Path(config.fm).is_dir() and not (Path(config.fm) / "config.json").is_file():
        yield f"{config.fm} is no model's folder: it has no config.json"
    for folder in (config.bundle, *config.older_bundles):
        try:
            if folder is not None:
                Bundle.open(folder)
        except BundleError as error:
            yield str(error)


def _access(config: ServerConfig) -> Iterator[str]:
    from lopa_server.identity.keys import KeyFile, KeyFileError
    from lopa_server.identity.tls import CertificateError, CertificateFiles
    from lopa_server.identity.tokens import JwksError, parse_jwks

    access = config.access
    try:
        if access.keys is not None and access.keys.is_file():
            KeyFile(access.keys).check()
    except KeyFileError as error:
        yield str(error)
    try:
        if access.jwks is not None and "://" not in access.jwks and Path(access.jwks).is_file():
            parse_jwks(Path(access.jwks).read_bytes())
    except (JwksError, OSError) as error:
        yield f"{access.jwks}: {error}"
    there = [path is not None and path.is_file() for path in (access.certificate, access.key)]
    try:
        if all(there) and (access.client_ca is None or access.client_ca.is_file()):
            CertificateFiles(access).check()
    except CertificateError as error:
        yield str(error)


def _usage(place: str | Path | None) -> Iterator[str]:
    if place is None:
        return
    scheme, separator, _ = str(place).partition("://")
    if separator:
        if scheme not in DATABASES:
            yield f"can't keep usage by {scheme}: it can be kept in SQLite or PostgreSQL (postgresql://USER@HOST/NAME)"
        return
    file, folder = Path(place), Path(place).parent
    if not folder.is_dir() or file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        yield f"can't keep usage in {place}: {'there is no folder ' + str(folder) if not folder.is_dir() else 'it is not writable'}"
