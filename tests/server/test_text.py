"""Streaming text: whole characters only, stop strings found across tokens, and all deltas together are the whole text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lopa_server.engine.base import Finish
from lopa_server.engine.text import Detokenizer, StopChecker, TextStream
from tokenizers import Tokenizer, decoders, models

from tests.server.engines import collect, load, run, stream
from tests.tiny import train_tokenizer

BYTES = train_tokenizer(300)


def _bytes_tokenizer() -> Tokenizer:
    """One token per byte, decoded as SentencePiece models with byte fallback do it."""
    vocab = {f"<0x{value:02X}>": value for value in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


FALLBACK = _bytes_tokenizer()


@given(st.text())
def test_pieces_make_up_the_text(text: str) -> None:
    ids = BYTES.encode(text).ids
    detokenizer = Detokenizer(BYTES.decode)
    pieces = [detokenizer.push(token) for token in ids]
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces), "half a character was sent"
    assert "".join(pieces) + detokenizer.finish() == text


@given(st.text(st.characters(exclude_characters="\N{REPLACEMENT CHARACTER}", exclude_categories=["Cs"])))
def test_pieces_of_single_bytes_make_up_the_text(text: str) -> None:
    detokenizer = Detokenizer(FALLBACK.decode)
    pieces = [detokenizer.push(value) for value in text.encode()]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.finish() == text


@given(st.lists(st.integers(2, 257), max_size=120))
def test_bytes_that_spell_nothing_cost_a_bounded_window(ids: list[int]) -> None:
    seen = []

    def decode(window: list[int]) -> str:
        seen.append(len(window))
        return BYTES.decode(window)

    detokenizer = Detokenizer(decode)
    text = "".join(detokenizer.push(token) for token in ids) + detokenizer.finish()
    assert max(seen, default=0) <= 70
    assert text.replace("\N{REPLACEMENT CHARACTER}", "") == BYTES.decode(ids).replace("\N{REPLACEMENT CHARACTER}", "")


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str], data: st.DataObject) -> None:
    checker, sent, position = StopChecker(stop), "", 0
    while position < len(text) and not checker.stopped:
        size = data.draw(st.integers(1, 3))
        sent += checker.push(text[position : position + size])
        position += size
        ends = [text.find(one) for one in stop if text.find(one) >= 0]
        assert text.startswith(sent) and (not ends or len(sent) <= min(ends) or sent == text[: len(sent)])
    found = [text.find(one) for one in stop if one in text[:position]]
    assert checker.stopped == bool(found)
    if not found:
        assert sent + checker.finish() == text
    else:
        assert not any(one in sent for one in stop)


def test_a_stop_string_across_tokens_is_never_sent_in_part() -> None:
    ids = BYTES.encode("return a + b\nEND of it").ids
    stream_text = TextStream(BYTES.decode, ["\nEND", "never"])
    sent = []
    for token in ids:
        sent.append(stream_text.push(token))
        if stream_text.stopped:
            break
    assert stream_text.stopped and "".join(sent) == "return a + b"


def test_what_only_looked_like_a_stop_string_is_sent_in_the_end() -> None:
    text = TextStream(BYTES.decode, ["\n\n"])
    sent = "".join(text.push(token) for token in BYTES.encode("a\n").ids)
    assert sent == "a" and text.finish() == "\n" and not text.stopped


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_the_engine_stops_at_a_string_of_its_own_text(tiny_fm: Path, cut: int) -> None:
    engine = load(tiny_fm)
    free = run(engine, lambda engine: collect(engine, stream("free", 4, max_tokens=40)))
    stop = free.text[cut : cut + 3]
    stopped = run(load(tiny_fm), lambda engine: collect(engine, stream("stop", 4, max_tokens=40, stop=(stop,))))
    assert stopped.finish is Finish.STOP
    assert stopped.text == free.text[: free.text.index(stop)]
    assert len(stopped.tokens) < 40 and stopped.tokens == free.tokens[: len(stopped.tokens)]
