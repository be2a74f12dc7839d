"""Checks prompts, prefixes and targets, and turns them into token ids."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from lopa.v1 import common_pb2 as pb
from lopa.wire.errors import Reason, WireError

from lopa_server.engine.base import EngineSpec
from lopa_server.tokenizing import ChatError, PromptTokenizer

ROLES = ("system", "user", "assistant")
Ids = tuple[int, ...]


@contextlib.contextmanager
def below(field: str) -> Iterator[None]:
    """Put a field path in front of that of a WireError raised inside."""
    try:
        yield
    except WireError as error:
        raise error.at(field) from error


class PromptChecker:
    """Knows one FM's tokenizer, vocabulary and context."""

    def __init__(self, spec: EngineSpec, tokenizer: PromptTokenizer) -> None:
        self._spec = spec
        self._tokenizer = tokenizer

    def prompt(self, message: pb.Prompt, *, first: bool, chat: bool = True) -> Ids:
        """Token ids of a prompt or prefix, at least one if it is the first.

        Args:
            first: nothing but a soft prompt stands before it, so it must not be empty, and a text begins with the tokenizer's
                special tokens.
            chat: a conversation is allowed here.
        """
        form = message.WhichOneof("content")
        if form is None:
            raise WireError(Reason.MISSING_FIELD, "content")
        if form == "chat":
            if not chat:
                raise WireError(Reason.UNSUPPORTED, "chat", found="a prefix must be text or tokens")
            return self._chat(message.chat)
        empty = not message.text if form == "text" else not message.tokens.ids
        if empty and not first:
            return ()
        if empty:
            raise WireError(Reason.EMPTY_PROMPT, form, limit=1)
        return self._text(message.text, special_tokens=first) if form == "text" else self._ids(message.tokens)

    def target(self, message: pb.Target) -> Ids:
        """Token ids of a target, at least one, its end token included."""
        form = message.WhichOneof("content")
        if form is None:
            raise WireError(Reason.MISSING_FIELD, "content")
        ids = self._text(message.text, special_tokens=False) if form == "text" else self._ids(message.tokens)
        if message.append_end:
            if not self._spec.end_ids:
                raise WireError(Reason.UNSUPPORTED, "append_end", found="this model has no end-of-sequence token")
            ids = (*ids, self._spec.end_ids[0])
        if not ids:
            raise WireError(Reason.EMPTY_TARGET, form, limit=1)
        return ids

    def _text(self, text: str, *, special_tokens: bool) -> Ids:
        least = self._tokenizer.least_tokens(text)
        if least > self._spec.context_length:
            raise WireError(Reason.CONTEXT_EXCEEDED, "text", limit=self._spec.context_length, found=f"at least {least}")
        return self._tokenizer.encode(text, special_tokens=special_tokens)

    def _ids(self, message: pb.TokenIds) -> Ids:
        if len(message.ids) > self._spec.context_length:
            raise WireError(Reason.CONTEXT_EXCEEDED, "tokens.ids", limit=self._spec.context_length, found=len(message.ids))
        ids = np.fromiter(message.ids, dtype=np.int64, count=len(message.ids))
        wrong = np.flatnonzero(ids >= self._spec.vocab_size)
        if wrong.size:
            raise WireError(Reason.UNKNOWN_TOKEN, f"tokens.ids[{wrong[0]}]", limit=self._spec.vocab_size, found=ids[wrong[0]])
        return tuple(ids.tolist())

    def _chat(self, chat: pb.Chat) -> Ids:
        if not chat.messages:
            raise WireError(Reason.EMPTY_PROMPT, "chat.messages", limit=1)
        for index, message in enumerate(chat.messages):
            if message.role not in ROLES:
                raise WireError(Reason.OUT_OF_RANGE, f"chat.messages[{index}].role", limit=f"one of {', '.join(ROLES)}", found=message.role)
        least = sum(self._tokenizer.least_tokens(message.content) for message in chat.messages)
        if least > self._spec.context_length:
            raise WireError(Reason.CONTEXT_EXCEEDED, "chat", limit=self._spec.context_length, found=f"at least {least}")
        try:
            return self._tokenizer.encode_chat([(message.role, message.content) for message in chat.messages])
        except ChatError as error:
            raise WireError(Reason.UNSUPPORTED, "chat", found=error) from error
