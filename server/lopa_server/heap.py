"""The heap of a process that serves: what stays there is left out of garbage collection.

A full collection goes through all of torch with the interpreter held, for a tenth of a second or two in which nobody gets a token.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def settle() -> None:
    """Collect what there is, and leave the rest out from now on. Of the whole process: for those that only serve."""
    gc.collect()
    gc.freeze()


@contextmanager
def unsettled() -> Iterator[None]:
    """Whatever is garbage has been collected inside, cycles of what was settled too; afterwards all is settled again, if it was."""
    settled = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    try:
        yield
    finally:
        if settled:
            settle()
