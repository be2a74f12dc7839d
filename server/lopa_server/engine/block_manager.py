"""Who holds which block of the key-value pool, and which free blocks still hold a prefix that somebody may want again.

Policy only: blocks are numbers, contents are keys (see `content`). Block 0 is never given out. It stays zero, and stands
wherever a table has no block.

A block is either free and empty, free but cached (content known under a key, oldest use first to go), or used by one or
several sequences. A used block with a key is shared by everybody who asks for that key; its content never changes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockManager:
    """Reference counts and the prefix cache over a pool of `blocks` blocks, block 0 not counted."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.total = blocks
        self._empty = list(range(blocks, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._references: dict[int, int] = {}
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return len(self._references)

    @property
    def cached(self) -> int:
        """Free blocks that may still serve as a prefix."""
        return len(self._cached)

    @property
    def free(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self._empty) + len(self._cached)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known run of keys. Nothing is held yet."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of these blocks are free: sharing them takes them from `free`."""
        return sum(block not in self._references for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that `find` has named."""
        for block in blocks:
            self._cached.pop(block, None)
            self._references[block] = self._references.get(block, 0) + 1

    def take(self, count: int) -> list[int]:
        """Hold this many fresh blocks: empty ones first, then the cached ones that were not used for longest.

        Raises:
            MemoryError: fewer are free; nothing was taken.
        """
        if count > self.free:
            raise MemoryError(f"{count} blocks wanted, {self.free} are free")
        taken = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        self._references.update(dict.fromkeys(taken, 1))
        return taken

    def publish(self, block: int, key: bytes) -> None:
        """What this block holds. Where the key is known already, the first block stays the one to share."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Never share these blocks again: their content can't be relied upon."""
        for block in blocks:
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]
            if block in self._cached:
                del self._cached[block]
                self._empty.append(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Give up a sequence's hold on its table. The last blocks are the first to be reused: prefixes live longer."""
        for block in reversed(blocks):
            left = self._references[block] - 1
            if left:
                self._references[block] = left
                continue
            del self._references[block]
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._empty.append(block)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
