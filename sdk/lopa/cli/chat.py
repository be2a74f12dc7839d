"""`lopa chat`: a conversation in the terminal, streamed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lopa.cli.commands import Address, PersonaName, Tls
from lopa.cli.connecting import open_client, open_persona

if TYPE_CHECKING:
    from lopa.stream import GenerationStream
    from lopa.values import Prompt

HELP = "/reset begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer."


def chat(
    address: Address,
    personal: Annotated[Path | None, typer.Option(help="Answer as this user's folder has learnt.", show_default=False)] = None,
    persona: PersonaName = "default",
    system: Annotated[str | None, typer.Option(help="What the model is told first.", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of an answer at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    tls: Tls = False,
) -> None:
    """Talk with the model; a model without a chat template goes on with the text instead."""
    with open_client(address, tls) as client:
        who = client if personal is None else open_persona(client, personal, persona)
        talk: Conversation | Text = Conversation(system) if "chat" in client.model.features else Text(system or "")
        print(f"{client.model.name}: {talk.kind} {HELP}", file=sys.stderr)
        _loop(talk, lambda prompt: who.stream(prompt, max_tokens=max_tokens, temperature=temperature))


class Conversation:
    """Turns, for a model with a chat template."""

    kind = "A conversation."

    def __init__(self, system: str | None) -> None:
        self._first = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []

    def say(self, line: str) -> Prompt:
        self._turns.append({"role": "user", "content": line})
        return [*self._first, *self._turns]

    def answered(self, text: str) -> None:
        self._turns.append({"role": "assistant", "content": text})

    def shorten(self) -> Prompt | None:
        """Forget the oldest question and its answer; None when there is nothing left to forget."""
        if len(self._turns) < 3:
            return None
        del self._turns[:2]
        return [*self._first, *self._turns]

    def reset(self) -> None:
        self._turns.clear()


class Text:
    """One text that you and the model write in turn."""

    kind = "It has no chat template: it goes on with the text that you both write."

    def __init__(self, first: str) -> None:
        self._first = self._text = first

    def say(self, line: str) -> Prompt:
        self._text += line + "\n"
        return self._text

    def answered(self, text: str) -> None:
        self._text += text + "\n"

    def shorten(self) -> Prompt | None:
        """Forget the first half."""
        if len(self._text) < 2:
            return None
        self._text = self._text[len(self._text) // 2 :]
        return self._text

    def reset(self) -> None:
        self._text = self._first


def _loop(talk: Conversation | Text, ask: Callable[[Prompt], GenerationStream]) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lines can be edited and called back
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip() == "/quit":
            return
        if line.strip() == "/reset":
            talk.reset()
        elif line.strip():
            talk.answered(_answer(talk, talk.say(line), ask))


def _answer(talk: Conversation | Text, prompt: Prompt, ask: Callable[[Prompt], GenerationStream]) -> str:
    """Print an answer as it comes; what was said of it when it is stopped counts too."""
    from lopa.errors import InvalidRequest
    from lopa.wire.errors import Reason

    text = ""
    while True:
        try:
            with ask(prompt) as stream:
                for delta in stream:
                    print(delta.text, end="", flush=True)
                    text += delta.text
        except InvalidRequest as error:
            shorter = talk.shorten() if error.reason is Reason.CONTEXT_EXCEEDED else None
            if shorter is None:
                raise
            print("(the oldest part is forgotten: the context is full)", file=sys.stderr)
            prompt = shorter
            continue
        except KeyboardInterrupt:
            pass
        print()
        return text
