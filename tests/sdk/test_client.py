"""Generate, stream, score and gradients against a real server."""

from __future__ import annotations

import dataclasses
import threading

import grpc
import lopa
import numpy as np
import pytest

from tests.sdk.conftest import TOO_LATE

SOFT = np.random.default_rng(0).normal(0, 0.3, (4, 32)).astype(np.float32)
OTHER = -SOFT


def test_model_says_what_the_server_hosts(client: lopa.Client) -> None:
    model = client.model
    assert (model.hidden_size, model.context_length) == (32, 512)
    assert len(model.fingerprint) == 64 and model.fingerprint in model.revision
    assert {"generate", "score", "prompt_gradients", "chat", "bundle"} <= set(model.features)
    assert model.limits.max_pairs > 0 and "F16" in model.soft_prompt_dtypes


def test_generation_is_deterministic_and_complete(client: lopa.Client) -> None:
    once = client.generate("def add(", max_tokens=12, ignore_end=True)
    again = client.generate("def add(", max_tokens=12, ignore_end=True)
    assert once == again
    assert len(once.token_ids) == 12 and once.finish_reason == "length" and once.receipt is None
    assert once.usage.completion_tokens == 12 and once.usage.virtual_tokens == 0


def test_a_soft_prompt_changes_the_text_and_is_receipted(client: lopa.Client) -> None:
    plain = client.generate("import ", max_tokens=16, ignore_end=True)
    personal = client.generate("import ", max_tokens=16, ignore_end=True, soft_prompt=SOFT)
    assert personal.token_ids != plain.token_ids
    assert personal.receipt is not None and personal.receipt.rows == 4 and personal.receipt.offset == 0
    assert personal.usage.virtual_tokens == 4


def test_stream_deltas_are_the_whole_text(client: lopa.Client) -> None:
    stream = client.stream("class Point:", max_tokens=20, ignore_end=True, logprobs=2, soft_prompt=SOFT)
    with pytest.raises(lopa.ProtocolError, match="not finished"):
        _ = stream.generation
    deltas = list(stream)
    generation = stream.generation
    assert len(deltas) > 1
    assert "".join(delta.text for delta in deltas) == generation.text
    assert len(generation.logprobs) == len(generation.token_ids) == 20
    assert all(len(row.alternatives) == 2 and row.chosen.logprob <= 0 for row in generation.logprobs)


def test_every_sampling_parameter_arrives(client: lopa.Client) -> None:
    """Each changes the greedy text, or a drawn one, as it says."""
    prompt, options = "return a + b\n" * 3, {"max_tokens": 24, "ignore_end": True}
    plain = client.generate(prompt, **options)
    wanted = plain.token_ids[0]
    assert wanted not in client.generate(prompt, logit_bias={wanted: -100.0}, **options).token_ids
    assert client.generate(prompt, logit_bias={7: 100.0}, **options).token_ids == (7,) * 24
    once = client.generate(prompt, frequency_penalty=2.0, presence_penalty=2.0, logit_bias={7: 3.0}, **options)
    assert len(set(once.token_ids)) > len(set(client.generate(prompt, logit_bias={7: 3.0}, **options).token_ids))
    assert client.generate(prompt, repetition_penalty=50.0, **options).token_ids != plain.token_ids
    drawn = {"temperature": 2.0, "seed": 1, **options}
    assert client.generate(prompt, min_p=1.0, **drawn) == client.generate(prompt, top_k=1, **drawn) == plain
    assert client.generate(prompt, **drawn).token_ids != plain.token_ids
    with pytest.raises(lopa.InvalidRequest, match=r"sampling\.max_tokens is 0"):
        client.generate("x", max_tokens=0)


def test_a_json_schema_as_a_mapping(client: lopa.Client) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    found = client.generate("x = ", json_schema=schema, temperature=1.0, soft_prompt=SOFT)
    assert found.text in ('{"ok":true}', '{"ok":false}') and found.finish_reason == "end"
    with pytest.raises(lopa.InvalidRequest, match="sampling"):
        client.generate("x", json_schema={"const": float("nan")})
    with pytest.raises(lopa.InvalidRequest, match="json_schema"):
        client.generate("x", json_schema="{")


def test_several_continuations(client: lopa.Client) -> None:
    options = {"temperature": 1.5, "seed": 9, "max_tokens": 10, "ignore_end": True, "soft_prompt": SOFT}
    several = client.generate("x = ", n=3, **options)
    assert client.generate("x = ", **options) == dataclasses.replace(several, others=())
    assert len({one.token_ids for one in (several, *several.others)}) == 3
    assert all(one.usage.completion_tokens == 10 and one.receipt == several.receipt for one in several.others)
    deltas = list(client.stream("x = ", n=3, **options))
    for index, one in enumerate((several, *several.others)):
        assert "".join(delta.text for delta in deltas if delta.index == index) == one.text


def test_leaving_a_stream_early_cancels_it(client: lopa.Client) -> None:
    with client.stream("x = ", max_tokens=400, ignore_end=True) as stream:
        next(stream)
    with pytest.raises(lopa.Cancelled):
        for _ in stream:
            pass
    assert client.generate("x = ", max_tokens=2).text is not None


def test_chat_and_token_prompts(client: lopa.Client) -> None:
    turns = client.generate([lopa.Message("user", "hello")], max_tokens=4)
    mappings = client.generate([{"role": "user", "content": "hello"}], max_tokens=4)
    assert turns.token_ids == mappings.token_ids
    tokens = client.generate([5, 6, 7], max_tokens=4)
    assert tokens.usage.prompt_tokens == 3


