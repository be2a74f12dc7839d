"""From reply messages to checked values. Nothing of a reply that breaks the contract gets through.

Legend: m soft-prompt rows, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from lopa.errors import ProtocolError
from lopa.protocol.requests import DTYPES
from lopa.v1 import catalog_pb2, common_pb2, inference_pb2, tuning_pb2
from lopa.values import (
    Delta,
    Dtype,
    FinishReason,
    Generation,
    Limits,
    Model,
    PairGradient,
    PairScore,
    Receipt,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from lopa.wire.errors import WireError
from lopa.wire.tensors import decode_rows, dtype_name, soft_prompt_digest

FINISH: Mapping[int, FinishReason] = {
    inference_pb2.FINISH_REASON_END: "end",
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}


def parse_model(info: catalog_pb2.ModelInfo) -> Model:
    """A typed Model.

    Raises:
        ProtocolError: no hidden size, no fingerprint, or limits that allow nothing.
    """
    limits = info.limits
    if not info.hidden_size or len(info.fingerprint) != 64 or not limits.max_pairs or not limits.max_message_bytes:
        raise ProtocolError("the server's ModelInfo lacks a hidden size, a fingerprint or limits; it speaks another version of lopa.v1")
    return Model(
        name=info.name,
        fingerprint=info.fingerprint,
        revision=info.revision,
        hidden_size=info.hidden_size,
        context_length=info.context_length,
        vocab_size=info.vocab_size,
        limits=Limits(**{field.name: getattr(limits, field.name) for field in limits.DESCRIPTOR.fields}),
        soft_prompt_dtypes=tuple(cast(Dtype, dtype_name(dtype)) for dtype in info.soft_prompt_dtypes if dtype in DTYPES.values()),
        features=tuple(
            catalog_pb2.Feature.Name(feature).removeprefix("FEATURE_").lower()
            for feature in info.features
            if feature in catalog_pb2.Feature.values()
        ),
        bundle_id=info.bundle_id,
        bundle_bytes=info.bundle_bytes,
        server_version=info.server_version,
    )


def check_receipt(receipt: common_pb2.Receipt | None, sent: common_pb2.SoftPrompt | None, revision: str, where: str) -> Receipt | None:
    """Compare a receipt with the soft prompt that was sent. None in, None out: without a soft prompt there must be no receipt.

    Raises:
        ProtocolError: the receipt is missing, or names another digest, row count, placement or model revision.
    """
    if sent is None:
        if receipt is not None:
            raise ProtocolError(f"{where}: the server says it applied a soft prompt, but none was sent")
        return None
    if receipt is None:
        raise ProtocolError(f"{where}: the soft prompt was sent, but the server gave no receipt that it was applied")
    digest = soft_prompt_digest(sent)
    facts: list[tuple[str, object, object]] = [
        ("digest", receipt.soft_prompt_sha256.hex(), digest.hex()),
        ("rows", receipt.rows, sent.rows),
        ("model revision", receipt.model_revision, revision),
    ]
    if sent.placement != common_pb2.PLACEMENT_AFTER_PREFIX:
        facts.append(("offset", receipt.offset, 0))
    for name, got, expected in facts:
        if got != expected:
            raise ProtocolError(
                f"{where}: the receipt's {name} is {got}, but {expected} was sent: the personal prompt was not applied as it is"
            )
    return Receipt(digest.hex(), receipt.rows, receipt.offset, receipt.model_revision)


def receipt_of(
    message: inference_pb2.GenerateResponse | inference_pb2.PairScore | tuning_pb2.PairGradient,
) -> common_pb2.Receipt | None:
    """A reply's receipt, None when it has none."""
    return message.receipt if message.HasField("receipt") else None


def check_scores(reply: Sequence[inference_pb2.PairScore], sent: Sequence[common_pb2.Pair], revision: str) -> list[PairScore]:
    """Scores in the order of the request, receipts verified.

    Raises:
        ProtocolError: another number of scores, no target tokens, a sum that is not finite, or a wrong receipt.
    """
    return [PairScore(nll, tokens) for nll, tokens in _check_sums(reply, sent, revision, "scores")]


