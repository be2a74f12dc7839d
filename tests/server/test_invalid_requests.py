"""Bad input gets its typed error, naming field and limit; a healthy neighbour's stream doesn't notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from lopa.v1 import catalog_pb2, inference_pb2, tuning_pb2
from lopa.v1 import common_pb2 as pb
from lopa.wire.tensors import soft_prompt_message
from lopa_server.app import RunningServer

from tests.server.client import HIDDEN, Client, failure, generate_request, pair, rows, soft_prompt

Request = inference_pb2.GenerateRequest
Case = tuple[Callable[[], Any], str, str, str]


def _floats(value: float) -> pb.SoftPrompt:
    """One value of an otherwise good soft prompt replaced."""
    values = rows(1)
    values[2, 5] = value
    return soft_prompt_message(values)


def _generate(**fields: Any) -> Request:
    request = generate_request(soft=soft_prompt(1))
    request.MergeFrom(Request(**fields))
    return request


def _sampling(**fields: Any) -> Request:
    return generate_request(**fields)


def _pairs(*pairs: pb.Pair, **fields: Any) -> tuning_pb2.PromptGradientsRequest:
    return tuning_pb2.PromptGradientsRequest(pairs=pairs, **fields)


def _scores(*pairs: pb.Pair) -> inference_pb2.ScoreRequest:
    return inference_pb2.ScoreRequest(pairs=pairs)


INFINITE_SCALE = np.array([np.inf, 1, 1, 1], dtype="<f4").tobytes()
NEGATIVE_SCALE = np.array([-1, 1, 1, 1], dtype="<f4").tobytes()
BYTES = 4 * HIDDEN * 4
CASES: dict[str, Case] = {
    # soft prompts
    "hidden": (lambda: generate_request(soft=soft_prompt(1, hidden=HIDDEN - 1)), "SOFT_PROMPT_HIDDEN", "soft_prompt.hidden", str(HIDDEN)),
    "one hidden": (
        lambda: generate_request(soft=soft_prompt(1, hidden=1, data=b"\0" * 16)),
        "SOFT_PROMPT_HIDDEN",
        "soft_prompt.hidden",
        str(HIDDEN),
    ),
    "too few bytes": (
        lambda: generate_request(soft=soft_prompt(1, data=b"\0" * (BYTES - 1))),
        "SOFT_PROMPT_BYTES",
        "soft_prompt.data",
        str(BYTES),
    ),
    "too many bytes": (
        lambda: generate_request(soft=soft_prompt(1, data=b"\0" * (BYTES + 4))),
        "SOFT_PROMPT_BYTES",
        "soft_prompt.data",
        str(BYTES),
    ),
    "declared far larger": (
        lambda: generate_request(soft=soft_prompt(1, rows=2**32 - 1)),
        "SOFT_PROMPT_ROWS",
        "soft_prompt.rows",
        "from 1 to 64",
    ),
    "scales without need": (
        lambda: generate_request(soft=soft_prompt(1, scales=b"\0" * 16)),
        "SOFT_PROMPT_BYTES",
        "soft_prompt.scales",
        "0",
    ),
    "no scales": (
        lambda: generate_request(soft=soft_prompt(1, dtype=pb.DTYPE_I8, data=b"\1" * 4 * HIDDEN)),
        "SOFT_PROMPT_BYTES",
        "soft_prompt.scales",
        "16",
    ),
    "infinite scale": (
        lambda: generate_request(soft=soft_prompt(1, dtype=pb.DTYPE_I8, data=b"\1" * 4 * HIDDEN, scales=INFINITE_SCALE)),
        "SOFT_PROMPT_NOT_FINITE",
        "soft_prompt.data",
        "float32",
    ),
    "negative scale": (
        lambda: generate_request(soft=soft_prompt(1, dtype=pb.DTYPE_I8, data=b"\1" * 4 * HIDDEN, scales=NEGATIVE_SCALE)),
        "OUT_OF_RANGE",
        "soft_prompt.scales",
        "finite and not negative",
    ),
    "nan": (lambda: generate_request(soft=_floats(np.nan)), "SOFT_PROMPT_NOT_FINITE", "soft_prompt.data", "float32"),
    "infinite": (lambda: generate_request(soft=_floats(-np.inf)), "SOFT_PROMPT_NOT_FINITE", "soft_prompt.data", "float32"),
    "norm": (lambda: generate_request(soft=_floats(1e6)), "SOFT_PROMPT_NORM", "soft_prompt.data", ""),
    "norm overflows": (lambda: generate_request(soft=_floats(3e38)), "SOFT_PROMPT_NORM", "soft_prompt.data", ""),
    "no rows": (lambda: generate_request(soft=soft_prompt(1, rows=0, data=b"")), "SOFT_PROMPT_ROWS", "soft_prompt.rows", "from 1 to 64"),
    "too many rows": (lambda: generate_request(soft=soft_prompt(1, 65)), "SOFT_PROMPT_ROWS", "soft_prompt.rows", "from 1 to 64"),
    "no dtype": (lambda: generate_request(soft=soft_prompt(1, dtype=0)), "SOFT_PROMPT_DTYPE", "soft_prompt.dtype", "F32, F16, BF16, I8"),
    "unknown dtype": (
        lambda: generate_request(soft=soft_prompt(1, dtype=99)),
        "SOFT_PROMPT_DTYPE",
        "soft_prompt.dtype",
        "F32, F16, BF16, I8",
    ),
    "unknown placement": (
        lambda: generate_request(soft=soft_prompt(1, placement=9)),
        "OUT_OF_RANGE",
        "soft_prompt.placement",
        "PLACEMENT_FRONT or PLACEMENT_AFTER_PREFIX",
    ),
    # prompts
    "wrong fingerprint": (lambda: _generate(fm_fingerprint="0" * 64), "FINGERPRINT_MISMATCH", "fm_fingerprint", ""),
    "no prompt": (lambda: Request(), "MISSING_FIELD", "prompt", ""),
    "no form": (lambda: Request(prompt=pb.Prompt()), "MISSING_FIELD", "prompt.content", ""),
    "empty text": (lambda: generate_request(""), "EMPTY_PROMPT", "prompt.text", "1"),
    "empty tokens": (lambda: Request(prompt=pb.Prompt(tokens=pb.TokenIds())), "EMPTY_PROMPT", "prompt.tokens", "1"),
    "empty prefix": (lambda: _generate(prefix=pb.Prompt(text="")), "EMPTY_PROMPT", "prefix.text", "1"),
    "chat as prefix": (
        lambda: _generate(prefix=pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="x")]))),
        "UNSUPPORTED",
        "prefix.chat",
        "",
    ),
    "unknown token": (lambda: Request(prompt=pb.Prompt(tokens=pb.TokenIds(ids=[5, 300]))), "UNKNOWN_TOKEN", "prompt.tokens.ids[1]", "300"),
    "text over the context": (lambda: generate_request("x = y\n" * 400), "CONTEXT_EXCEEDED", "prompt", "512"),
    "endless text": (lambda: generate_request("x" * 1_000_000), "CONTEXT_EXCEEDED", "prompt.text", "512"),
    "tokens over the context": (
        lambda: Request(prompt=pb.Prompt(tokens=pb.TokenIds(ids=[5] * 513))),
        "CONTEXT_EXCEEDED",
        "prompt.tokens.ids",
        "512",
    ),
    "no room to generate": (lambda: generate_request(max_tokens=510), "CONTEXT_EXCEEDED", "prompt", "512"),
    "chat without a template": (
        lambda: Request(prompt=pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="x")]))),
        "UNSUPPORTED",
        "prompt.chat",
        "",
    ),
    "empty chat": (lambda: Request(prompt=pb.Prompt(chat=pb.Chat())), "EMPTY_PROMPT", "prompt.chat.messages", "1"),
    "unknown role": (
        lambda: Request(prompt=pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="tool")]))),
        "OUT_OF_RANGE",
        "prompt.chat.messages[0].role",
        "one of system, user, assistant",
    ),
    # sampling
    "max_tokens": (lambda: _sampling(max_tokens=2**31), "OUT_OF_RANGE", "sampling.max_tokens", "at most 4096"),
    "negative temperature": (lambda: _sampling(temperature=-0.5), "OUT_OF_RANGE", "sampling.temperature", "from 0 to 10"),
    "absurd temperature": (lambda: _sampling(temperature=1e30), "OUT_OF_RANGE", "sampling.temperature", "from 0 to 10"),
    "nan temperature": (lambda: _sampling(temperature=np.nan), "OUT_OF_RANGE", "sampling.temperature", "from 0 to 10"),
    "top_p zero": (lambda: _sampling(top_p=0), "OUT_OF_RANGE", "sampling.top_p", "above 0 and at most 1"),
    "top_p above one": (lambda: _sampling(top_p=1.5), "OUT_OF_RANGE", "sampling.top_p", "above 0 and at most 1"),
    "top_p nan": (lambda: _sampling(top_p=np.nan), "OUT_OF_RANGE", "sampling.top_p", "above 0 and at most 1"),
    "many stops": (lambda: _sampling(stop=["x"] * 9), "TOO_MANY", "sampling.stop", "8"),
    "empty stop": (lambda: _sampling(stop=["x", ""]), "OUT_OF_RANGE", "sampling.stop[1]", "from 1 to 128 bytes long"),
    "long stop": (lambda: _sampling(stop=["x" * 129]), "OUT_OF_RANGE", "sampling.stop[0]", "from 1 to 128 bytes long"),
    "many logprobs": (lambda: _sampling(logprobs=21), "OUT_OF_RANGE", "sampling.logprobs", "at most 20"),
    "min_p": (lambda: _sampling(min_p=1.01), "OUT_OF_RANGE", "sampling.min_p", "from 0 to 1"),
    "min_p nan": (lambda: _sampling(min_p=np.nan), "OUT_OF_RANGE", "sampling.min_p", "from 0 to 1"),
    "repetition zero": (lambda: _sampling(repetition_penalty=0), "OUT_OF_RANGE", "sampling.repetition_penalty", "from 0.01 to 100"),
    "repetition nan": (lambda: _sampling(repetition_penalty=np.nan), "OUT_OF_RANGE", "sampling.repetition_penalty", "from 0.01 to 100"),
    "presence": (lambda: _sampling(presence_penalty=-2.5), "OUT_OF_RANGE", "sampling.presence_penalty", "from -2 to 2"),
    "frequency": (lambda: _sampling(frequency_penalty=np.inf), "OUT_OF_RANGE", "sampling.frequency_penalty", "from -2 to 2"),
    "bias of no token": (lambda: _sampling(logit_bias={5: 1.0, 300: 1.0}), "UNKNOWN_TOKEN", "sampling.logit_bias[300]", "300"),
    "bias too large": (lambda: _sampling(logit_bias={5: -101.0}), "OUT_OF_RANGE", "sampling.logit_bias[5]", "from -100 to 100"),
    "bias nan": (lambda: _sampling(logit_bias={5: np.nan}), "OUT_OF_RANGE", "sampling.logit_bias[5]", "from -100 to 100"),
    "many biases": (lambda: _sampling(logit_bias=dict.fromkeys(range(1025), 1.0)), "TOO_MANY", "sampling.logit_bias", "1024"),
    "many continuations": (lambda: _sampling(n=17, temperature=1), "OUT_OF_RANGE", "sampling.n", "at most 16"),
    "greedy continuations": (lambda: _sampling(n=2), "OUT_OF_RANGE", "sampling.n", "1 when temperature is 0"),
    # pairs
    "no pairs": (lambda: _pairs(), "MISSING_FIELD", "pairs", ""),
    "too many pairs": (lambda: _pairs(*[pair()] * 513), "TOO_MANY", "pairs", "512"),
    "gradient without soft prompt": (lambda: _pairs(pair(), pair(soft_prompt=None)), "MISSING_FIELD", "pairs[1].soft_prompt", ""),
    "gradient dtype": (lambda: _pairs(pair(), gradient_dtype=9), "SOFT_PROMPT_DTYPE", "gradient_dtype", "F32, F16, BF16, I8"),
    "no target": (lambda: _scores(pair(), pair(), pair(target=None)), "MISSING_FIELD", "pairs[2].target", ""),
    "no target form": (lambda: _scores(pair(target=pb.Target(append_end=True))), "MISSING_FIELD", "pairs[0].target.content", ""),
    "empty target": (lambda: _scores(pair(target=pb.Target(text=""))), "EMPTY_TARGET", "pairs[0].target.text", "1"),
    "target token": (
        lambda: _scores(pair(target=pb.Target(tokens=pb.TokenIds(ids=[2**32 - 1])))),
        "UNKNOWN_TOKEN",
        "pairs[0].target.tokens.ids[0]",
        "300",
    ),
    "pair over the context": (
        lambda: _pairs(pair(target=pb.Target(tokens=pb.TokenIds(ids=[5] * 510)))),
        "CONTEXT_EXCEEDED",
        "pairs[0].prompt",
        "512",
    ),
    "nan in a pair": (lambda: _pairs(pair(), pair(soft_prompt=_floats(np.nan))), "SOFT_PROMPT_NOT_FINITE", "pairs[1].soft_prompt.data", ""),
    "priority": (
        lambda: inference_pb2.ScoreRequest(pairs=[pair()], priority=7),
        "OUT_OF_RANGE",
        "priority",
        "PRIORITY_NORMAL or PRIORITY_LOW",
    ),
    "pair's prompt": (lambda: _pairs(pair(prompt=pb.Prompt(text=""))), "EMPTY_PROMPT", "pairs[0].prompt.text", "1"),
    # bundles
    "unknown bundle": (lambda: catalog_pb2.FetchBundleRequest(bundle_id="f" * 64), "UNKNOWN_BUNDLE", "bundle_id", "none"),
}
CODES = {"FINGERPRINT_MISMATCH": grpc.StatusCode.FAILED_PRECONDITION, "UNKNOWN_BUNDLE": grpc.StatusCode.NOT_FOUND}


def _send(client: Client, request: Any) -> object:
    calls = {
        inference_pb2.GenerateRequest: client.generate,
        inference_pb2.ScoreRequest: client.inference.Score,
        tuning_pb2.PromptGradientsRequest: client.tuning.PromptGradients,
        catalog_pb2.FetchBundleRequest: lambda one: list(client.catalog.FetchBundle(one)),
    }
    return calls[type(request)](request)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named(client: Client, name: str) -> None:
    make, reason, field, limit = CASES[name]
    found = failure(lambda: _send(client, make()))
    assert (found.reason, found.field) == (reason, field)
    assert found.code is CODES.get(reason, grpc.StatusCode.INVALID_ARGUMENT)
    assert limit in found.limit and field in found.message
    assert found.violations == ((field,) if found.code is grpc.StatusCode.INVALID_ARGUMENT else ())


@pytest.fixture
def neighbour(server: RunningServer) -> Iterator[Callable[[], list[int]]]:
    """A healthy personal request on a channel of its own."""
    with grpc.insecure_channel(server.address) as channel:
        request = generate_request("class Point:", soft=soft_prompt(7, 9), max_tokens=48)
        yield lambda: Client(channel).tokens(request)


def test_a_healthy_neighbour_is_not_touched(client: Client, neighbour: Callable[[], list[int]]) -> None:
    alone = neighbour()
    with ThreadPoolExecutor(2) as pool:
        for make, *_ in CASES.values():
            beside = pool.submit(neighbour)
            failure(lambda make=make: _send(client, make()))
            assert beside.result() == alone
    assert neighbour() == alone


@pytest.mark.parametrize("size", [32 << 20, 60 << 20])
def test_a_message_over_the_limit_is_refused(client: Client, size: int) -> None:
    found = failure(lambda: client.tokens(generate_request("x" * size)))
    assert (found.reason, found.field, found.limit) == ("MESSAGE_TOO_LARGE", "request", str(32 << 20)) and int(found.found) > size
    assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_message_of_twice_the_limit_is_not_even_received(client: Client) -> None:
    with pytest.raises(grpc.RpcError, match="larger than max") as refused:
        client.tokens(generate_request("x" * (65 << 20)))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


NO_MESSAGES = {
    "text that isn't UTF-8": ("Inference/Generate", b"\x0a\x04\x0a\x02\xff\xfe"),
    "a length beyond the end": ("Inference/Score", b"\x0a\x7f\x01"),
    "a tag that doesn't end": ("Tuning/PromptGradients", b"\xff"),
    "an id that isn't UTF-8": ("Catalog/FetchBundle", b"\x0a\x02\xff\xfe"),
    "a length without its bytes": ("Catalog/GetModel", b"\x0a\x7f"),
}


@pytest.mark.parametrize("name", NO_MESSAGES)
def test_bytes_that_are_no_message_get_a_typed_error(name: str, server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    path, data = NO_MESSAGES[name]
    method = f"/lopa.v1.{path}"
    with grpc.insecure_channel(server.address) as channel:
        refused = failure(lambda: list(channel.unary_stream(method)(data)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert refused.limit == method and refused.violations == ("request",)
    assert "Traceback" not in caplog.text
