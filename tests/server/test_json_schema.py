"""Texts held to a JSON schema: they satisfy it, whatever the model would rather say; hostile schemas cost only themselves."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import grpc
import pytest
from lopa.v1 import inference_pb2
from lopa.wire.errors import WireError
from lopa_server.app import RunningServer
from lopa_server.engine.base import EngineStopped
from lopa_server.engine.torch_engine.constraints import Grammars
from lopa_server.engine.torch_engine.engine import TorchEngine
from lopa_server.limits import ServiceLimits
from lopa_server.validation.schemas import check_schema, expanded_size
from pydantic import BaseModel, ConfigDict, Field

from tests.server import engines
from tests.server.client import Client, Failure, failure, generate_request, soft_prompt

END, LENGTH = inference_pb2.FINISH_REASON_END, inference_pb2.FINISH_REASON_LENGTH


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: Annotated[int, Field(ge=1, le=20)]
    color: Color


class Thing(BaseModel):
    """Nested, with bounds, an enum, an option and a list."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(max_length=6)]
    ok: bool
    parts: Annotated[list[Part], Field(min_length=1, max_length=3)]
    kind: Annotated[str, Field(pattern="^[a-c]{2}-[0-9]+$", max_length=8)] | None


THING = json.dumps(Thing.model_json_schema())


def _constrained(schema: str = THING, **sampling: Any) -> inference_pb2.GenerateRequest:
    fields = {"ignore_end": False, "max_tokens": 300, "temperature": 1.5, **sampling}
    return generate_request(soft=soft_prompt(1), json_schema=schema, **fields)


def _text(deltas: list[inference_pb2.GenerateResponse]) -> str:
    return "".join(delta.text for delta in deltas)


