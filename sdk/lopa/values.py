"""The values that callers give and get: prompts, sampling, results. Plain frozen data, no I/O.

Legend: m soft-prompt rows, d hidden size of the foundation model (FM).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from lopa.errors import InvalidRequest

Float32 = NDArray[np.float32]
Dtype = Literal["F32", "F16", "BF16", "I8"]
"""Element types on the wire. I8 has one float32 scale per row."""
Placement = Literal["front", "after_prefix"]
"""Where the soft prompt's rows stand: before everything, or between a shared prefix and the prompt."""
FinishReason = Literal["end", "stop", "length"]
"""The FM's end token, or a JSON document is complete; a stop string; max_tokens or the context length."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    content: str


Prompt = str | Sequence[Message] | Sequence[Mapping[str, str]] | Sequence[int]
"""Text; a conversation (needs a chat model), as `Message`s or as mappings with role and content; or token ids of the FM's tokenizer."""
Target = str | Sequence[int]
"""Text or token ids."""


class SamplingOptions(TypedDict, total=False):
    """Keywords of `generate` and `stream`; `Sampling` explains them."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: Sequence[str]
    logprobs: int | None
    ignore_end: bool
    n: int
    json_schema: Mapping[str, object] | str | None


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The server's limits are in `Limits`; docs/generation.md has them all.

    Penalties see tokens only: the rows of a soft prompt never count.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    """0 is greedy; at most 10."""
    top_p: float = 1.0
    """Only the smallest set of tokens that holds this probability."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 is all."""
    min_p: float = 0.0
    """Only tokens at least this part as likely as the likeliest; 0 is all."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in prompt or text, multiplies negative ones; above 1 discourages repeating."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the text; from -2 to 2."""
    frequency_penalty: float = 0.0
    """The same, once for each time that a token is in the text."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids; from -100 to 100."""
    seed: int | None = None
    """The same seed gives the same text; None lets the server draw one."""
    stop: Sequence[str] = ()
    """Generation ends before the first of these."""
    logprobs: int | None = None
    """Alternatives per token, besides the chosen one; None for no logprobs."""
    ignore_end: bool = False
    """Go on past the FM's end token."""
    n: int = 1
    """Continuations of the one prompt; more than one needs a temperature above 0. See `Generation.others`."""
    json_schema: Mapping[str, object] | str | None = None
    """The text is one JSON document that satisfies this schema, unless it is cut short (finish reason "length" or "stop")."""


@dataclass(frozen=True)
class Limits:
    """Bounds that the server enforces."""

    max_virtual_tokens: int
    """m at most, in rows."""
    max_message_bytes: int
    """A whole request at most."""
    max_pairs: int
    """Pairs in one request."""
    max_new_tokens: int
    max_stop_strings: int
    max_stop_bytes: int
    max_logprobs: int
    max_row_norm: float
    """L2 norm of a soft-prompt row at most."""
    max_continuations: int
    max_logit_bias: int
    max_schema_bytes: int


@dataclass(frozen=True)
class Model:
    """What a server hosts and offers."""

    name: str
    fingerprint: str
    """SHA-256 of the FM: 64 hex digits. Bundles and factors are tied to it."""
    revision: str
    """What receipts repeat."""
    hidden_size: int
    """d."""
    context_length: int
    vocab_size: int
    limits: Limits
    soft_prompt_dtypes: tuple[Dtype, ...]
    features: tuple[str, ...]
    """Lower-case, such as "generate", "prompt_gradients", "chat"."""
    bundle_id: str
    """Empty when the server publishes none."""
    bundle_bytes: int
    server_version: str


@dataclass(frozen=True)
class Usage:
    """Tokens that a request cost."""

    prompt_tokens: int
    virtual_tokens: int
    """m when a soft prompt was applied."""
    completion_tokens: int


@dataclass(frozen=True)
class Receipt:
    """What the server says it applied. It was compared with what was sent before you see it."""

    soft_prompt_sha256: str
    rows: int
    offset: int
    """Real tokens before the soft prompt."""
    model_revision: str


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability under the FM, before everything that `Sampling` changes."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs:
    """A generated token and its likeliest alternatives, best first."""

    chosen: TokenLogprob
    alternatives: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Delta:
    """What is new since the delta before. Token ids may run ahead of the text."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    index: int = 0
    """Which continuation it belongs to."""


@dataclass(frozen=True)
class Generation:
    """A finished text."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    """One for each token when asked for, otherwise empty."""
    finish_reason: FinishReason
    usage: Usage
    receipt: Receipt | None
    """None exactly when no soft prompt was sent."""
    others: tuple[Generation, ...] = ()
    """The other continuations when `n` asked for several. Each one's usage counts its own completion."""


@dataclass(frozen=True)
class Pair:
    """A prompt and the continuation whose likelihood is measured."""

    prompt: Prompt
    target: Target
    soft_prompt: Float32 | None = None
    """(m, d); None measures the plain FM."""
    append_end: bool = False
    """Append the FM's end token to the target, and count it."""
    prefix: str | Sequence[int] | None = None
    """Shared text before the prompt, such as a system prompt."""


@dataclass(frozen=True)
class PairScore:
    """Negative log-likelihood of a target, in nats, summed over its tokens."""

    nll_sum: float
    target_tokens: int

    @property
    def nll(self) -> float:
        """Per token."""
        return self.nll_sum / self.target_tokens


@dataclass(frozen=True)
class PairGradient:
    """A score and the gradient of `nll_sum` with respect to the pair's soft prompt: (m, d)."""

    nll_sum: float
    target_tokens: int
    gradient: Float32


@dataclass(frozen=True)
class Traffic:
    """What went over the wire: message bytes, without the transport's framing."""

    sent_bytes: int = 0
    received_bytes: int = 0
    requests: int = 0

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent_bytes - other.sent_bytes, self.received_bytes - other.received_bytes, self.requests - other.requests)


def unicode_text(text: str, field: str) -> str:
    """The same text, if it can be written as UTF-8.

    Raises:
        InvalidRequest: it holds a lone surrogate, as undecodable bytes of a command line become; the message names `field`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"{field} is not valid Unicode text: character {error.start} is a lone surrogate"
        raise InvalidRequest(message, field=field, limit="UTF-8 text", found=ascii(text[error.start])) from error
    return text
