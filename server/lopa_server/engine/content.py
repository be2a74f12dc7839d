"""What stands at each position of a sequence, and the keys under which a computed prefix is found again.

A key is the SHA-256 chain over everything that the keys and values of a block depend on: model revision, compute dtype,
the caller's salt, and for this block and each one before it the token ids, which positions are soft, and the soft rows'
own bytes. A position that is soft never equals a token, whatever its bytes.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator

from lopa_server.engine.base import Float32, InputSequence


class CacheScope:
    """What all sequences of one engine have in common."""

    def __init__(self, revision: str, dtype: str) -> None:
        self._parts = (revision.encode(), dtype.encode())

    def root(self, salt: bytes) -> bytes:
        """Where a chain begins: 32 bytes."""
        digest = hashlib.sha256()
        for part in (*self._parts, salt):
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.digest()


class Content:
    """Token ids and soft rows in order. Grows as tokens are generated."""

    def __init__(self, root: bytes, sequence: InputSequence, block_size: int) -> None:
        self.ids = array("q", [*sequence.before, *[0] * sequence.rows, *sequence.after])
        """One id for each position, 0 where a soft row stands."""
        self.soft: Float32 | None = sequence.soft
        self.soft_start = len(sequence.before)
        self.soft_end = self.soft_start + sequence.rows
        self._block_size = block_size
        self._chain = [root]

    def __len__(self) -> int:
        return len(self.ids)

    def append(self, token_id: int) -> None:
        """A token that was generated."""
        self.ids.append(token_id)

    def key(self, block: int) -> bytes:
        """Of the block with this number, and so of everything up to its end. The block must be full."""
        while len(self._chain) < block + 2:
            start = (len(self._chain) - 1) * self._block_size
            self._chain.append(self._digest(self._chain[-1], start, start + self._block_size))
        return self._chain[block + 1]

    def keys(self, end: int) -> list[bytes]:
        """Of every block that is full with the first `end` positions."""
        return list(self.each_key(end))

    def each_key(self, end: int) -> Iterator[bytes]:
        """The same one after the other: none behind the first that nobody knows has to be made."""
        return map(self.key, range(end // self._block_size))

    def keys_to(self, end: int) -> list[bytes]:
        """As `keys`, and one for a last block that is filled up to `end` only: nobody may write behind it."""
        keys, rest = self.keys(end), end % self._block_size
        if rest:
            keys.append(self._digest(keys[-1] if keys else self._chain[0], end - rest, end))
        return keys

    def soft_within(self, start: int, stop: int) -> tuple[int, int]:
        """The part of start..stop where soft rows stand; empty when the second number is not above the first."""
        return max(start, self.soft_start), min(stop, self.soft_end)

    def _digest(self, before: bytes, start: int, stop: int) -> bytes:
        low, high = self.soft_within(start, stop)
        rows = max(0, high - low)
        layout = array("q", [stop - start, low - start if rows else 0, rows])
        digest = hashlib.sha256(before)
        digest.update(layout.tobytes())
        digest.update(self.ids[start:stop].tobytes())
        if rows and self.soft is not None:
            digest.update(self.soft[low - self.soft_start : high - self.soft_start].tobytes())
        return digest.digest()


def blocks_for(positions: int, block_size: int) -> int:
    """Blocks that hold this many positions."""
    return -(-positions // block_size)
