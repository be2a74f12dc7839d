"""Checks how tokens are to be chosen, and fills in what the client left open."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from lopa.v1 import inference_pb2
from lopa.wire.errors import Reason, WireError

from lopa_server.engine.base import EngineSpec, SamplingParams
from lopa_server.limits import ServiceLimits
from lopa_server.validation.schemas import check_schema


class SamplingChecker:
    """Knows what one FM and one server allow."""

    def __init__(self, spec: EngineSpec, limits: ServiceLimits) -> None:
        self._spec = spec
        self._limits = limits

    def check(self, message: inference_pb2.Sampling, input_length: int) -> SamplingParams:
        """The engine's parameters for one continuation after `input_length` positions.

        Raises:
            WireError: with a field path below the sampling (`top_p`, `stop[1]`, ...).
        """
        limits = self._limits
        self._at_most("max_tokens", message.max_tokens, limits.max_new_tokens)
        _within("temperature", message.temperature, 0, limits.max_temperature)
        top_p = message.top_p if message.HasField("top_p") else 1.0
        if not 0 < top_p <= 1:
            raise WireError(Reason.OUT_OF_RANGE, "top_p", limit="above 0 and at most 1", found=top_p)
        _within("min_p", message.min_p, 0, 1)
        repetition = message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
        _within("repetition_penalty", repetition, 1 / limits.max_repetition_penalty, limits.max_repetition_penalty)
        for name in ("presence_penalty", "frequency_penalty"):
            _within(name, getattr(message, name), -limits.max_penalty, limits.max_penalty)
        logprobs = message.logprobs if message.HasField("logprobs") else None
        self._at_most("logprobs", logprobs or 0, limits.max_logprobs)
        self._continuations(message)
        room = self._spec.context_length - input_length
        default = max(1, min(limits.default_new_tokens, limits.max_new_tokens, room))
        return SamplingParams(
            max_tokens=message.max_tokens or default,
            temperature=message.temperature,
            top_p=top_p,
            top_k=min(message.top_k, self._spec.vocab_size),
            min_p=message.min_p,
            repetition_penalty=repetition,
            presence_penalty=message.presence_penalty,
            frequency_penalty=message.frequency_penalty,
            logit_bias=self._bias(message.logit_bias),
            seed=message.seed if message.HasField("seed") else secrets.randbits(64),
            stop=self._stop(message.stop),
            logprobs=min(logprobs, self._spec.vocab_size) if logprobs is not None else None,
            ignore_end=message.ignore_end,
            json_schema=self._schema(message) if message.HasField("json_schema") else None,
        )

    def _schema(self, message: inference_pb2.Sampling) -> str:
        if not self._spec.json_schemas:
            raise WireError(Reason.UNSUPPORTED, "json_schema", found="this model's tokenizer can't be held to a schema")
        if message.ignore_end:
            raise WireError(Reason.UNSUPPORTED, "ignore_end", found="the schema says where the text ends")
        return check_schema(message.json_schema, self._limits)

    def _at_most(self, field: str, value: int, limit: int) -> None:
        if value > limit:
            raise WireError(Reason.OUT_OF_RANGE, field, limit=f"at most {limit}", found=value)

    def _continuations(self, message: inference_pb2.Sampling) -> None:
        self._at_most("n", message.n, self._limits.max_continuations)
        if message.n > 1 and message.temperature == 0:
            raise WireError(Reason.OUT_OF_RANGE, "n", limit="1 when temperature is 0, since all would be the same", found=message.n)

    def _bias(self, bias: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
        limits = self._limits
        if len(bias) > limits.max_logit_bias:
            raise WireError(Reason.TOO_MANY, "logit_bias", limit=limits.max_logit_bias, found=len(bias))
        for token, value in bias.items():
            if token >= self._spec.vocab_size:
                raise WireError(Reason.UNKNOWN_TOKEN, f"logit_bias[{token}]", limit=self._spec.vocab_size, found=token)
            _within(f"logit_bias[{token}]", value, -limits.max_bias, limits.max_bias)
        return tuple(sorted(bias.items()))

    def _stop(self, stop: Sequence[str]) -> tuple[str, ...]:
        limits = self._limits
        if len(stop) > limits.max_stop_strings:
            raise WireError(Reason.TOO_MANY, "stop", limit=limits.max_stop_strings, found=len(stop))
        for index, text in enumerate(stop):
            size = len(text.encode())
            if not 1 <= size <= limits.max_stop_bytes:
                limit = f"from 1 to {limits.max_stop_bytes} bytes long"
                raise WireError(Reason.OUT_OF_RANGE, f"stop[{index}]", limit=limit, found=f"{size} bytes long")
        return tuple(stop)


def _within(field: str, value: float, least: float, most: float) -> None:
    """Raises WireError for a value out of range; NaN is out of every range."""
    if not least <= value <= most:
        raise WireError(Reason.OUT_OF_RANGE, field, limit=f"from {least:g} to {most:g}", found=value)
