"""Bounds on what a client may ask for. A request beyond one is refused before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServiceLimits:
    """One line a field. What lopa.v1.Limits publishes comes from here."""

    max_virtual_tokens: int = 64
    """m at most: rows of a soft prompt."""
    max_message_bytes: int = 32 << 20
    """A whole request message, in bytes."""
    max_pairs: int = 512
    """Pairs in one Score or PromptGradients request."""
    max_new_tokens: int = 4096
    """Sampling.max_tokens at most."""
    default_new_tokens: int = 128
    """Tokens generated when max_tokens is 0, if they fit the context."""
    max_stop_strings: int = 8
    max_stop_bytes: int = 128
    """Of one stop string, in UTF-8."""
    max_logprobs: int = 20
    """Alternatives per token."""
    max_temperature: float = 10.0
    max_repetition_penalty: float = 100.0
    """Its inverse is the smallest."""
    max_penalty: float = 2.0
    """Of presence_penalty and frequency_penalty, either sign."""
    max_bias: float = 100.0
    """Of one logit bias, either sign."""
    max_logit_bias: int = 1024
    """Token ids with a bias in one request."""
    max_schema_bytes: int = 64 << 10
    """Of a JSON schema, in UTF-8."""
    max_schema_depth: int = 32
    """Values within values in a JSON schema."""
    max_continuations: int = 16
    """Sampling.n at most."""
    row_norm_multiple: float = 16.0
    """A soft-prompt row's L2 norm at most, as a multiple of the largest norm in the FM's embedding table. Tuned prompts go far: with
    prompt tuning's usual learning rates, and in the shipped priors, rows have up to six times that norm."""


@dataclass(frozen=True)
class TrafficLimits:
    """Bounds on connections and calls, whoever they are from. One line a field."""

    connections: int = 4096
    """Open at the same time; gRPC closes what comes beyond at once."""
    streams_per_connection: int = 1024
    """Calls at the same time on one connection; a client's library keeps the next ones waiting on its side."""
    pending_calls: int = 4096
    """That have arrived and that the server's loop hasn't taken up: beyond it gRPC's core begins to drop calls with a bare
    CANCELLED, beyond twice as many it drops all. Its own default, 1000, is a few seconds of a flood."""
    pending_seconds: int = 3600
    """That one of them waits, before the core drops it likewise. Its own default, 30, is over when a process that was stopped, or
    whose machine was frozen, goes on."""
    header_bytes: int = 16 << 10
    """All headers of a call together."""
    connection_seconds: float = 3600.0
    """Age of a connection, after which its client is asked for a new one. Running calls may finish."""
    idle_seconds: float = 900.0
    """A connection without calls is closed after so long."""
    receive_seconds: float = 120.0
    """Until the whole of a call's message has arrived, once the call has a place: who sends slowly, or not at all, can't hold one."""
    stall_seconds: float = 60.0
    """That a client may leave a stream's next message unread, once what gRPC takes in for it is full."""
    unary_seconds: float = 600.0
    """A call with one reply takes so long at most, whatever deadline its client has set, or not set."""
    stream_seconds: float = 3600.0
    """The same for streams: their age at most, and how long a client that doesn't read may hold one."""
