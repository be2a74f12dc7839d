"""What the engine thread knows about one request or one call while it is being served."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from lopa_server.engine.base import Delta, EngineFailed, Finish, GenerateRequest, InputSequence, PairRequest, PairResult
from lopa_server.engine.content import CacheScope, Content
from lopa_server.engine.mailbox import Receiver
from lopa_server.engine.pair_queue import PairCost, PairKind
from lopa_server.engine.sequences import SequenceState
from lopa_server.engine.text import Decode, TextStream
from lopa_server.engine.torch_engine.constraints import Constraint
from lopa_server.engine.torch_engine.sampling import Choice

MOST_MASKED = 1 << 28
"""Entries of a pair's mask behind its prefix, some nine bytes each while it is made. A pair that is computed whole needs none."""


class LiveStream:
    """A generate request from its first token to its last."""

    def __init__(
        self, request: GenerateRequest, receiver: Receiver, decode: Decode, end_ids: Sequence[int], constraint: Constraint | None = None
    ) -> None:
        self.request = request
        self.receiver = receiver
        self.constraint = constraint
        self.sampled = False
        """The sampler knows it."""
        self.generated = 0
        self._text = TextStream(decode, request.sampling.stop)
        self._end_ids = () if request.sampling.ignore_end else tuple(end_ids)

    @property
    def id(self) -> str:
        """The request's."""
        return self.request.id

    def sequence(self, scope: CacheScope, block_size: int) -> SequenceState:
        """What the scheduler knows of it."""
        request = self.request
        content = Content(scope.root(request.cache_salt), request.input, block_size)
        return SequenceState(request.id, content, request.tenant, request.sampling.max_tokens)

    @property
    def ends_by_text(self) -> bool:
        """Its end may depend on what its tokens spell."""
        return bool(self.request.sampling.stop)

    def take(self, choice: Choice) -> Finish | None:
        """Count a new token. Why it is the last one, as far as its text doesn't say so; None: others follow.

        Raises:
            EngineError: there is no token.
        """
        if choice.error is not None:
            raise choice.error
        self.generated += 1
        if choice.complete or choice.token_id in self._end_ids:
            return Finish.END
        return Finish.LENGTH if self.generated >= self.request.sampling.max_tokens else None

    def tell(self, choice: Choice, finish: Finish | None) -> Delta:
        """What the client is told about a token. finish: as `take` said; tokens are told in their order."""
        text = "" if choice.token_id in self._end_ids else self._text.push(choice.token_id)
        if finish is not None and not self._text.stopped:
            text += self._text.finish()
        if self._text.stopped:
            finish = Finish.STOP
        logprobs = () if choice.logprobs is None else (choice.logprobs,)
        return Delta(text, (choice.token_id,), logprobs, finish)


@dataclasses.dataclass(frozen=True)
class Untold:
    """A token that counts, and of which the client doesn't know yet."""

    stream: LiveStream
    choice: Choice
    finish: Finish | None
    """As `LiveStream.take` said."""


@dataclasses.dataclass
class LiveJob:
    """A call's pairs until the last one is computed."""

    id: str
    kind: PairKind
    pairs: Sequence[PairRequest]
    receiver: Receiver
    results: dict[int, PairResult] = dataclasses.field(default_factory=dict)
    costs: list[PairCost] = dataclasses.field(default_factory=list)
    """What the scheduler knows of its pairs."""

    def measure(self, scope: CacheScope, block_size: int) -> list[PairCost]:
        """Set `costs`. A prefix is computed apart if it fills a block and what is left behind it, never nothing, isn't too much."""
        self.costs = []
        for pair in self.pairs:
            read = pair.input
            prefix = min(len(read.before), len(read) - 1)
            content = None
            if prefix >= block_size and (len(pair) - prefix) * len(pair) <= MOST_MASKED:
                content = Content(scope.root(pair.cache_salt), InputSequence(read.before[:prefix], None, ()), block_size)
            self.costs.append(PairCost(len(pair), len(pair.target), prefix if content is not None else 0, content))
        return self.costs

    def accept(self, index: int, result: PairResult) -> list[PairResult] | None:
        """Take one pair's result in; all results in order once they are complete.

        Raises:
            EngineFailed: the FM gave values that aren't numbers.
        """
        if not math.isfinite(result.nll_sum) or (result.gradient is not None and not np.isfinite(result.gradient).all()):
            raise EngineFailed(f"pair {index} of {self.id}: loss or gradient is not finite")
        self.results[index] = result
        if len(self.results) < len(self.pairs):
            return None
        return [self.results[position] for position in range(len(self.pairs))]
