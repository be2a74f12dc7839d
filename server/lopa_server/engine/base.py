"""The seam between the service and whoever runs the foundation model (FM): the `Engine` protocol and its types.

No protobuf, no torch: token ids, numpy arrays and plain values that the service has already checked.
Legend: m soft-prompt rows, d hidden size, t tokens.

    UnsupportedModel       this engine can't serve that model
    EngineError
    ├── QueueFull          too much is waiting; try again after `retry_after` seconds
    ├── DeadlineTooShort   it would not be done in time
    ├── UnsupportedSchema  a JSON schema that texts can't be held to
    ├── EngineStopped      the engine is shutting down or has been stopped
    ├── EngineRestarting   it has failed, and another one is on its way
    └── EngineFailed       a computation failed; only the request that asked for it is lost
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


class UnsupportedModel(ValueError):
    """A model that an engine can't serve correctly; it says so before anybody is served. The message says why."""


class EngineError(RuntimeError):
    """Anything that an engine reports instead of an answer."""

    trace: str = ""
    """Where it happened, when that was in another process; without the messages of exceptions."""


class QueueFull(EngineError):
    """`queue` holds `waiting` entries and takes at most `limit`. `retry_after`: seconds until there should be room."""

    def __init__(self, queue: str, waiting: int, limit: int, retry_after: float) -> None:
        super().__init__(f"{queue} is full: {waiting} waiting, the limit is {limit}")
        self.queue, self.waiting, self.limit, self.retry_after = queue, waiting, limit, retry_after


class DeadlineTooShort(EngineError):
    """At the measured pace about `needed` seconds are needed, and the deadline leaves `left`.

    retry_after: seconds until as much time would do; None: it never would.
    """

    def __init__(self, needed: float, left: float, retry_after: float | None) -> None:
        super().__init__(f"about {needed:.1f} s are needed, {left:.1f} s are left")
        self.needed, self.left, self.retry_after = needed, left, retry_after


class UnsupportedSchema(EngineError):
    """A JSON schema that can't be followed within bounded time and memory. The message says why, and may go to the client."""


class EngineStopped(EngineError):
    """The engine takes no more work, and gave up what it still had."""


class EngineRestarting(EngineError):
    """The engine failed with this request in it, or is not back yet. Nothing of the request is kept: it may be sent again."""


class EngineFailed(EngineError):
    """The computation for this request failed. The message is for the log, never for a client."""


@dataclass(frozen=True)
class InputSequence:
    """What the FM reads, in order: `before`, then the rows of `soft`, then `after`. At least one position in all.

    soft: (m, d) float32 rows of the FM's input-embedding space, or None for the plain FM.
    """

    before: tuple[int, ...]
    soft: Float32 | None
    after: tuple[int, ...]

    @property
    def rows(self) -> int:
        """m, 0 without a soft prompt."""
        return 0 if self.soft is None else self.soft.shape[0]

    @property
    def tokens(self) -> int:
        """Real tokens, soft rows not counted."""
        return len(self.before) + len(self.after)

    def __len__(self) -> int:
        return self.tokens + self.rows


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. The defaults change nothing. Penalties see real tokens only, never soft rows."""

    max_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over tokens of prompt and text."""
    presence_penalty: float = 0.0
    """Over tokens of the text."""
    frequency_penalty: float = 0.0
    """Over tokens of the text, once for each time."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, each at most once, and what is added to their logits."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    """Alternatives per token besides the chosen one; None: no logprobs at all."""
    ignore_end: bool = False
    json_schema: str | None = None
    """The text is a JSON document that satisfies this schema; it ends where the document is complete."""


@dataclass(frozen=True)
class GenerateRequest:
    """One stream of tokens. `id` is unique among the engine's live requests."""

    id: str
    input: InputSequence
    sampling: SamplingParams
    tenant: str = ""
    """Whose request it is: the waiting queue shares out the batch between tenants."""
    deadline: float | None = None
    """When the answer is worth nothing any more, in seconds of time.monotonic()."""
    cache_salt: bytes = b""
    """Computed prefixes are reused among requests of equal salt only; derived from who is authenticated, never sent by a client."""


class Finish(Enum):
    """Why a stream ended."""

    END = "end"
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class Logprob:
    """Natural logarithm of a token's probability under the FM, before temperature and truncation."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs:
    """The chosen token and the likeliest alternatives, best first."""

    chosen: Logprob
    alternatives: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Delta:
    """What is new since the last delta. Texts of all deltas in order are the whole text; only whole characters.

    finish is set in the last delta only.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True)
