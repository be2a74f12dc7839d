"""Finished cells, one JSON line each: appended as they are measured, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.quality.cell import Cell

Row = dict[str, Any]


class Store:
    """Rows by cell. A last line that was only partly written is dropped; of a cell that stands there twice, the last one counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            for row in (json.loads(line) for line in lines if line.endswith("\n")):
                self.rows[cell_of(row).key()] = row
            if lines and not lines[-1].endswith("\n"):
                path.write_text("".join(lines[:-1]), encoding="utf-8")

    def __contains__(self, cell: Cell) -> bool:
        return cell.key() in self.rows

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row, safe on disk before this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[cell_of(row).key()] = dict(row)


def cell_of(row: Mapping[str, Any]) -> Cell:
    """The cell that a row is of; a row from before a field was there has its default."""
    return Cell(**{field.name: row[field.name] for field in fields(Cell) if field.name in row})


def rounded(row: Mapping[str, Any]) -> Row:
    """Floats to six digits: what a results file needs."""
    return json.loads(json.dumps(row), parse_float=lambda text: float(f"{float(text):.6g}"))