def check_gradients(
    reply: Sequence[tuning_pb2.PairGradient], sent: Sequence[common_pb2.Pair], revision: str, dtype: int
) -> list[PairGradient]:
    """Gradients in the order of the request, receipts verified.

    Raises:
        ProtocolError: as `check_scores`, or a gradient of another shape, dtype or length, or with values that are not finite.
    """
    sums = _check_sums(reply, sent, revision, "gradients")
    result = []
    for i, (pair, item, (nll, tokens)) in enumerate(zip(sent, reply, sums, strict=True)):
        got, soft, where = item.gradient, pair.soft_prompt, f"gradients[{i}]"
        if (got.rows, got.hidden, got.dtype) != (soft.rows, soft.hidden, dtype):
            found = f"({got.rows}, {got.hidden}) {dtype_name(got.dtype)}"
            raise ProtocolError(f"{where} is {found}; ({soft.rows}, {soft.hidden}) {dtype_name(dtype)} was asked for")
        try:
            values = decode_rows(got.data, got.scales, rows=got.rows, hidden=got.hidden, dtype=got.dtype)
        except WireError as error:
            raise ProtocolError(f"{where}: {error}") from error
        if not np.isfinite(values).all():
            raise ProtocolError(f"{where} has values that are not finite")
        result.append(PairGradient(nll, tokens, values))
    return result


def _check_sums(
    reply: Sequence[inference_pb2.PairScore | tuning_pb2.PairGradient],
    sent: Sequence[common_pb2.Pair],
    revision: str,
    name: str,
) -> list[tuple[float, int]]:
    if len(reply) != len(sent):
        raise ProtocolError(f"the server answered {len(reply)} {name} for {len(sent)} pairs")
    for i, (pair, item) in enumerate(zip(sent, reply, strict=True)):
        if item.target_tokens < 1 or not np.isfinite(item.nll_sum):
            raise ProtocolError(f"{name}[{i}] has nll_sum {item.nll_sum} over {item.target_tokens} tokens")
        check_receipt(receipt_of(item), pair.soft_prompt if pair.HasField("soft_prompt") else None, revision, f"{name}[{i}]")
    return [(item.nll_sum, item.target_tokens) for item in reply]


def _token_logprob(message: inference_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(message.token_id, message.logprob)


class GenerationReader:
    """Turns a stream of replies into deltas and, at its end, a verified Generation."""

    def __init__(self, request: inference_pb2.GenerateRequest) -> None:
        self._request = request
        self._deltas: list[list[Delta]] = [[] for _ in range(max(1, request.sampling.n))]
        self._reasons: dict[int, FinishReason] = {}
        self._last: inference_pb2.GenerateResponse | None = None

    def feed(self, message: inference_pb2.GenerateResponse) -> Delta:
        """The delta of one reply.

        Raises:
            ProtocolError: more of a continuation after its last one, one that nobody asked for, or logprobs that don't fit the tokens.
        """
        index = message.index
        if index in self._reasons:
            raise ProtocolError("the server went on after the generation's end")
        if index >= len(self._deltas):
            raise ProtocolError(f"the server sent continuation {index}; {len(self._deltas)} were asked for")
        if self._request.sampling.HasField("logprobs") and len(message.logprobs) != len(message.token_ids):
            raise ProtocolError(f"the server gave {len(message.logprobs)} logprobs for {len(message.token_ids)} tokens")
        logprobs = tuple(
            TokenLogprobs(_token_logprob(row.chosen), tuple(map(_token_logprob, row.alternatives))) for row in message.logprobs
        )
        delta = Delta(message.text, tuple(message.token_ids), logprobs, index)
        self._deltas[index].append(delta)
        if message.finish_reason in FINISH:
            self._reasons[index] = FINISH[message.finish_reason]
        if len(self._reasons) == len(self._deltas):
            self._last = message
        return delta

    @property
    def revision(self) -> str | None:
        """The model revision that the receipt names; None without one."""
        receipt = receipt_of(self._last) if self._last is not None else None
        return receipt.model_revision if receipt is not None else None

    def finish(self, revision: str) -> Generation:
        """The whole text, once the stream has ended.

        Raises:
            ProtocolError: the stream ended without a finish reason, or the receipt doesn't fit.
        """
        last = self._last
        if last is None:
            raise ProtocolError("the server's stream ended without a finish reason")
        sent = self._request.soft_prompt if self._request.HasField("soft_prompt") else None
        receipt = check_receipt(receipt_of(last), sent, revision, "generation")
        first, *others = (self._generation(index, last.usage, receipt) for index in range(len(self._deltas)))
        return replace(first, others=tuple(others))

    def _generation(self, index: int, usage: common_pb2.Usage, receipt: Receipt | None) -> Generation:
        deltas = self._deltas[index]
        token_ids = tuple(token for delta in deltas for token in delta.token_ids)
        completion = usage.completion_tokens if len(self._deltas) == 1 else len(token_ids)
        return Generation(
            text="".join(delta.text for delta in deltas),
            token_ids=token_ids,
            logprobs=tuple(row for delta in deltas for row in delta.logprobs),
            finish_reason=self._reasons[index],
            usage=Usage(usage.prompt_tokens, usage.virtual_tokens, completion),
            receipt=receipt,
        )
