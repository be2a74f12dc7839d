"""Blocks and prefix keys, without a model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lopa_server.engine.base import InputSequence
from lopa_server.engine.block_manager import BlockManager
from lopa_server.engine.content import CacheScope, Content

from tests.server.engines import soft_rows, token_ids

SIZE = 8


def _content(sequence: InputSequence, *, revision: str = "fm", dtype: str = "float32", salt: bytes = b"") -> Content:
    return Content(CacheScope(revision, dtype).root(salt), sequence, SIZE)


def test_everything_that_a_block_depends_on_changes_its_key() -> None:
    rows, ids = soft_rows(1, 4), token_ids(1, 20)
    sequence = InputSequence(ids[:6], rows, ids[6:])
    key = _content(sequence).key(1)
    assert _content(InputSequence(ids[:6], rows.copy(), ids[6:])).key(1) == key
    nudged = rows.copy()
    nudged[3, 31] = np.nextafter(nudged[3, 31], np.float32(9))
    others = [
        _content(dataclasses.replace(sequence, soft=nudged)),
        _content(InputSequence(ids[:5], rows, ids[5:])),
        _content(InputSequence((), rows, ids)),
        _content(InputSequence((ids[0] + 1, *ids[1:6]), rows, ids[6:])),
        _content(sequence, salt=b"somebody else"),
        _content(sequence, dtype="bfloat16"),
        _content(sequence, revision="fm2"),
    ]
    keys = {other.key(1) for other in others}
    assert len(keys) == len(others) and key not in keys


def test_a_soft_position_is_no_token_with_id_zero() -> None:
    soft = _content(InputSequence((), np.zeros((1, 4), np.float32), (5,) * 7))
    plain = _content(InputSequence((0,) + (5,) * 7, None, ()))
    assert soft.key(0) != plain.key(0)


def test_scope_parts_do_not_run_into_each_other() -> None:
    assert CacheScope("ab", "c").root(b"d") != CacheScope("a", "bc").root(b"d")


def test_a_filled_part_of_a_block_is_not_the_block() -> None:
    content = _content(InputSequence((), None, token_ids(1, 16)))
    assert content.keys_to(12)[0] == content.key(0)
    assert len({content.keys_to(end)[1] for end in range(9, 17)}) == 8
    assert content.keys_to(16) == content.keys(16)


def test_generated_tokens_are_part_of_the_chain() -> None:
    ids = token_ids(3, 24)
    grown = _content(InputSequence((), None, ids[:10]))
    for token in ids[10:]:
        grown.append(token)
    assert grown.keys(24) == _content(InputSequence((), None, ids)).keys(24)


def test_cached_blocks_go_in_the_order_of_their_last_use_and_tails_first() -> None:
    manager = BlockManager(4, SIZE)
    table = manager.take(4)
    for number, block in enumerate(table):
        manager.publish(block, b"%d" % number)
    manager.release(table[2:])
    manager.release(table[:2])
    assert (manager.free, manager.cached, manager.used) == (4, 4, 0)
    assert manager.take(2) == [table[3], table[2]]
    assert manager.find([b"0", b"1", b"2"]) == table[:2]
    assert manager.take(1) == [table[1]]
    assert manager.find([b"0", b"1"]) == table[:1]
    with pytest.raises(MemoryError, match="2 blocks wanted, 1"):
        manager.take(2)


def test_withdrawn_blocks_are_never_shared_again() -> None:
    manager = BlockManager(3, SIZE)
    held = manager.take(2)
    for block, key in zip(held, (b"a", b"b"), strict=True):
        manager.publish(block, key)
    manager.release(held[1:])
    manager.withdraw(held)
    assert manager.find([b"a"]) == [] == manager.find([b"b"])
    manager.release(held[:1])
    assert (manager.free, manager.cached) == (3, 0)


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "publish", "release", "withdraw"]), st.integers(0, 99)), max_size=120))
def test_no_block_is_lost_or_handed_out_twice(actions: list[tuple[str, int]]) -> None:
    manager = BlockManager(12, SIZE)
    held: list[int] = []
    for number, (action, pick) in enumerate(actions):
        if action == "take" and manager.free:
            fresh = manager.take(1 + pick % min(3, manager.free))
            assert not set(fresh) & set(held) and 0 not in fresh
            held += fresh
        elif action == "publish" and held:
            manager.publish(held[pick % len(held)], b"%d" % (number % 7))
        elif action == "share":
            found = manager.find([b"%d" % (pick % 7)])
            free = manager.free - manager.idle(found)
            manager.share(found)
            assert manager.free == free
            held += found
        elif action == "release" and held:
            manager.release([held.pop(pick % len(held))])
        elif action == "withdraw" and held:
            manager.withdraw(held[:1])
        assert manager.used == len(set(held))
        assert manager.used + manager.free == manager.total
    manager.release(held)
    assert manager.used == 0 and len(set(manager.take(manager.total))) == manager.total
