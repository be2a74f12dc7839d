"""Which request sits in which row of the key-value cache. Policy only: it names moves, the model runner makes them.

Rows 0..decoding-1 are decoding, the rows after them are still reading their prompt: a decode step is then one
contiguous block, with no gathering and no idle rows.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Move:
    """Copy row `source` of the cache over row `target`; `source` is then free."""

    source: int
    target: int


@dataclass(frozen=True)
class Swap:
    """Exchange two rows of the cache."""

    first: int
    second: int


class SlotTable:
    """An ordered table of request ids; a request's row is its position."""

    def __init__(self) -> None:
        self._rows: list[str] = []
        self._decoding = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def decoding(self) -> tuple[str, ...]:
        """The requests of the decode block, in the order of their rows."""
        return tuple(self._rows[: self._decoding])

    def row(self, request_id: str) -> int:
        """The request's row. Raises ValueError when it has none."""
        return self._rows.index(request_id)

    def enter(self, request_id: str) -> int:
        """Give a new request the next free row; it is reading its prompt."""
        self._rows.append(request_id)
        return len(self._rows) - 1

    def start_decoding(self, request_id: str) -> Swap | None:
        """The request has read its prompt: bring its row into the decode block."""
        row, edge = self.row(request_id), self._decoding
        self._decoding += 1
        if row == edge:
            return None
        self._rows[row], self._rows[edge] = self._rows[edge], self._rows[row]
        return Swap(edge, row)

    def leave(self, request_id: str) -> tuple[list[Move], int]:
        """Take a request out and close the gap: the moves, in order, and the row that is free afterwards."""
        hole = self.row(request_id)
        moves: list[Move] = []
        if hole < self._decoding:
            self._decoding -= 1
            hole = self._fill(hole, self._decoding, moves)
        last = len(self._rows) - 1
        self._fill(hole, last, moves)
        self._rows.pop()
        return moves, last

    def _fill(self, hole: int, source: int, moves: list[Move]) -> int:
        """Move `source` into `hole` unless it is the hole; the new hole."""
        if hole != source:
            self._rows[hole] = self._rows[source]
            moves.append(Move(source, hole))
        return source