def test_texts_satisfy_the_schema(client: Client) -> None:
    """A random model at a high temperature, many at once: without the schema none of it would be JSON."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: client.generate(_constrained(seed=seed)), range(16)))
    things = [Thing.model_validate_json(_text(answer), strict=False) for answer in answers if answer[-1].finish_reason == END]
    assert len(things) >= 12 and all(answer[-1].finish_reason in (END, LENGTH) for answer in answers)
    assert len({thing.model_dump_json() for thing in things}) > 8


def test_a_schema_and_its_neighbours_do_not_touch_each_other(client: Client) -> None:
    """With penalties, bias and continuations on top, and a plain request beside it."""
    fields = {"seed": 4, "n": 2, "presence_penalty": 0.5, "logit_bias": {5: -3.0}, "top_p": 0.95}
    plain = generate_request(soft=soft_prompt(2), max_tokens=60)
    alone = client.generate(_constrained(**fields)), client.tokens(plain)
    with ThreadPoolExecutor(2) as pool:
        both = pool.submit(lambda: client.generate(_constrained(**fields))), pool.submit(lambda: client.tokens(plain))
    assert both[1].result() == alone[1]
    first, second = ([(delta.index, token) for delta in answer for token in delta.token_ids] for answer in (alone[0], both[0].result()))
    assert sorted(first, key=lambda entry: entry[0]) == sorted(second, key=lambda entry: entry[0])


def test_a_complete_document_ends_the_text_at_once(client: Client) -> None:
    answer = client.generate(_constrained('{"enum": ["yes", "no"]}', temperature=0))
    assert _text(answer) in ('"yes"', '"no"') and answer[-1].finish_reason == END
    cut = client.generate(_constrained(max_tokens=3))
    assert cut[-1].finish_reason == LENGTH
    stopped = client.generate(_constrained('{"const": "abcdef"}', stop=["cd"]))
    assert (_text(stopped), stopped[-1].finish_reason) == ('"ab', inference_pb2.FINISH_REASON_STOP)


def _nested(depth: int) -> str:
    return '{"properties": ' * depth + "{}" + "}" * depth


HOSTILE = {
    "no JSON": ("{", "not JSON"),
    "no object": ("[]", "a JSON list"),
    "not a number": ('{"const": NaN}', "not JSON"),
    "too long": (json.dumps({"enum": ["x" * (64 << 10)]}), "bytes long"),
    "nested": (_nested(33), "nested deeper"),
    "nested without end": ("[" * 60_000, "nested deeper"),
    "options of the compiler": ('{"x-guidance": {"lenient": true}}', "with it"),
    "nested repetitions": (json.dumps({"pattern": "(((a{100}){100}){100}){100}"}), "larger"),
    "in a property's pattern": (json.dumps({"patternProperties": {"(a{2000}b){2}": {}}}), "larger"),
    "another file": ('{"$ref": "file:///etc/passwd"}', "does not fetch"),
    "itself": ('{"$ref": "#"}', ""),
    "nothing": ('{"allOf": [{"type": "string"}, {"type": "integer"}]}', "Unsatisfiable"),
    "not guaranteed": ('{"oneOf": [{"type": "string"}, {"type": "integer", "not": {"const": 3}}]}', ""),
    "too slow": ('{"type": "integer", "multipleOf": 100000007}', "too long to compile"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_refused_by_name(client: Client, name: str) -> None:
    schema, found = HOSTILE[name]
    beside = client.inference.Generate(generate_request(max_tokens=400))
    next(beside)
    started = time.monotonic()
    refused: Failure = failure(lambda: client.generate(_constrained(schema)))
    assert time.monotonic() - started < 30
    assert (refused.code, refused.field) == (grpc.StatusCode.INVALID_ARGUMENT, "sampling.json_schema")
    assert refused.reason in ("OUT_OF_RANGE", "UNSUPPORTED") and found in refused.found
    beside.cancel()


def test_ignore_end_contradicts_a_schema(client: Client) -> None:
    refused = failure(lambda: client.generate(_constrained(ignore_end=True)))
    assert (refused.reason, refused.field) == ("UNSUPPORTED", "sampling.ignore_end")


def test_large_numbers_of_items_cost_nothing(client: Client) -> None:
    schema = {"type": "array", "items": {"type": "string", "minLength": 10**8}, "minItems": 10**9}
    assert client.generate(_constrained(json.dumps(schema), max_tokens=20))[-1].finish_reason == LENGTH


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("", 0),
        ("abc", 3),
        ("a{4}", 4),
        ("a{2,9}b", 10),
        ("(ab{3}){5}", 20),
        (r"\d{4}-\d{2}", 7),
        ("[^]}{9]{3}", 3),
        (r"(x|[a\]b]{2}){3}", 12),
        ("((a{10}){10}){10}", 1000),
        ("a{,7}", 7),
        ("a{b", 2),
        ("(a", 1),
        ("a)", 2),
        ("a{3}{4}", 12),
    ],
)
def test_size_of_patterns(pattern: str, size: int) -> None:
    assert expanded_size(pattern) >= size


def test_ordinary_patterns_pass() -> None:
    address = "([0-9a-fA-F]{1,4}:){7,7}[0-9a-fA-F]{1,4}"
    uuid = "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
    for pattern in (address, uuid, r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$"):
        assert json.loads(check_schema(json.dumps({"pattern": pattern}), ServiceLimits()))["pattern"] == pattern
    with pytest.raises(WireError, match="repetitions written out"):
        check_schema(json.dumps({"pattern": "(a{3}{4}){200}"}), ServiceLimits())


def test_a_model_whose_tokenizer_cannot_be_held_offers_no_schemas(server: RunningServer) -> None:
    assert Grammars.of(object(), server.app.engine.spec) is None


def test_whoever_waits_for_a_schema_when_the_engine_stops_is_told(tiny_fm: Path) -> None:
    release = threading.Event()

    async def scenario(engine: TorchEngine) -> None:
        engine.intake._grammars._compiling.submit(release.wait)  # others' schemas are in front
        waiting = asyncio.create_task(
            engines.collect(engine, engines.stream("held", 1, json_schema='{"type": "integer"}', ignore_end=False))
        )
        while not engine.intake._compiling:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        await engine.stop()
        with pytest.raises(EngineStopped):
            await waiting

    try:
        engines.run(engines.load(tiny_fm), scenario)
    finally:
        release.set()
