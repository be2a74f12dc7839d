"""A tenant that fills the batch, and what it owes the others meanwhile. Policy only: no tensor.

The crowd is the tenant with more than half of the places, or of those taken if it waits for more, while there are others.
It costs them time in two ways: its rows make every step longer, those that read above all, and whoever comes waits for the
running step. So

- a newcomer, of a tenant that has had less than the crowd and has no row that decodes, has its prompt read in a step
  without the crowd's rows; after such a step the crowd's have one in any case;
- while others are about, or were a little while ago, a step reads little of the crowd's prompts.

What is spared is done in the steps that follow; no place is empty because of it. Where nobody has so many places, as
with many tenants of a few streams each, and with a single tenant, nothing of this happens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from lopa_server.engine.sequences import SequenceState

MEMORY = 64
"""Steps for which others count as being about after the last one in which they were: who comes again and again finds short steps."""
PIECE = 1 / 8
"""Part of a step's positions that may be read of the crowd's prompts beside others. On a CPU it reads at about half its pace then."""


class Crowding:
    """Looks at the batch before every step."""

    def __init__(self, places: int) -> None:
        """places: of the batch."""
        self._places = places
        self._alone = MEMORY
        """Steps since there were others in the batch, or waiting."""
        self._gave_way = False
        """The last step was without the crowd."""
        self.tenant: str | None = None
        """The crowd, if there is one."""

    def look(self, batch: Collection[SequenceState], waiting: Iterable[str]) -> None:
        """When a step begins. waiting: whose requests would get a place next."""
        places, queue = Counter(sequence.tenant for sequence in batch), set(waiting)
        tenant, most = max(places.items(), key=lambda item: item[1], default=("", 0))
        self._alone = 0 if places.keys() | queue > {tenant} else min(self._alone + 1, MEMORY)
        wanted = len(batch) if tenant in queue else self._places
        self.tenant = tenant if 2 * most > wanted and self._alone < MEMORY else None

    def gives_way(self, newcomer: SequenceState | None, batch: Collection[SequenceState]) -> bool:
        """Whether this step is without the crowd. newcomer: whose prompt is read first, if its tenant has had less; it is in the batch."""
        last, self._gave_way = self._gave_way, False
        if newcomer is not None and newcomer.tenant != self.tenant and not last:
            self._gave_way = not any(row.tenant == newcomer.tenant and row.left == 1 and row is not newcomer for row in batch)
        return self._gave_way

    def allowance(self, positions: int) -> int:
        """Positions of the crowd's prompts in a step that has so many."""
        return max(1, int(positions * PIECE)) if self.tenant is not None else positions
