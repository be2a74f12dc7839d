"""Whatever arrives, validation gives a checked request or a typed refusal, and never anything else."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from lopa.v1 import common_pb2 as pb
from lopa.v1 import inference_pb2, tuning_pb2
from lopa.wire.errors import WireError
from lopa.wire.tensors import decode_rows, encode_rows
from lopa_server.app import RunningServer
from lopa_server.engine.base import InputSequence
from lopa_server.validation.requests import RequestChecker

from tests.server.client import HIDDEN, soft_prompt

RELAXED = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
SMALL = st.integers(0, 70) | st.sampled_from([2**31 - 1, 2**32 - 1])
DTYPES = st.sampled_from([0, 1, 2, 3, 4, 5])
TEXTS = st.text(max_size=40)


@st.composite
def soft_prompts(draw: st.DrawFn) -> pb.SoftPrompt:
    """Right ones, and ones with any of their fields replaced."""
    message = soft_prompt(draw(st.integers(0, 3)), draw(st.integers(1, 6)))
    for name, values in {
        "rows": SMALL,
        "hidden": st.sampled_from([HIDDEN, 0, 31, 33, 2**32 - 1]),
        "dtype": DTYPES,
        "data": st.binary(max_size=300) | st.just(b"\xff" * (4 * HIDDEN * message.rows)),
        "scales": st.binary(max_size=32),
        "placement": st.sampled_from([0, 1, 2, 3]),
    }.items():
        if draw(st.integers(0, 5)) == 0:
            setattr(message, name, draw(values))
    return message


PROMPTS = st.one_of(
    st.builds(lambda text: pb.Prompt(text=text), TEXTS),
    st.builds(lambda ids: pb.Prompt(tokens=pb.TokenIds(ids=ids)), st.lists(st.integers(0, 310), max_size=8)),
    st.builds(
        lambda turns: pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role=role, content=text) for role, text in turns])),
        st.lists(st.tuples(st.sampled_from(["user", "system", "other"]), TEXTS), max_size=3),
    ),
    st.just(pb.Prompt()),
)
TARGETS = st.builds(lambda text, end: pb.Target(text=text, append_end=end), TEXTS, st.booleans()) | st.just(pb.Target())
PAIRS = st.builds(lambda prompt, target, soft: pb.Pair(prompt=prompt, target=target, soft_prompt=soft), PROMPTS, TARGETS, soft_prompts())
FLOATS = st.floats(width=32)
SAMPLINGS = st.builds(
    lambda tokens, heat, top, stop, logprobs, bias: inference_pb2.Sampling(
        max_tokens=tokens, temperature=heat, top_p=top, stop=stop, logprobs=logprobs, logit_bias=bias
    ),
    st.sampled_from([0, 1, 500, 513, 2**32 - 1]),
    FLOATS,
    FLOATS,
    st.lists(TEXTS, max_size=10),
    SMALL,
    st.dictionaries(SMALL, FLOATS, max_size=3),
)


@pytest.fixture
def checker(server: RunningServer) -> RequestChecker:
    """Of the running server's model."""
    return server.app._handlers.requests._checker


def _sound(sequence: InputSequence, checker: RequestChecker) -> None:
    """What the engine may rely on."""
    assert 1 <= len(sequence) <= 512
    assert all(0 <= token < 300 for token in (*sequence.before, *sequence.after))
    if sequence.soft is not None:
        assert sequence.soft.shape == (sequence.rows, HIDDEN) and sequence.soft.dtype == np.float32
        assert np.isfinite(sequence.soft).all()
        assert np.linalg.norm(sequence.soft, axis=1).max() <= checker.max_row_norm * (1 + 1e-6)


@RELAXED
@given(PROMPTS, soft_prompts(), SAMPLINGS)
def test_a_generate_request_is_sound_or_refused(
    checker: RequestChecker, prompt: pb.Prompt, soft: pb.SoftPrompt, sampling: inference_pb2.Sampling
) -> None:
    try:
        checked = checker.generate(inference_pb2.GenerateRequest(prompt=prompt, soft_prompt=soft, sampling=sampling))
    except WireError as refused:
        assert refused.field
        return
    _sound(checked.input, checker)
    assert 1 <= checked.sampling.max_tokens <= 512 - len(checked.input)
    assert 0 <= checked.sampling.temperature < np.inf and 0 < checked.sampling.top_p <= 1


@RELAXED
@given(st.lists(PAIRS, max_size=3), DTYPES)
def test_pairs_are_sound_or_refused(checker: RequestChecker, pairs: list[pb.Pair], dtype: int) -> None:
    for check in (
        lambda: checker.score(inference_pb2.ScoreRequest(pairs=pairs)),
        lambda: checker.gradients(tuning_pb2.PromptGradientsRequest(pairs=pairs, gradient_dtype=dtype)).pairs,
    ):
        try:
            checked = check()
        except WireError as refused:
            assert refused.field
            continue
        for entry in checked:
            _sound(entry.pair.input, checker)
            assert entry.pair.target and len(entry.pair) <= 512


@RELAXED
@given(st.binary(max_size=400))
@example(inference_pb2.GenerateRequest(prompt=pb.Prompt(text="a")).SerializeToString() * 3)
def test_any_bytes_are_a_request_or_refused(checker: RequestChecker, data: bytes) -> None:
    try:
        checker.generate(inference_pb2.GenerateRequest.FromString(data))
    except (DecodeError, WireError):
        return


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 8)), elements=st.floats(-100, 100, width=32)),
    st.sampled_from([(pb.DTYPE_F32, 0.0), (pb.DTYPE_F16, 2**-10), (pb.DTYPE_BF16, 2**-7), (pb.DTYPE_I8, None)]),
)
def test_tensors_survive_the_wire(values: np.ndarray, kind: tuple[int, float | None]) -> None:
    dtype, relative = kind
    data, scales = encode_rows(values, dtype)
    back = decode_rows(data, scales, rows=values.shape[0], hidden=values.shape[1], dtype=dtype)
    if relative is None:
        assert (np.abs(back - values) <= np.abs(values).max(axis=1, keepdims=True) / 127 * 0.51 + 1e-6).all()
    else:
        assert (np.abs(back - values) <= relative * np.abs(values) + (1e-7 if relative else 0)).all()


@given(st.binary(max_size=200), st.binary(max_size=40), SMALL, SMALL, DTYPES)
def test_only_exact_lengths_are_decoded(data: bytes, scales: bytes, rows: int, hidden: int, dtype: int) -> None:
    try:
        values = decode_rows(data, scales, rows=rows, hidden=hidden, dtype=dtype)
    except WireError:
        return
    width = {pb.DTYPE_F32: 4, pb.DTYPE_F16: 2, pb.DTYPE_BF16: 2, pb.DTYPE_I8: 1}[dtype]
    assert values.shape == (rows, hidden) and len(data) == rows * hidden * width
    assert len(scales) == (4 * rows if dtype == pb.DTYPE_I8 else 0)
