"""What a reply must hold: wrong receipts, shapes and numbers never get through."""

from __future__ import annotations

import lopa
import numpy as np
import pytest
from lopa.protocol import replies, requests
from lopa.v1 import catalog_pb2, common_pb2, inference_pb2, tuning_pb2
from lopa.wire.tensors import soft_prompt_digest

REVISION = "model-1"
SOFT = requests.soft_prompt(np.arange(8, dtype=np.float32).reshape(2, 4), "F32", "front")


def receipt(**changes: object) -> common_pb2.Receipt:
    values: dict[str, object] = {"soft_prompt_sha256": soft_prompt_digest(SOFT), "rows": 2, "offset": 0, "model_revision": REVISION}
    return common_pb2.Receipt(**{**values, **changes})  # type: ignore[arg-type]


WRONG = [
    (None, "no receipt"),
    (receipt(soft_prompt_sha256=b"\0" * 32), "digest"),
    (receipt(soft_prompt_sha256=b""), "digest"),
    (receipt(rows=3), "rows"),
    (receipt(offset=1), "offset"),
    (receipt(model_revision="model-2"), "model revision"),
]


def pair(soft: common_pb2.SoftPrompt | None = SOFT) -> common_pb2.Pair:
    return common_pb2.Pair(prompt=common_pb2.Prompt(text="x"), target=common_pb2.Target(text="y"), soft_prompt=soft)


@pytest.mark.parametrize(("wrong", "word"), WRONG)
def test_a_wrong_receipt_is_refused_everywhere(wrong: common_pb2.Receipt | None, word: str) -> None:
    score = inference_pb2.PairScore(nll_sum=1.0, target_tokens=1, receipt=wrong)
    with pytest.raises(lopa.ProtocolError, match=word):
        replies.check_scores([score], [pair()], REVISION)
    gradient = tuning_pb2.PairGradient(nll_sum=1.0, target_tokens=1, receipt=wrong, gradient=gradient_message())
    with pytest.raises(lopa.ProtocolError, match=word):
        replies.check_gradients([gradient], [pair()], REVISION, common_pb2.DTYPE_F32)
    reader = reader_for(SOFT)
    reader.feed(inference_pb2.GenerateResponse(text="y", token_ids=[1], finish_reason=inference_pb2.FINISH_REASON_END, receipt=wrong))
    with pytest.raises(lopa.ProtocolError, match=word):
        reader.finish(REVISION)


def test_a_receipt_for_nothing_is_refused() -> None:
    score = inference_pb2.PairScore(nll_sum=1.0, target_tokens=1, receipt=receipt())
    with pytest.raises(lopa.ProtocolError, match="none was sent"):
        replies.check_scores([score], [pair(None)], REVISION)


def test_right_receipts_pass() -> None:
    after = requests.soft_prompt(np.ones((2, 4), np.float32), "F16", "after_prefix")
    proof = receipt(soft_prompt_sha256=soft_prompt_digest(after), offset=5)
    scores = [
        inference_pb2.PairScore(nll_sum=1.0, target_tokens=1, receipt=receipt()),
        inference_pb2.PairScore(nll_sum=3.0, target_tokens=2),
        inference_pb2.PairScore(nll_sum=1.0, target_tokens=1, receipt=proof),
    ]
    checked = replies.check_scores(scores, [pair(), pair(None), pair(after)], REVISION)
    assert checked[1] == lopa.PairScore(3.0, 2) and checked[1].nll == 1.5


@pytest.mark.parametrize(("nll", "tokens"), [(float("nan"), 1), (float("inf"), 1), (1.0, 0)])
def test_numbers_that_make_no_sense(nll: float, tokens: int) -> None:
    score = inference_pb2.PairScore(nll_sum=nll, target_tokens=tokens, receipt=receipt())
    with pytest.raises(lopa.ProtocolError, match="nll_sum"):
        replies.check_scores([score], [pair()], REVISION)


def test_another_number_of_answers() -> None:
    with pytest.raises(lopa.ProtocolError, match="0 scores for 1 pairs"):
        replies.check_scores([], [pair()], REVISION)


def gradient_message(**changes: object) -> common_pb2.SoftPromptGradient:
    values: dict[str, object] = {"rows": 2, "hidden": 4, "dtype": common_pb2.DTYPE_F32, "data": np.zeros((2, 4), "<f4").tobytes()}
    return common_pb2.SoftPromptGradient(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 3},
        {"hidden": 2},
        {"dtype": common_pb2.DTYPE_F16},
        {"data": b"\0" * 31},
        {"scales": b"\0" * 8},
        {"data": np.full((2, 4), np.nan, "<f4").tobytes()},
    ],
)
def test_gradients_of_another_shape_or_with_nan(changes: dict[str, object]) -> None:
    item = tuning_pb2.PairGradient(nll_sum=1.0, target_tokens=1, receipt=receipt(), gradient=gradient_message(**changes))
    with pytest.raises(lopa.ProtocolError, match=r"gradients\[0\]"):
        replies.check_gradients([item], [pair()], REVISION, common_pb2.DTYPE_F32)


def reader_for(soft: common_pb2.SoftPrompt | None, **sampling: object) -> replies.GenerationReader:
    request = requests.generate_request("x", lopa.Sampling(**sampling), prefix=None, soft=soft, fingerprint="")  # type: ignore[arg-type]
    return replies.GenerationReader(request)


def test_a_stream_that_breaks_its_order() -> None:
    reader = reader_for(None)
    reader.feed(inference_pb2.GenerateResponse(text="y"))
    with pytest.raises(lopa.ProtocolError, match="without a finish reason"):
        reader.finish(REVISION)
    reader.feed(inference_pb2.GenerateResponse(finish_reason=inference_pb2.FINISH_REASON_LENGTH))
    with pytest.raises(lopa.ProtocolError, match="after the generation's end"):
        reader.feed(inference_pb2.GenerateResponse(text="z"))
    with pytest.raises(lopa.ProtocolError, match="0 logprobs for 1 tokens"):
        reader_for(None, logprobs=1).feed(inference_pb2.GenerateResponse(token_ids=[1]))


def test_a_model_without_what_is_needed() -> None:
    with pytest.raises(lopa.ProtocolError, match="another version"):
        replies.parse_model(catalog_pb2.ModelInfo(name="m", hidden_size=8))


def test_pairs_are_cut_by_number_and_by_bytes_of_request_and_reply() -> None:
    pairs = [pair() for _ in range(10)]
    sizes = [len(batch) for batch in requests.split_pairs(pairs, max_pairs=4, max_bytes=1 << 20)]
    assert sizes == [4, 4, 2]
    each = pairs[0].ByteSize()
    batches = list(requests.split_pairs(pairs, max_pairs=99, max_bytes=3000))
    assert [one for batch in batches for one in batch] == pairs
    assert all(sum(one.ByteSize() for one in batch) < 3000 for batch in batches) and len(batches) > 10 * each // 3000
    wide = [pair(requests.soft_prompt(np.ones((4, 256), np.float32), "I8", "front")) for _ in range(4)]
    small = list(requests.split_pairs(wide, max_pairs=99, max_bytes=8192))
    large = list(requests.split_pairs(wide, max_pairs=99, max_bytes=8192, reply_dtype=common_pb2.DTYPE_F32))
    assert len(small) == 1 and len(large) == 4
