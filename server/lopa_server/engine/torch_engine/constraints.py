"""Text that follows a JSON schema: which tokens a request may take next, by llguidance.

llguidance follows the grammar as the text grows and never builds a whole automaton, so that a schema is ready in
milliseconds. Masks are computed in threads of their own beside the FM's forward pass, and waited for only so long: a schema
that is slow costs its own request, never the batch.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray

from lopa_server.engine.base import EngineSpec, QueueFull, UnsupportedSchema
from lopa_server.engine.schema_probe import LIMITS, grammar_of, problem_with

log = logging.getLogger(__name__)

STEP_SECONDS = 1.0
"""How long a step waits for a mask. Ordinary ones take well under a millisecond and are ready before they are asked for."""
MASK_THREADS = 4
KNOWN_SCHEMAS = 256
"""Schemas whose verdict is remembered."""
WAITING_SCHEMAS = 16
"""Schemas that may wait to be looked at; each takes at most some seconds."""


class Constraint:
    """One request's place in its grammar. Used by the engine thread; its next mask is computed beside it."""

    def __init__(self, matcher: LLMatcher, words: int, pool: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._bits = np.zeros(words, dtype=np.int32)
        self.everything = np.full(words, -1, dtype=np.int32)
        """A mask that leaves all tokens."""
        self._pool = pool
        self._ready: Future[None] = pool.submit(self._fill)

    def mask(self) -> NDArray[np.int32]:
        """One bit for each token that may come next.

        Raises:
            UnsupportedSchema: the schema is too complex to follow any further.
        """
        try:
            self._ready.result(STEP_SECONDS)
        except TimeoutError as error:
            raise UnsupportedSchema("it takes too long to follow") from error
        self._check()
        return self._bits

    def follow(self, token: int) -> bool:
        """The text goes on with this token; whether it is complete.

        Raises:
            UnsupportedSchema: as `mask`.
        """
        self._matcher.consume_token(token)
        self._check()
        if self._matcher.is_stopped():
            return True
        self._ready = self._pool.submit(self._fill)
        return False

    def _fill(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UnsupportedSchema(self._matcher.get_error().splitlines()[0])


class Grammars:
    """Makes constraints from JSON schemas, for one FM. Used on the asyncio loop; everything slow happens elsewhere."""

    def __init__(self, tokenizer: LLTokenizer, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._words = (vocabulary + 31) // 32
        self._masks = ThreadPoolExecutor(MASK_THREADS, thread_name_prefix="lopa-mask")
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="lopa-schema")
        self._waiting = 0
        self._verdicts: OrderedDict[str, str] = OrderedDict()

    @classmethod
    def of(cls, tokenizer: Any, spec: EngineSpec) -> Grammars | None:
        """None when llguidance can't read this tokenizer: then texts can't be constrained."""
        try:
            return cls(from_tokenizer(tokenizer, n_vocab=spec.vocab_size, eos_token=list(spec.end_ids) or None), spec.vocab_size)
        except Exception as error:
            log.warning("JSON schemas are not offered, llguidance can't read the tokenizer: %s", error)
            return None

    async def constraint(self, schema: str) -> Constraint:
        """A constraint at its beginning.

        Raises:
            UnsupportedSchema: it can't be compiled in bounded time and memory; the message says why.
            QueueFull: too many schemas are waiting.
        """
        if self._waiting >= WAITING_SCHEMAS:
            raise QueueFull("schema queue", self._waiting, WAITING_SCHEMAS, 1.0)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compiling, self._compile, schema)
        finally:
            self._waiting -= 1

    def begin(self, schema: str) -> Constraint:
        """A constraint from a schema that is known to compile. Blocks for some milliseconds."""
        return Constraint(LLMatcher(self._tokenizer, grammar_of(schema), log_level=0, limits=LIMITS), self._words, self._masks)

    def close(self) -> None:
        """End the threads; a mask that is being computed is not waited for."""
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self._masks.shutdown(wait=False, cancel_futures=True)

    def _compile(self, schema: str) -> Constraint:
        problem = self._verdicts.pop(schema, None)
        if problem is None:
            problem = problem_with(schema)
        self._verdicts[schema] = problem
        if len(self._verdicts) > KNOWN_SCHEMAS:
            self._verdicts.popitem(last=False)
        if problem:
            raise UnsupportedSchema(problem)
        return self.begin(schema)


def allowed_tokens(masks: Sequence[NDArray[np.int32]], vocabulary: int) -> torch.Tensor:
    """(c, v) bool from c masks of one bit a token."""
    bits = np.unpackbits(np.stack(masks).view(np.uint8), axis=1, bitorder="little", count=vocabulary)
    return torch.from_numpy(bits.view(np.bool_))
