"""What a client sees: model information, bundles, streams, receipts, chat, health."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lopa.bundle import Bundle, extract_archive
from lopa.fingerprint import fingerprint_folder
from lopa.v1 import catalog_pb2, inference_pb2, tuning_pb2
from lopa.v1 import common_pb2 as pb
from lopa.wire.tensors import decode_rows, soft_prompt_digest, soft_prompt_message
from lopa_server.app import RunningServer, ServerConfig, start_server
from transformers import AutoTokenizer

from tests.server.bundles import write_bundle
from tests.server.client import Client, failure, generate_request, pair, rows, soft_prompt
from tests.tiny import build_tiny_fm


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Bundle, Path]]:
    """A server with a chat template and a bundle: client, bundle, the FM's folder."""
    folder = tmp_path_factory.mktemp("published")
    fm = build_tiny_fm(folder / "fm", chat=True)
    bundle = write_bundle(folder / "bundle", fingerprint=fingerprint_folder(fm))
    config = ServerConfig(fm=fm, bundle=bundle.folder, threads=1)
    with start_server(config) as server, grpc.insecure_channel(server.address) as channel:
        yield Client(channel), bundle, fm


def _fetch(client: Client, bundle_id: str, offset: int) -> list[catalog_pb2.BundleChunk]:
    return list(client.catalog.FetchBundle(catalog_pb2.FetchBundleRequest(bundle_id=bundle_id, offset=offset)))


def test_model_information(published: tuple[Client, Bundle, Path]) -> None:
    client, bundle, fm = published
    info = client.catalog.GetModel(catalog_pb2.GetModelRequest())
    assert (info.name, info.fingerprint) == ("fm", fingerprint_folder(fm))
    assert (info.hidden_size, info.context_length, info.vocab_size) == (32, 512, 300)
    assert (info.bundle_id, info.limits.max_virtual_tokens) == (bundle.manifest.id, 64)
    assert set(info.features) == set(catalog_pb2.Feature.values()) - {catalog_pb2.FEATURE_UNSPECIFIED}
    assert info.fingerprint in info.revision and "float32" in info.revision


def test_a_bundle_arrives_whole_and_goes_on_where_it_stopped(published: tuple[Client, Bundle, Path], tmp_path: Path) -> None:
    client, bundle, _ = published
    chunks = _fetch(client, bundle.manifest.id, 0)
    archive = b"".join(chunk.data for chunk in chunks)
    assert len(chunks) > 2 and max(len(chunk.data) for chunk in chunks) <= 256 << 10
    assert {chunk.total_bytes for chunk in chunks} == {len(archive)}
    offsets = [chunk.offset for chunk in chunks]
    assert offsets == [sum(len(chunk.data) for chunk in chunks[:index]) for index in range(len(chunks))]
    (tmp_path / "bundle.zip").write_bytes(archive)
    assert extract_archive(tmp_path / "bundle.zip", tmp_path / "copy").manifest.id == bundle.manifest.id
    rest = _fetch(client, bundle.manifest.id, 300_001)
    assert rest[0].offset == 300_001 and b"".join(chunk.data for chunk in rest) == archive[300_001:]
    (end,) = _fetch(client, bundle.manifest.id, len(archive))
    assert end.data == b"" and end.total_bytes == len(archive)
    beyond = failure(lambda: _fetch(client, bundle.manifest.id, len(archive) + 1))
    assert (beyond.code, beyond.reason, beyond.field) == (grpc.StatusCode.OUT_OF_RANGE, "BUNDLE_OFFSET", "offset")
    unknown = failure(lambda: _fetch(client, "f" * 64, 0))
    assert (unknown.code, unknown.reason, unknown.limit) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_BUNDLE", bundle.manifest.id)


def test_a_chat_is_rendered_by_the_models_own_template(published: tuple[Client, Bundle, Path]) -> None:
    client, *_ = published
    turns = [pb.ChatMessage(role="system", content="be short"), pb.ChatMessage(role="user", content="def add")]
    request = generate_request(soft=soft_prompt(1))
    request.prompt.CopyFrom(pb.Prompt(chat=pb.Chat(messages=turns)))
    by_hand = generate_request("system: be short\nuser: def add\nassistant: ", soft=soft_prompt(1))
    assert client.tokens(request) == client.tokens(by_hand)


