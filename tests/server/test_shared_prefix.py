"""Positions that many sequences share are read once for all of them, and nobody's answer depends on it."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from lopa_server.engine.base import GenerateRequest, InputSequence
from lopa_server.engine.content import Content
from lopa_server.engine.torch_engine.attention import Group, Score
from lopa_server.engine.torch_engine.engine import TorchEngine
from lopa_server.engine.torch_engine.kv_pool import KvPool
from lopa_server.engine.torch_engine.layout import Layout, LayoutMaker, Piece

from tests.server.engines import collect, load, run, soft_rows, stream, token_ids
from tests.tiny import build_tiny_fm

SYSTEM = token_ids(99, 100)


def _behind_system_prompt(count: int) -> list[GenerateRequest]:
    """Different soft prompts and own tokens; some leave off in the middle of a block, some share none of it."""
    requests = []
    for index in range(count):
        request = stream(f"r{index}", index, tokens=3 + 5 * (index % 4), rows=index % 6, max_tokens=4, logprobs=0)
        system = SYSTEM[: (100, 96, 70, 0)[index % 4]]
        soft = dataclasses.replace(request.input, before=system)
        requests.append(dataclasses.replace(request, input=soft))
    return requests


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "phi", "gpt2"])
def test_behind_a_cached_system_prompt_everybody_gets_what_each_gets_alone(family: str, tmp_path: Path) -> None:
    requests = _behind_system_prompt(12)

    async def scenario(engine: TorchEngine) -> None:
        alone = [await collect(engine, dataclasses.replace(one, cache_salt=one.id.encode())) for one in requests]
        assert engine.stats().prefix_hit_tokens == 0
        await collect(engine, dataclasses.replace(requests[0], id="first"))
        mixed = await asyncio.gather(*(collect(engine, one) for one in requests))
        assert engine.stats().prefix_hit_tokens > 6 * 64
        for one, other in zip(alone, mixed, strict=True):
            assert other.tokens == one.tokens
            np.testing.assert_allclose(other.logprobs, one.logprobs, atol=1e-4)

    run(load(build_tiny_fm(tmp_path, family=family)), scenario)


def _maker(*windows: int) -> LayoutMaker:
    return LayoutMaker(KvPool(60, 8), (0, *windows), torch.device("cpu"), torch.float32)


def _piece(table: list[int], start: int, count: int) -> Piece:
    return Piece(Content(b"", InputSequence(tuple(range(2, 2 + start + count)), None, ()), 8), table, start, count)


def _groups(layout: Layout) -> list[Group]:
    return [group for group in layout.groups if isinstance(group, Group)]


def test_sequences_of_like_length_read_what_they_share_once() -> None:
    system, other = list(range(1, 10)), list(range(20, 29))
    pieces = [
        _piece([*system, 40, 41], 72, 10),
        _piece([*other, 42, 43], 72, 10),
        _piece([*system, 44, 45], 75, 9),
        _piece([*other, 46], 72, 8),
    ]
    layout = _maker().pack(pieces)
    assert [group.size for group in _groups(layout)] == [2, 2]
    assert [None if group.shared is None else group.shared.tolist() for group in _groups(layout)] == [system, other]
    windowed = _maker(16).pack(pieces)
    assert all(group.shared is None for group in _groups(windowed))


def test_a_block_that_somebody_still_writes_to_is_not_shared() -> None:
    system = list(range(1, 10))
    layout = _maker().pack([_piece(system, 67, 5), _piece(system, 64, 5)])
    (group,) = _groups(layout)
    assert group.shared is not None
    assert group.shared.tolist() == system[:8]


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_behind_shared_positions_is_attention_over_both(heads: tuple[int, int], softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    size, width, own, border, e = 3, 5, 7, 200, 16

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    query, shared = draw(size, heads[0], width, e), (draw(heads[1], border, e), draw(heads[1], border, e))
    mine = (draw(size, heads[1], own, e), draw(size, heads[1], own, e))
    mask = torch.where(draw(size, 1, width, own) > 1, -torch.inf, 0.0)
    score = Score(e**-0.5, softcap, None)
    whole = [torch.cat([first.expand(size, -1, -1, -1), then], dim=2) for first, then in zip(shared, mine, strict=True)]
    expected = score(query, whole[0], whole[1], torch.nn.functional.pad(mask, (border, 0)))
    torch.testing.assert_close(score.behind(query, shared, mine, mask), expected, atol=1e-5, rtol=1e-5)


def test_a_long_prompt_read_in_pieces_reads_its_own_past_as_one() -> None:
    layout = _maker().pack([_piece(list(range(1, 30)), 200, 32)])
    (group,) = _groups(layout)
    assert group.shared is not None
    assert group.shared.tolist() == list(range(1, 26))
    assert group.slots is None


def test_soft_rows_in_the_shared_part_belong_to_one_user_only(tiny_fm: Path) -> None:
    """The same tokens behind different soft prompts at the front share nothing."""
    requests = []
    for index in range(6):
        request = stream(f"r{index}", 5, tokens=90, max_tokens=3, logprobs=0)
        requests.append(dataclasses.replace(request, input=dataclasses.replace(request.input, soft=soft_rows(index, 4))))

    async def scenario(engine: TorchEngine) -> None:
        alone = [await collect(engine, one) for one in requests]
        again = await asyncio.gather(*(collect(engine, one) for one in requests))
        assert engine.stats().prefix_hit_tokens > 6 * 64
        assert [one.tokens for one in again] == [one.tokens for one in alone]
        assert len({tuple(one.tokens) for one in alone}) > 1

    run(load(tiny_fm), scenario)
