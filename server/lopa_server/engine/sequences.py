"""A sequence as the scheduler sees it: how long it is, how much of it is computed, and in which blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from lopa_server.engine.block_manager import BlockManager
from lopa_server.engine.content import Content, blocks_for


@dataclass
class SequenceState:
    """One generate request, from arrival to its last token."""

    id: str
    content: Content
    tenant: str = ""
    max_tokens: int = 0
    """Tokens that it may generate."""
    charged: int = 0
    """Positions of its input that its tenant was charged for: being computed again after a preemption costs nothing."""
    table: list[int] = field(default_factory=list)
    """Its blocks, in order of position."""
    computed: int = 0
    """Positions whose keys and values are in its blocks."""
    published: int = 0
    """Full blocks that were offered to the prefix cache."""

    def __post_init__(self) -> None:
        self._prompt = len(self.content)

    @property
    def left(self) -> int:
        """Positions that are known and not computed; 1 while it decodes."""
        return len(self.content) - self.computed

    def adopt(self, blocks: BlockManager) -> int:
        """Take over what the prefix cache has of this sequence, but for its last position. Positions found."""
        size = blocks.block_size
        found = blocks.find(self.content.each_key(len(self.content) - 1))
        blocks.share(found)
        self.table, self.computed, self.published = found, len(found) * size, len(found)
        return self.computed

    def missing(self, blocks: BlockManager, end: int) -> int:
        """Blocks that positions up to `end` need beyond the table."""
        return max(0, blocks_for(end, blocks.block_size) - len(self.table))

    def advance(self, blocks: BlockManager, count: int) -> None:
        """The next `count` positions are being computed, in blocks that the table has. Offer what that fills."""
        self.computed += count
        for block in range(self.published, self.computed // blocks.block_size):
            blocks.publish(self.table[block], self.content.key(block))
        self.published = self.computed // blocks.block_size

    def unpaid(self, count: int) -> int:
        """How many of the next `count` positions belong to the input and are computed for the first time."""
        end = min(self.computed + count, self._prompt)
        fresh = max(0, end - max(self.computed, self.charged))
        self.charged = max(self.charged, end)
        return fresh

    def leave(self, blocks: BlockManager) -> None:
        """Give up all blocks; everything would have to be computed again."""
        blocks.release(self.table)
        self.table, self.computed, self.published = [], 0, 0