def test_deltas_make_up_the_text_and_the_last_one_tells_the_rest(client: Client, tiny_fm: Path) -> None:
    soft = soft_prompt(3, 6)
    *first, last = client.generate(generate_request(soft=soft, max_tokens=30, logprobs=2))
    assert all(not delta.HasField("usage") and not delta.HasField("receipt") and not delta.finish_reason for delta in first)
    deltas = [*first, last]
    ids = [token for delta in deltas for token in delta.token_ids]
    tokenizer = AutoTokenizer.from_pretrained(tiny_fm)
    assert "".join(delta.text for delta in deltas) == tokenizer.decode(ids, skip_special_tokens=True)
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)
    assert all(len(entry.alternatives) == 2 for delta in deltas for entry in delta.logprobs)
    assert last.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert (last.usage.virtual_tokens, last.usage.completion_tokens) == (6, 30)
    assert last.usage.prompt_tokens == len(tokenizer("def add(")["input_ids"])
    assert last.receipt.soft_prompt_sha256 == soft_prompt_digest(soft) and last.receipt.rows == 6


def test_the_end_token_ends_a_text_unless_it_is_ignored(client: Client) -> None:
    seeds = range(20)
    requests = [generate_request(soft=soft_prompt(seed), max_tokens=60, temperature=2, seed=seed, ignore_end=False) for seed in seeds]
    ended = 0
    for request in requests:
        deltas = client.generate(request)
        tokens = [token for delta in deltas for token in delta.token_ids]
        assert 0 not in tokens[:-1]
        if deltas[-1].finish_reason == inference_pb2.FINISH_REASON_END:
            ended += 1
            assert tokens[-1] == 0 and deltas[-1].usage.completion_tokens == len(tokens)
            request.sampling.ignore_end = True
            assert client.tokens(request)[: len(tokens)] == tokens
    assert ended


def test_default_length_and_no_soft_prompt(client: Client) -> None:
    request = inference_pb2.GenerateRequest(prompt=pb.Prompt(text="def"), sampling=inference_pb2.Sampling(ignore_end=True))
    last = client.generate(request)[-1]
    assert last.usage.completion_tokens == 128 and not last.HasField("receipt")
    long = pb.Prompt(tokens=pb.TokenIds(ids=[5] * 500))
    request.prompt.CopyFrom(long)
    assert client.generate(request)[-1].usage.completion_tokens == 12, "what fits the context"


@pytest.mark.parametrize("dtype", [pb.DTYPE_F32, pb.DTYPE_F16, pb.DTYPE_BF16, pb.DTYPE_I8])
def test_every_dtype_of_soft_prompts_and_gradients(client: Client, dtype: pb.DType) -> None:
    message = soft_prompt_message(rows(2), dtype)
    decoded = decode_rows(message.data, message.scales, rows=4, hidden=32, dtype=dtype)
    exact = tuning_pb2.PromptGradientsRequest(pairs=[pair(soft_prompt=soft_prompt_message(decoded))])
    request = tuning_pb2.PromptGradientsRequest(pairs=[pair(soft_prompt=message)], gradient_dtype=dtype)
    expected = client.tuning.PromptGradients(exact).gradients[0]
    found = client.tuning.PromptGradients(request).gradients[0]
    assert found.nll_sum == expected.nll_sum and found.receipt.soft_prompt_sha256 == soft_prompt_digest(message)
    values = [
        decode_rows(one.data, one.scales, rows=one.rows, hidden=one.hidden, dtype=one.dtype) for one in (found.gradient, expected.gradient)
    ]
    np.testing.assert_allclose(values[0], values[1], atol=0.01 * np.abs(values[1]).max())


def test_scores_and_gradients_come_in_the_order_of_the_request(client: Client) -> None:
    texts = ["x", " a longer target of many tokens", " y = 3\n" * 9]
    pairs = [pair(seed, target=pb.Target(text=text, append_end=seed == 1)) for seed, text in enumerate(texts)]
    scores = client.inference.Score(inference_pb2.ScoreRequest(pairs=pairs)).scores
    gradients = client.tuning.PromptGradients(tuning_pb2.PromptGradientsRequest(pairs=pairs)).gradients
    for one, score, gradient in zip(pairs, scores, gradients, strict=True):
        alone = client.inference.Score(inference_pb2.ScoreRequest(pairs=[one])).scores[0]
        assert score.nll_sum == pytest.approx(alone.nll_sum, rel=1e-5) == gradient.nll_sum
        assert score.target_tokens == alone.target_tokens == gradient.target_tokens
        assert score.receipt.soft_prompt_sha256 == gradient.receipt.soft_prompt_sha256 == soft_prompt_digest(one.soft_prompt)


def test_health_is_told_for_every_service(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "lopa.v1.Catalog", "lopa.v1.Inference", "lopa.v1.Tuning"):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING
