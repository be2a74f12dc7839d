"""Conversations: rendered by templates as models ship them, with and without a soft prompt, on the real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from lopa.v1 import common_pb2 as pb
from lopa.v1 import inference_pb2
from lopa.wire.tensors import soft_prompt_digest
from lopa_server.app import ServerConfig, start_server
from lopa_server.tokenizing import ChatError, PromptTokenizer
from transformers import AutoTokenizer

from tests.server.client import Client, failure, generate_request, soft_prompt
from tests.tiny import build_tiny_fm

CHATML = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""As Qwen2.5 ships it, without tools: special tokens, whitespace control, a default system turn."""
INSTRUCT = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""
"""As Mistral-7B-Instruct ships it: its own begin token, and exceptions for turns that it doesn't know."""
TURNS = [("user", "def add(a, b):"), ("assistant", "return a + b"), ("user", "and for three?")]


def _folder(place: Path, template: str) -> Path:
    """A tiny model whose tokenizer has the template and its special tokens."""
    folder = build_tiny_fm(place, vocab=420)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert len(tokenizer) <= 420, "the model has no embedding for the new tokens"
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Path]]:
    folder = _folder(tmp_path_factory.mktemp("chat") / "fm", CHATML)
    with start_server(ServerConfig(fm=folder, threads=1)) as server, grpc.insecure_channel(server.address) as channel:
        yield Client(channel), folder


def _chat(turns: list[tuple[str, str]]) -> pb.Prompt:
    return pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role=role, content=content) for role, content in turns]))


@pytest.mark.parametrize("turns", [TURNS, [("system", "Be brief."), *TURNS]], ids=["default system", "own system"])
def test_a_conversation_is_what_transformers_makes_of_it(chatml: tuple[Client, Path], turns: list[tuple[str, str]]) -> None:
    """The soft prompt stands before the first token of the rendered conversation."""
    client, folder = chatml
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": role, "content": content} for role, content in turns]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<|im_start|>"
    for soft in (None, soft_prompt(1)):
        asked, by_hand = generate_request(soft=soft), generate_request(soft=soft)
        asked.prompt.CopyFrom(_chat(turns))
        by_hand.prompt.CopyFrom(pb.Prompt(tokens=pb.TokenIds(ids=ids)))
        answer = client.generate(asked)
        assert [token for delta in answer for token in delta.token_ids] == client.tokens(by_hand)
        assert answer[-1].usage.prompt_tokens == len(ids)
        if soft is not None:
            assert answer[-1].receipt.soft_prompt_sha256 == soft_prompt_digest(soft) and answer[-1].receipt.offset == 0


def test_a_conversation_takes_a_schema_and_sampling_too(chatml: tuple[Client, Path]) -> None:
    client, _ = chatml
    request = generate_request(
        soft=soft_prompt(1), ignore_end=False, json_schema='{"enum": [1, 2]}', temperature=1, n=2, repetition_penalty=1.3
    )
    request.prompt.CopyFrom(_chat(TURNS))
    answers = client.generate(request)
    assert {"".join(delta.text for delta in answers if delta.index == index) for index in range(2)} <= {"1", "2"}


def test_turns_that_a_template_refuses_are_refused_with_its_words(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer(AutoTokenizer.from_pretrained(_folder(tmp_path / "fm", INSTRUCT)))
    ids = tokenizer.encode_chat(TURNS)
    assert ids[0] == 0 and 0 not in ids[1:3], "the begin token stands once: the template brings it"
    for turns, words in (([*TURNS, TURNS[0]], "must alternate"), ([("system", "x")], "must alternate|Only user")):
        with pytest.raises(ChatError, match=words):
            tokenizer.encode_chat(turns)


def test_a_model_without_a_template_says_so(client: Client) -> None:
    request = inference_pb2.GenerateRequest(prompt=_chat(TURNS))
    refused = failure(lambda: client.generate(request))
    assert (refused.code, refused.reason, refused.field) == (grpc.StatusCode.INVALID_ARGUMENT, "UNSUPPORTED", "prompt.chat")
    assert "no chat template" in refused.found
