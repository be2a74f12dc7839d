"""From a request message to the engine and back. Knows protobuf and the engine, no gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import secrets
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from lopa.noise import ClipAndNoise
from lopa.v1 import common_pb2 as pb
from lopa.v1 import inference_pb2, tuning_pb2
from lopa.values import Float32
from lopa.wire.tensors import encode_rows

from lopa_server.engine.base import Delta, Engine, Finish, GenerateRequest, PairRequest, PairResult, TokenLogprobs
from lopa_server.engine.randomness import continuation_seed
from lopa_server.identity.caller import cache_salt
from lopa_server.metering.meter import MeteredCall
from lopa_server.service.continuations import interleaved
from lopa_server.validation.requests import Applied, CheckedGenerate, CheckedPair, RequestChecker

Request = TypeVar("Request")
Checked = TypeVar("Checked")

FINISH = {
    Finish.END: inference_pb2.FINISH_REASON_END,
    Finish.STOP: inference_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


class RequestHandlers:
    """Generate, Score and PromptGradients over any engine."""

    def __init__(
        self,
        engine: Engine,
        checker: RequestChecker,
        revision: str,
        salt_secret: bytes | None = None,
        noise: ClipAndNoise | None = None,
    ) -> None:
        """
        Args:
            revision: ModelInfo.revision, for the receipts.
            salt_secret: what cache salts are made with; None draws one.
            noise: put on every gradient that leaves.
        """
        self._engine = engine
        self._checker = checker
        self._revision = revision
        self._salt_secret = salt_secret or secrets.token_bytes(32)
        self._noise, self._rng = noise, np.random.default_rng()
        self._numbers = itertools.count(1)
        self._checking = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lopa-validation")

    def close(self) -> None:
        """End the validation thread."""
        self._checking.shutdown()

    async def _check(self, check: Callable[[Request], Checked], request: Request) -> Checked:
        """Validate beside the loop: tokenizing a long text must not delay other calls' streams or health checks."""
        return await asyncio.get_running_loop().run_in_executor(self._checking, check, request)

    async def generate(
        self, request: inference_pb2.GenerateRequest, call: MeteredCall, deadline: float | None = None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """The stream of deltas; usage and receipt in the last one. deadline: as in the engine's `GenerateRequest`."""
        checked = await self._check(self._checker.generate, request)
        call.spend(tokens=len(checked.input) * checked.continuations)
        streams = [self._engine.generate(work) for work in self._works(checked, call, deadline)]
        generated, going = 0, len(streams)
        async with contextlib.aclosing(interleaved(streams)) as deltas:
            async for index, delta in deltas:
                generated += len(delta.token_ids)
                call.generated(len(delta.token_ids))
                going -= delta.finish is not None
                response = _delta_message(delta, index)
                if not going:
                    self._complete(response, checked, generated)
                yield response

    def _works(self, checked: CheckedGenerate, call: MeteredCall, deadline: float | None) -> list[GenerateRequest]:
        """One request to the engine for each continuation, with a seed of its own."""
        number, sampling = next(self._numbers), checked.sampling
        salt = cache_salt(self._salt_secret, call.caller.tenant)
        return [
            GenerateRequest(
                f"generate-{number}.{index}",
                checked.input,
                dataclasses.replace(sampling, seed=continuation_seed(sampling.seed, index)),
                tenant=call.caller.tenant,
                deadline=deadline,
                cache_salt=salt,
            )
            for index in range(checked.continuations)
        ]

    async def score(
        self, request: inference_pb2.ScoreRequest, call: MeteredCall, deadline: float | None = None
    ) -> inference_pb2.ScoreResponse:
        """Likelihoods in the order of the request."""
        checked = await self._check(self._checker.score, request)
        results = await self._engine.score(self._admitted(checked, call, deadline))
        response = inference_pb2.ScoreResponse()
        for result, pair in zip(results, checked, strict=True):
            response.scores.append(
                inference_pb2.PairScore(nll_sum=result.nll_sum, target_tokens=result.target_tokens, receipt=self._receipt(pair.applied))
            )
        return response

    async def prompt_gradients(
        self, request: tuning_pb2.PromptGradientsRequest, call: MeteredCall, deadline: float | None = None
    ) -> tuning_pb2.PromptGradientsResponse:
        """Likelihoods and gradients in the order of the request."""
        checked = await self._check(self._checker.gradients, request)
        results = await self._engine.prompt_gradients(self._admitted(checked.pairs, call, deadline))
        messages = await self._check(lambda pairs: self._gradient_messages(pairs, results, checked.dtype), checked.pairs)
        return tuning_pb2.PromptGradientsResponse(gradients=messages)

    def _admitted(self, pairs: Sequence[CheckedPair], call: MeteredCall, deadline: float | None) -> list[PairRequest]:
        """What the engine gets, once the tenant's limits allow it."""
        call.spend(tokens=sum(len(checked.pair) for checked in pairs), pairs=len(pairs))
        salt = cache_salt(self._salt_secret, call.caller.tenant)
        return [dataclasses.replace(checked.pair, tenant=call.caller.tenant, deadline=deadline, cache_salt=salt) for checked in pairs]

    def _gradient_messages(
        self, pairs: Iterable[CheckedPair], results: Iterable[PairResult], dtype: pb.DType.ValueType
    ) -> list[tuning_pb2.PairGradient]:
        return [
            tuning_pb2.PairGradient(
                nll_sum=result.nll_sum,
                target_tokens=result.target_tokens,
                gradient=_gradient_message(self._returned(result), dtype),
                receipt=self._receipt(pair.applied),
            )
            for result, pair in zip(results, pairs, strict=True)
        ]

    def _returned(self, result: PairResult) -> Float32:
        """The gradient that its device gets."""
        if result.gradient is None:
            raise TypeError("the engine gave no gradient for a pair that asked for one")
        return result.gradient if self._noise is None else self._noise(result.gradient, self._rng)

    def _complete(self, response: inference_pb2.GenerateResponse, checked: CheckedGenerate, generated: int) -> None:
        """What only the last message carries."""
        usage = pb.Usage(prompt_tokens=checked.input.tokens, virtual_tokens=checked.input.rows, completion_tokens=generated)
        response.usage.CopyFrom(usage)
        receipt = self._receipt(checked.applied)
        if receipt is not None:
            response.receipt.CopyFrom(receipt)

    def _receipt(self, applied: Applied | None) -> pb.Receipt | None:
        if applied is None:
            return None
        return pb.Receipt(soft_prompt_sha256=applied.digest, rows=applied.rows, offset=applied.offset, model_revision=self._revision)


def _delta_message(delta: Delta, index: int) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=[_logprobs_message(entry) for entry in delta.logprobs],
        finish_reason=FINISH[delta.finish] if delta.finish else inference_pb2.FINISH_REASON_UNSPECIFIED,
        index=index,
    )


def _logprobs_message(entry: TokenLogprobs) -> inference_pb2.TokenLogprobs:
    chosen, *others = (
        inference_pb2.TokenLogprob(token_id=one.token_id, logprob=one.logprob) for one in (entry.chosen, *entry.alternatives)
    )
    return inference_pb2.TokenLogprobs(chosen=chosen, alternatives=others)


def _gradient_message(gradient: Float32, dtype: pb.DType.ValueType) -> pb.SoftPromptGradient:
    data, scales = encode_rows(gradient, dtype)
    rows, hidden = gradient.shape
    return pb.SoftPromptGradient(rows=rows, hidden=hidden, dtype=dtype, data=data, scales=scales)
