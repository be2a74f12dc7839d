"""From what a client wrote to token ids, with the FM's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lopa_server.hub import resolve_folder


class ChatError(ValueError):
    """The FM's chat template refuses this conversation, or there is no template."""


class PromptTokenizer:
    """A Hugging Face tokenizer of its own, for one thread: encoding may change a tokenizer's settings in passing."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._longest = max((len(token.encode()) for token in tokenizer.get_vocab()), default=1)

    @classmethod
    def load(cls, fm: str | Path) -> PromptTokenizer:
        """Of a Hugging Face folder or id. Blocks. Raises FileNotFoundError, as `resolve_folder`."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(resolve_folder(fm), local_files_only=True))

    @property
    def has_chat(self) -> bool:
        """The FM has a chat template."""
        return bool(self._tokenizer.chat_template)

    def least_tokens(self, text: str) -> int:
        """A lower bound on the tokens of a text, without tokenizing: no token spells more bytes than the longest one.

        Refusing by this bound keeps an absurdly long text from taking up everybody's time.
        """
        return len(text) // self._longest

    def encode(self, text: str, *, special_tokens: bool) -> tuple[int, ...]:
        """Token ids. special_tokens: add what the tokenizer puts around a text, such as a begin-of-text token."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=special_tokens))

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Token ids of (role, content) turns with the assistant's turn opened.

        Raises:
            ChatError: no template, or the template refuses these turns.
        """
        from jinja2.exceptions import TemplateError

        if not self.has_chat:
            raise ChatError("this model has no chat template")
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise ChatError(f"the model's chat template refuses it: {error}") from error
        return self.encode(text, special_tokens=False)