def test_prefix_and_placement(client: lopa.Client) -> None:
    after = client.generate("x", prefix=[5, 6, 7], soft_prompt=SOFT, placement="after_prefix", max_tokens=4)
    assert after.receipt is not None and after.receipt.offset == 3
    front = client.generate("x", prefix=[5, 6, 7], soft_prompt=SOFT, max_tokens=4)
    assert front.receipt is not None and front.receipt.offset == 0


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "I8"])
def test_score_knows_whose_soft_prompt_it_is(client: lopa.Client, dtype: lopa.values.Dtype) -> None:
    pairs = [lopa.Pair("def f(", "a, b)", soft) for soft in (None, SOFT, OTHER)]
    scores = client.score(pairs, dtype=dtype)
    assert len({round(score.nll_sum, 3) for score in scores}) == 3
    assert len({score.target_tokens for score in scores}) == 1
    assert all(score.nll == score.nll_sum / score.target_tokens > 0 for score in scores)


def test_gradients_are_those_of_the_score(client: lopa.Client) -> None:
    """Central difference along the gradient, of the loss that Score gives."""
    pair = lopa.Pair("def f(", "a, b):", SOFT, append_end=True)
    (item,) = client.prompt_gradients([pair])
    assert item.gradient.shape == SOFT.shape
    direction = item.gradient / np.linalg.norm(item.gradient)
    step = 1e-2
    ends = [lopa.Pair("def f(", "a, b):", (SOFT + sign * step * direction).astype(np.float32), append_end=True) for sign in (1, -1)]
    up, down = client.score(ends)
    assert (up.nll_sum - down.nll_sum) / (2 * step) == pytest.approx(np.linalg.norm(item.gradient), rel=1e-2)


def test_many_pairs_split_into_requests_and_keep_their_order(client: lopa.Client) -> None:
    pairs = [lopa.Pair(f"x{i} = ", f"{i}\n", SOFT * (1 + i / 10)) for i in range(7)]
    whole = client.prompt_gradients(pairs)
    before = client.traffic
    parts = client.prompt_gradients(pairs, max_pairs=3)
    assert (client.traffic - before).requests == 3
    for one, other in zip(whole, parts, strict=True):
        assert one.nll_sum == pytest.approx(other.nll_sum, rel=1e-5)
        np.testing.assert_allclose(one.gradient, other.gradient, rtol=1e-3, atol=1e-5)


def test_a_refusal_names_the_pair_by_its_place_in_the_callers_list(client: lopa.Client) -> None:
    pairs = [lopa.Pair("x", "y", SOFT)] * 5 + [lopa.Pair("x", "", SOFT)]
    with pytest.raises(lopa.InvalidRequest, match=r"^pairs\[5\].target") as caught:
        client.prompt_gradients(pairs, max_pairs=2)
    assert caught.value.field.startswith("pairs[5].target")


def test_traffic_counts_what_was_sent(client: lopa.Client) -> None:
    twin, before = client.metered(), client.traffic
    twin.score([lopa.Pair("a", "b", SOFT)])
    assert twin.traffic.requests == 1 and twin.traffic.sent_bytes > SOFT.nbytes and twin.traffic.received_bytes > 32
    assert (client.traffic - before) == twin.traffic


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("soft_prompt.hidden", lambda client: client.generate("x", soft_prompt=np.zeros((4, 31), np.float32))),
        ("soft_prompt.data", lambda client: client.generate("x", soft_prompt=np.full((4, 32), np.nan, np.float32))),
        ("sampling.temperature", lambda client: client.generate("x", temperature=-1.0)),
        ("pairs[1].target", lambda client: client.score([lopa.Pair("x", "y"), lopa.Pair("x", "")])),
        ("prompt", lambda client: client.generate("")),
    ],
)
def test_refusals_name_the_field(client: lopa.Client, field: str, call: object) -> None:
    assert callable(call)
    with pytest.raises(lopa.InvalidRequest) as caught:
        call(client)
    assert caught.value.field.startswith(field)
    assert caught.value.reason is not None
    assert isinstance(caught.value.__cause__, grpc.RpcError)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.generate([1.5, 2.5]),
        lambda client: client.generate([{"role": "user"}]),
        lambda client: client.generate("x", soft_prompt=np.zeros(32, np.float32)),
        lambda client: client.generate("x", soft_prompt=SOFT, dtype="F64"),
        lambda client: client.generate("x", max_tokens=-3),
    ],
)
def test_what_the_wire_cannot_carry_is_refused_here(client: lopa.Client, call: object) -> None:
    assert callable(call)
    before = client.traffic
    with pytest.raises(lopa.InvalidRequest):
        call(client)
    assert client.traffic == before


def test_nobody_there_is_unavailable() -> None:
    config = lopa.ClientConfig(connect_timeout=60.0, retry=lopa.RetryPolicy(attempts=2, initial=0.01))
    with pytest.raises(lopa.Unavailable, match="is the server running there"):
        lopa.connect("127.0.0.1:1", config=config)


def test_a_closed_client_says_so(client: lopa.Client) -> None:
    client.close()
    with pytest.raises(lopa.Cancelled, match="closed"):
        client.generate("x")


def test_deadline(client: lopa.Client) -> None:
    with pytest.raises(TOO_LATE):
        client.generate("x", max_tokens=480, ignore_end=True, timeout=0.02)


def test_one_client_serves_many_threads(client: lopa.Client) -> None:
    alone = [client.generate(f"x{i} = ", max_tokens=8, ignore_end=True, soft_prompt=SOFT * (i + 1) / 4).token_ids for i in range(4)]
    together: dict[int, tuple[int, ...]] = {}

    def work(i: int) -> None:
        together[i] = client.generate(f"x{i} = ", max_tokens=8, ignore_end=True, soft_prompt=SOFT * (i + 1) / 4).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(4)] == alone
