"""From the caller's values to request messages. Legend: m soft-prompt rows, d hidden size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar, cast

import numpy as np

from lopa.errors import InvalidRequest
from lopa.v1 import common_pb2, inference_pb2
from lopa.values import Dtype, Float32, Message, Pair, Placement, Prompt, Sampling, Target, unicode_text
from lopa.wire.tensors import ITEM_BYTES, soft_prompt_message

DTYPES: Mapping[str, common_pb2.DType.ValueType] = {
    "F32": common_pb2.DTYPE_F32,
    "F16": common_pb2.DTYPE_F16,
    "BF16": common_pb2.DTYPE_BF16,
    "I8": common_pb2.DTYPE_I8,
}
PLACEMENTS: Mapping[str, common_pb2.Placement.ValueType] = {
    "front": common_pb2.PLACEMENT_FRONT,
    "after_prefix": common_pb2.PLACEMENT_AFTER_PREFIX,
}


Code = TypeVar("Code", bound=int)


def _choice(table: Mapping[str, Code], value: str, field: str) -> Code:
    if value not in table:
        raise InvalidRequest(
            f"{field} is {value!r}; it must be one of {', '.join(table)}", field=field, limit=", ".join(table), found=value
        )
    return table[value]


def dtype_code(dtype: Dtype, field: str = "dtype") -> common_pb2.DType.ValueType:
    """The wire's number of a dtype.

    Raises:
        InvalidRequest: an unknown name.
    """
    return _choice(DTYPES, dtype, field)


def _token_ids(ids: Sequence[object], field: str) -> common_pb2.TokenIds:
    if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) and 0 <= i < 1 << 32 for i in ids):
        raise InvalidRequest(f"{field} must be text, chat messages or token ids (integers from 0 on)", field=field, limit="token ids")
    return common_pb2.TokenIds(ids=[int(cast(int, i)) for i in ids])


def _chat(turns: Sequence[object], field: str) -> common_pb2.Chat:
    messages = []
    for i, turn in enumerate(turns):
        role, content = (turn.role, turn.content) if isinstance(turn, Message) else _mapping_turn(turn)
        if not isinstance(role, str) or not isinstance(content, str):
            raise InvalidRequest(f"{field}[{i}] must have a role and a content, both text", field=f"{field}[{i}]", limit="role, content")
        messages.append(
            common_pb2.ChatMessage(role=unicode_text(role, f"{field}[{i}].role"), content=unicode_text(content, f"{field}[{i}].content"))
        )
    return common_pb2.Chat(messages=messages)


def _mapping_turn(turn: object) -> tuple[object, object]:
    return (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)


def prompt_message(prompt: Prompt, field: str = "prompt") -> common_pb2.Prompt:
    """A Prompt message from text, chat messages or token ids.

    Raises:
        InvalidRequest: of none of these forms, or text with a lone surrogate.
    """
    if isinstance(prompt, str):
        return common_pb2.Prompt(text=unicode_text(prompt, field))
    items: list[object] = list(prompt)
    if items and isinstance(items[0], Message | Mapping):
        return common_pb2.Prompt(chat=_chat(items, field))
    return common_pb2.Prompt(tokens=_token_ids(items, field))


def target_message(target: Target, append_end: bool, field: str = "target") -> common_pb2.Target:
    """A Target message from text or token ids.

    Raises:
        InvalidRequest: of neither form, or text with a lone surrogate.
    """
    if isinstance(target, str):
        return common_pb2.Target(text=unicode_text(target, field), append_end=append_end)
    return common_pb2.Target(tokens=_token_ids(list(target), field), append_end=append_end)


def sampling_message(sampling: Sampling) -> inference_pb2.Sampling:
    """A Sampling message.

    Raises:
        InvalidRequest: a value of a type or size that the wire can't carry, or no token at all, which on the wire stands for the
        server's default. The server checks the other ranges.
    """
    if sampling.max_tokens == 0:
        raise InvalidRequest("sampling.max_tokens is 0: ask for 1 at least", field="sampling.max_tokens", limit="1", found="0")
    try:
        return inference_pb2.Sampling(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=dict(sampling.logit_bias),
            seed=sampling.seed,
            stop=list(sampling.stop),
            logprobs=sampling.logprobs,
            ignore_end=sampling.ignore_end,
            n=sampling.n,
            json_schema=_schema_text(sampling.json_schema),
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"sampling: {error}", field="sampling", found=str(sampling)[:200]) from error


def _schema_text(schema: Mapping[str, object] | str | None) -> str | None:
    """Raises TypeError or ValueError for what JSON can't write."""
    return schema if schema is None or isinstance(schema, str) else json.dumps(schema, allow_nan=False)


def soft_prompt(rows: Float32, dtype: Dtype, placement: Placement) -> common_pb2.SoftPrompt:
    """A SoftPrompt message for (m, d) rows.

    Raises:
        InvalidRequest: not two axes, or an unknown dtype or placement.
    """
    if rows.ndim != 2:
        raise InvalidRequest(f"soft_prompt has shape {rows.shape}; it must be (rows, hidden size)", field="soft_prompt", limit="2 axes")
    place = _choice(PLACEMENTS, placement, "placement")
    return soft_prompt_message(rows, dtype_code(dtype, "soft_prompt.dtype"), place)


def generate_request(
    prompt: Prompt,
    sampling: Sampling,
    *,
    prefix: str | Sequence[int] | None,
    soft: common_pb2.SoftPrompt | None,
    fingerprint: str,
) -> inference_pb2.GenerateRequest:
    """A GenerateRequest tied to the FM of this fingerprint."""
    return inference_pb2.GenerateRequest(
        prompt=prompt_message(prompt),
        prefix=None if prefix is None else prompt_message(prefix, "prefix"),
        soft_prompt=soft,
        sampling=sampling_message(sampling),
        fm_fingerprint=fingerprint,
    )


def pair_message(pair: Pair, dtype: Dtype, placement: Placement, field: str) -> common_pb2.Pair:
    """A Pair message; errors name `field`."""
    return common_pb2.Pair(
        prefix=None if pair.prefix is None else prompt_message(pair.prefix, f"{field}.prefix"),
        prompt=prompt_message(pair.prompt, f"{field}.prompt"),
        target=target_message(pair.target, pair.append_end, f"{field}.target"),
        soft_prompt=None if pair.soft_prompt is None else soft_prompt(pair.soft_prompt, dtype, placement),
    )


def split_pairs(
    pairs: Sequence[common_pb2.Pair], *, max_pairs: int, max_bytes: int, reply_dtype: int | None = None
) -> Iterator[list[common_pb2.Pair]]:
    """Cut pairs, in order, into requests of at most `max_pairs` pairs whose request and reply
    stay below `max_bytes`.

    reply_dtype: the gradients' dtype when the reply brings gradients. A single pair that is too large goes alone:
    the server refuses it by name.
    """
    overhead = 512  # fingerprint, receipt, lengths
    batch: list[common_pb2.Pair] = []
    used = overhead
    for pair in pairs:
        soft = pair.soft_prompt
        reply = soft.rows * soft.hidden * ITEM_BYTES[reply_dtype] + 4 * soft.rows if reply_dtype is not None else 0
        size = max(pair.ByteSize(), reply) + overhead
        if batch and (len(batch) >= max_pairs or used + size > max_bytes):
            yield batch
            batch, used = [], overhead
        batch.append(pair)
        used += size
    if batch:
        yield batch
