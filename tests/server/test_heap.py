"""A served process's heap: long collections are spared, and what has died can still go."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
from lopa_server import heap


class Node:
    """Part of a cycle."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_was_settled_goes_when_it_has_died_and_the_rest_stays_settled() -> None:
    node = Node()
    died = weakref.ref(node)
    heap.settle()
    del node
    gc.collect()
    assert died() is not None
    with heap.unsettled():
        assert died() is None
        assert gc.get_freeze_count() == 0
    assert gc.get_freeze_count() > 0


def test_a_process_that_has_not_settled_is_left_so() -> None:
    with heap.unsettled():
        pass
    assert gc.get_freeze_count() == 0
