"""Text out of a stream of token ids: whole characters only, possible stop strings held back. Work per token is bounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
PENDING_BYTES = 3
"""A UTF-8 character has up to 4 bytes, so at most 3 of them can be waiting for the rest."""
WINDOW = 32
"""Tokens decoded together at most: a model that spells invalid bytes for ever must not cost more and more."""
Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Turns ids into text piece by piece; all pieces together are what decoding all ids at once gives.

    A few ids before the new ones are decoded along, since a tokenizer may treat the first token of a text differently
    (a leading space) and may spell one character with several tokens.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0
        """How many of _ids were completely sent; they are decoded along as context."""
        self._sent = ""
        """The part of decode(_ids) that was sent."""

    def push(self, token_id: int) -> str:
        """The characters that became certain with this token; often none or several."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        pending = len(text) - len(text.rstrip(REPLACEMENT))
        overflow = len(self._ids) > WINDOW
        if pending and not overflow and not text.startswith(self._sent):
            return ""  # byte-fallback decoders spell a whole run of bytes as U+FFFD until its last character is complete
        piece = text[len(self._sent) : len(text) - min(pending, PENDING_BYTES)]
        self._sent = text[: len(self._sent) + len(piece)]
        if not pending:
            self._restart(self._context, held=0)
            self._context = len(self._ids)
        elif overflow:
            self._restart(len(self._ids) - PENDING_BYTES - 1, held=len(text) - len(self._sent))
            self._context = 0
        return piece

    def finish(self) -> str:
        """What was held back: an incomplete character is shown as U+FFFD."""
        text = self._decode(self._ids)
        piece, self._sent = text[len(self._sent) :], text
        return piece

    def _restart(self, start: int, held: int) -> None:
        """Drop the ids before `start` from the window; `held` characters at its end are not sent yet."""
        self._ids = self._ids[start:]
        text = self._decode(self._ids)
        self._sent = text[: max(0, len(text) - held)]


class StopChecker:
    """Passes text on up to the first stop string, holding back an end that may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._longest = max((len(text) for text in self._stop), default=0)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Text that is safe to send. Sets `stopped` when a stop string appeared; it and what follows are dropped."""
        if not self._stop:
            return piece
        text = self._held + piece
        found = [index for index in (text.find(stop) for stop in self._stop) if index >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, now that no stop string can follow."""
        text, self._held = self._held, ""
        return text

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0


class TextStream:
    """A request's text: detokenizer and stop strings together."""

    def __init__(self, decode: Decode, stop: Sequence[str]) -> None:
        self._tokens = Detokenizer(decode)
        self._stops = StopChecker(stop)

    @property
    def stopped(self) -> bool:
        """A stop string appeared."""
        return self._stops.stopped

    def push(self, token_id: int) -> str:
        """Text that this token made certain."""
        return self._stops.push(self._tokens.push(token_id))

    def finish(self) -> str:
        """The rest, at the end of the stream. May still find a stop string in it."""
        piece = self._stops.push(self._tokens.finish())
        return piece if self.stopped else piece + self._stops.finish()
