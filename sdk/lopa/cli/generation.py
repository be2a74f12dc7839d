"""`lopa generate`: every sampling parameter as an option."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lopa.cli.commands import Address, Json, PersonaName, Tls
from lopa.cli.connecting import open_client, open_persona
from lopa.cli.output import print_json, usage_error

if TYPE_CHECKING:
    from lopa.stream import GenerationStream
    from lopa.values import Placement


def generate(
    address: Address,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from; - reads standard input.", show_default=False)],
    personal: Annotated[Path | None, typer.Option(help="Answer as this user's folder has learnt.", show_default=False)] = None,
    persona: PersonaName = "default",
    prefix: Annotated[str | None, typer.Option(metavar="TEXT", help="What stands before the prompt.", show_default=False)] = None,
    after_prefix: Annotated[
        bool,
        typer.Option("--after-prefix", help="The soft prompt stands between the prefix and the prompt, as is right behind a long prefix."),
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Only the smallest set of tokens that holds this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Only so many of the likeliest tokens; 0 is all.")] = 0,
    min_p: Annotated[float, typer.Option(min=0, max=1, help="Only tokens at least this part as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages tokens of prompt and text.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Above 0 discourages tokens of the text.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, once for each time in the text.")] = 0.0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=BIAS", help="Add to a token's logit; may be repeated.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same text.", show_default=False)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.", show_default=False)] = None,
    logprobs: Annotated[int | None, typer.Option(min=0, help="With --json: alternatives per token.", show_default=False)] = None,
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="Go on past the model's end token.")] = False,
    n: Annotated[int, typer.Option("-n", min=1, help="Continuations; more than one needs a temperature.")] = 1,
    json_schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The text is JSON that satisfies this schema.", exists=True, dir_okay=False, show_default=False),
    ] = None,
    tls: Tls = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt, streaming the text as it comes."""
    from lopa.values import SamplingOptions

    text = sys.stdin.read() if prompt == "-" else prompt
    sampling: SamplingOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": _bias(logit_bias or ()),
        "seed": seed,
        "stop": stop or [],
        "logprobs": logprobs,
        "ignore_end": ignore_end,
        "n": n,
        "json_schema": _text(json_schema) if json_schema else None,
    }
    if after_prefix and (prefix is None or personal is None):
        usage_error("--after-prefix says where the soft prompt stands: give --prefix and --personal too")
    with open_client(address, tls) as client:
        if personal is None:
            _show(client.stream(text, prefix=prefix, **sampling), as_json=as_json, several=n > 1)
            return
        me = open_persona(client, personal, persona, plain=True)
        placement: Placement | None = "after_prefix" if after_prefix else None
        _show(me.stream(text, prefix=prefix, placement=placement, **sampling), as_json=as_json, several=n > 1)


def _show(stream: GenerationStream, *, as_json: bool, several: bool) -> None:
    """One text as it comes; several ones numbered, at the end."""
    with stream:
        for delta in stream:
            if not as_json and not several:
                print(delta.text, end="", flush=True)
    generation = stream.generation
    if as_json:
        print_json(generation)
        return
    if several:
        for number, one in enumerate((generation, *generation.others), 1):
            print(f"[{number}] {one.text}")
    else:
        print()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        usage_error(f"{path} is not UTF-8: {error}")


def _bias(entries: Sequence[str]) -> dict[int, float]:
    """From "ID=BIAS"; anything else is wrong usage."""
    bias = {}
    for entry in entries:
        token, _, value = entry.partition("=")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            usage_error(f"--logit-bias {entry}: it must be a token id and a number, such as 42=-1.5")
    return bias