class PairRequest:
    """A likelihood to measure: `target` (at least one token id) after `input`."""

    input: InputSequence
    target: tuple[int, ...]
    tenant: str = ""
    """Whose pair it is. All pairs of a call are of one tenant."""
    deadline: float | None = None
    """As in `GenerateRequest`; the same for all pairs of a call."""
    cache_salt: bytes = b""
    """As in `GenerateRequest`."""
    low_priority: bool = False
    """May wait for everybody else's pairs."""

    def __len__(self) -> int:
        return len(self.input) + len(self.target)


@dataclass(frozen=True)
class PairResult:
    """Sum over the target's tokens of -ln p(token | what stands before it).

    gradient: of that sum with respect to the soft rows, (m, d) float32; None when only the score was asked for.
    """

    nll_sum: float
    target_tokens: int
    gradient: Float32 | None = None


@dataclass(frozen=True)
class EngineSpec:
    """What an engine runs. Everything that validation needs to know."""

    name: str
    fingerprint: str
    """As lopa.fingerprint defines it: 64 hex digits."""
    hidden_size: int
    """d, the width of the FM's input embeddings."""
    context_length: int
    """Positions at most: soft rows, prompt and generated tokens together."""
    vocab_size: int
    """Token ids are below this: rows of the FM's embedding table."""
    compute_dtype: str
    """"float32", "bfloat16" or "float16"."""
    embedding_norm: float
    """The largest L2 norm of a token's input embedding."""
    end_ids: tuple[int, ...]
    """Token ids that end a text; the first is the one that is appended to targets."""
    json_schemas: bool = False
    """Texts can be held to a JSON schema."""


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and what is live now."""

    waiting: int = 0
    """Generate requests without a place in the batch."""
    running: int = 0
    """Rows in the batch."""
    pairs_waiting: int = 0
    generated_tokens: int = 0
    decode_steps: int = 0
    prefill_tokens: int = 0
    pairs_done: int = 0
    pair_batches: int = 0
    pair_pauses: int = 0
    """Pauses within these, for steps of streams."""
    aborted: int = 0
    failed: int = 0
    out_of_memory: int = 0
    """Steps that the device had no memory for; each made later ones smaller."""
    block_size: int = 0
    """Positions in one block of the key-value cache."""
    blocks_total: int = 0
    blocks_used: int = 0
    """Blocks that a live request or pair reads or writes."""
    blocks_cached: int = 0
    """Free blocks whose content may still serve as somebody's prefix."""
    kv_positions: int = 0
    """Positions that hold something in the blocks used: 1 - kv_positions / (blocks_used * block_size) is wasted."""
    prefix_hit_tokens: int = 0
    """Prompt positions that came from the prefix cache; prefill_tokens counts those that were computed."""
    pair_prefix_hit_tokens: int = 0
    """The same for pairs."""
    pair_prefix_tokens: int = 0
    """Prefix positions of pairs that were computed, without a gradient."""
    pairs_whole: int = 0
    """Pairs with a prefix that were computed whole, since the pool had no room for it."""
    preemptions: int = 0
    """Requests that lost their blocks to another one and were computed again."""
    steps: int = 0
    """Forward passes for streams, each of decoding rows and pieces of prompts together."""
    step_positions: int = 0
    """Positions in all those passes together."""
    native_fallbacks: int = 0
    """Steps on a CPU whose decoding rows torch computed: our kernels are switched off, could not be had, or don't fit the model."""
    step_rows: int = 0
    """Requests in all those passes together."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time spent computing, by kind of step."""
    pid: int = 0
    """The engine's process; 0: it is in this one."""


class Engine(Protocol):
    """Runs the FM. Methods are called on one asyncio loop; answers never depend on what else is running."""

    @property
    def spec(self) -> EngineSpec: ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """Stream a continuation. Closing the generator (aclose, or cancelling its task) frees everything it held.

        Raises:
            QueueFull: before the first delta.
            EngineStopped, EngineFailed: at any point.
        """
        ...

    async def score(self, pairs: Sequence[PairRequest]) -> list[PairResult]:
        """Likelihoods, in the order of `pairs`. Cancelling the task drops what has not been computed.

        Raises:
            QueueFull, EngineStopped, EngineFailed.
        """
        ...

    async def prompt_gradients(self, pairs: Sequence[PairRequest]) -> list[PairResult]:
        """As `score`, with gradients. Every pair has a soft prompt."""
        ...

    def abort(self, request_id: str) -> None:
        """Forget a generate request, whatever its state; unknown ids are ignored."""
        ...

    def check_room(self, tenant: str, *, pairs: bool) -> None:
        """Whether the smallest generate request of this tenant, or its smallest call with pairs, could wait now.

        Raises:
            QueueFull, EngineStopped.
        """
        ...

    def stats(self) -> EngineStats: ...
