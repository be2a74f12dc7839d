"""Several continuations of one prompt in one stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import grpc
from lopa.v1 import inference_pb2
from lopa.wire.tensors import soft_prompt_digest
from lopa_server.app import RunningServer, ServerConfig, start_server
from lopa_server.engine.randomness import continuation_seed

from tests.server.client import Client, failure, generate_request, soft_prompt


def _texts(deltas: Sequence[inference_pb2.GenerateResponse], count: int) -> list[list[int]]:
    """Token ids of each continuation."""
    tokens: list[list[int]] = [[] for _ in range(count)]
    for delta in deltas:
        tokens[delta.index] += delta.token_ids
    return tokens


def test_continuations_are_what_their_seeds_give_alone(client: Client) -> None:
    fields = {"soft": soft_prompt(2), "temperature": 1.5, "max_tokens": 20, "presence_penalty": 1.0, "top_p": 0.95}
    deltas = client.generate(generate_request(**fields, seed=5, n=4))
    found = _texts(deltas, 4)
    assert found == [client.tokens(generate_request(**fields, seed=continuation_seed(5, index))) for index in range(4)]
    assert len({tuple(tokens) for tokens in found}) == 4


def test_each_ends_by_itself_and_the_last_message_tells_the_rest(client: Client) -> None:
    soft = soft_prompt(3)
    deltas = client.generate(generate_request(soft=soft, temperature=3, max_tokens=40, seed=1, n=6, ignore_end=False))
    ends = [delta.index for delta in deltas if delta.finish_reason]
    assert sorted(ends) == list(range(6))
    for index in ends:
        own = [delta for delta in deltas if delta.index == index]
        assert own[-1].finish_reason and not any(delta.finish_reason for delta in own[:-1])
    *others, last = deltas
    assert not any(delta.HasField("usage") or delta.HasField("receipt") for delta in others)
    assert last.receipt.soft_prompt_sha256 == soft_prompt_digest(soft)
    assert last.usage.completion_tokens == sum(map(len, _texts(deltas, 6)))
    assert last.usage.prompt_tokens == client.generate(generate_request(soft=soft))[-1].usage.prompt_tokens


def test_leaving_frees_all_of_them(server: RunningServer, client: Client) -> None:
    call = client.inference.Generate(generate_request(temperature=1, max_tokens=480, n=3))
    next(call)
    call.cancel()
    engine = server.app.engine
    while engine.stats().running or engine.stats().waiting:
        client.tokens(generate_request(max_tokens=1))
    assert engine.stats().aborted >= 3


def test_all_find_room_or_none(tiny_fm: Path) -> None:
    config = ServerConfig(fm=tiny_fm, threads=1, max_batch=1, max_waiting=2)
    with start_server(config) as server, grpc.insecure_channel(server.address) as channel:
        client = Client(channel)
        refused = failure(lambda: client.tokens(generate_request(temperature=1, max_tokens=400, n=4)))
        assert refused.reason == "QUEUE_FULL" and refused.retry_seconds
        assert len(client.tokens(generate_request(temperature=1, max_tokens=5, n=3))) == 15
