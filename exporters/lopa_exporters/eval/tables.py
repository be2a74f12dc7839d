"""Rows of local files: JSON lines, Parquet, CSV, and TSV as GLUE has it (a header, no quoting)."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lopa_exporters.data import DataError

ENDINGS = (".jsonl", ".parquet", ".csv", ".tsv")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every row as a mapping of its columns. A TSV row with too few fields lacks the last columns.

    Raises:
        DataError: another ending, a row that cannot be read, or none at all. OSError: the file cannot be read.
    """
    readers = dict(zip(ENDINGS, (_json_lines, _parquet, _csv, _tsv), strict=True))
    if path.suffix not in readers:
        raise DataError(f"{path} ends in {path.suffix or 'nothing'}; known are {', '.join(ENDINGS)}")
    rows = list(readers[path.suffix](path))
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def text_of(row: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    """The first of these columns that the row has.

    Raises:
        DataError: it has none of them, or no text in it.
    """
    for name in names:
        if name in row:
            if not isinstance(row[name], str):
                raise DataError(f"{where}: {name} is {type(row[name]).__name__}, not text")
            return row[name]
    raise DataError(f"{where} has no {' or '.join(names)}; it has {', '.join(map(str, row))}")


def digest(paths: list[Path]) -> str:
    """SHA-256 over the contents of files, in order."""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} is no object")
            yield row


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _tsv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        names = file.readline().rstrip("\n").split("\t")
        for line in file:
            yield dict(zip(names, line.rstrip("\n").split("\t"), strict=False))
