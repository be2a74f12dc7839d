"""Whole requests: from protobuf messages to engine types, everything checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lopa.v1 import common_pb2 as pb
from lopa.v1 import inference_pb2, tuning_pb2
from lopa.wire.errors import Reason, WireError
from lopa.wire.tensors import dtype_name

from lopa_server.engine.base import EngineSpec, InputSequence, PairRequest, SamplingParams
from lopa_server.limits import ServiceLimits
from lopa_server.tokenizing import PromptTokenizer
from lopa_server.validation.prompts import Ids, PromptChecker, below
from lopa_server.validation.sampling import SamplingChecker
from lopa_server.validation.softprompts import DTYPES, SoftPrompt, SoftPromptChecker


@dataclass(frozen=True)
class Applied:
    """The soft prompt that a reply's receipt speaks of."""

    digest: bytes
    rows: int
    offset: int
    """Real tokens before it."""


@dataclass(frozen=True)
class CheckedGenerate:
    input: InputSequence
    sampling: SamplingParams
    """Of the first continuation."""
    continuations: int
    applied: Applied | None


@dataclass(frozen=True)
class CheckedPair:
    pair: PairRequest
    applied: Applied | None


@dataclass(frozen=True)
class CheckedGradients:
    pairs: Sequence[CheckedPair]
    dtype: pb.DType.ValueType
    """Of the gradients in the reply."""


class RequestChecker:
    """Checks requests for one FM. Blocks (it tokenizes), and serves one thread at a time.

    All methods raise WireError with a field path such as `pairs[3].soft_prompt.data`.
    """

    def __init__(self, spec: EngineSpec, limits: ServiceLimits, tokenizer: PromptTokenizer) -> None:
        self._spec = spec
        self._limits = limits
        self._prompts = PromptChecker(spec, tokenizer)
        self._soft_prompts = SoftPromptChecker(spec, limits)
        self._sampling = SamplingChecker(spec, limits)

    @property
    def max_row_norm(self) -> float:
        """L2 norm of a soft-prompt row at most."""
        return self._soft_prompts.max_norm

    def generate(self, request: inference_pb2.GenerateRequest) -> CheckedGenerate:
        """A generate request."""
        self._fingerprint(request.fm_fingerprint)
        sequence, applied = self._input(request)
        with below("sampling"):
            sampling = self._sampling.check(request.sampling, len(sequence))
        self._context("prompt", len(sequence) + sampling.max_tokens)
        return CheckedGenerate(sequence, sampling, max(1, request.sampling.n), applied)

    def score(self, request: inference_pb2.ScoreRequest) -> list[CheckedPair]:
        """A score request's pairs."""
        self._fingerprint(request.fm_fingerprint)
        return self._pairs(request, soft_prompt_needed=False)

    def gradients(self, request: tuning_pb2.PromptGradientsRequest) -> CheckedGradients:
        """A gradient request."""
        self._fingerprint(request.fm_fingerprint)
        dtype = request.gradient_dtype or pb.DTYPE_F32
        if dtype not in DTYPES:
            accepted = ", ".join(dtype_name(known) for known in DTYPES)
            raise WireError(Reason.SOFT_PROMPT_DTYPE, "gradient_dtype", limit=accepted, found=dtype_name(dtype))
        return CheckedGradients(self._pairs(request, soft_prompt_needed=True), dtype)

    def _fingerprint(self, fingerprint: str) -> None:
        if fingerprint and fingerprint != self._spec.fingerprint:
            raise WireError(Reason.FINGERPRINT_MISMATCH, "fm_fingerprint", limit=self._spec.fingerprint, found=fingerprint)

    def _pairs(
        self, request: inference_pb2.ScoreRequest | tuning_pb2.PromptGradientsRequest, *, soft_prompt_needed: bool
    ) -> list[CheckedPair]:
        pairs = request.pairs
        if request.priority not in pb.Priority.values():
            raise WireError(Reason.OUT_OF_RANGE, "priority", limit="PRIORITY_NORMAL or PRIORITY_LOW", found=request.priority)
        low = request.priority == pb.PRIORITY_LOW
        if not pairs:
            raise WireError(Reason.MISSING_FIELD, "pairs")
        if len(pairs) > self._limits.max_pairs:
            raise WireError(Reason.TOO_MANY, "pairs", limit=self._limits.max_pairs, found=len(pairs))
        checked = []
        for index, pair in enumerate(pairs):
            with below(f"pairs[{index}]"):
                checked.append(self._pair(pair, soft_prompt_needed, low))
        return checked

    def _pair(self, pair: pb.Pair, soft_prompt_needed: bool, low_priority: bool) -> CheckedPair:
        if soft_prompt_needed and not pair.HasField("soft_prompt"):
            raise WireError(Reason.MISSING_FIELD, "soft_prompt")
        if not pair.HasField("target"):
            raise WireError(Reason.MISSING_FIELD, "target")
        with below("target"):
            target = self._prompts.target(pair.target)
        sequence, applied = self._input(pair)
        self._context("prompt", len(sequence) + len(target))
        return CheckedPair(PairRequest(sequence, target, low_priority=low_priority), applied)

    def _input(self, message: inference_pb2.GenerateRequest | pb.Pair) -> tuple[InputSequence, Applied | None]:
        """Prefix, soft prompt and prompt in the order that the placement says."""
        soft = None
        if message.HasField("soft_prompt"):
            with below("soft_prompt"):
                soft = self._soft_prompts.check(message.soft_prompt)
        prefix: Ids = ()
        if message.HasField("prefix"):
            with below("prefix"):
                prefix = self._prompts.prompt(message.prefix, first=True, chat=False)
        if not message.HasField("prompt"):
            raise WireError(Reason.MISSING_FIELD, "prompt")
        with below("prompt"):
            prompt = self._prompts.prompt(message.prompt, first=not prefix)
        sequence = _arranged(prefix, soft, prompt)
        self._context("prompt", len(sequence))
        applied = None if soft is None else Applied(soft.digest, sequence.rows, len(sequence.before))
        return sequence, applied

    def _context(self, field: str, needed: int) -> None:
        if needed > self._spec.context_length:
            raise WireError(Reason.CONTEXT_EXCEEDED, field, limit=self._spec.context_length, found=needed)


def _arranged(prefix: Ids, soft: SoftPrompt | None, prompt: Ids) -> InputSequence:
    """[soft][prefix][prompt], or [prefix][soft][prompt] (lopa.v1.Placement)."""
    if soft is None:
        return InputSequence((), None, prefix + prompt)
    if soft.after_prefix:
        return InputSequence(prefix, soft.values, prompt)
    return InputSequence((), soft.values, prefix + prompt)
