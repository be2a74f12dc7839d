"""How a client behaves: bounds and places, each with a default."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lopa.noise import ClipAndNoise
from lopa.retry import RetryPolicy


@dataclass(frozen=True)
class ClientConfig:
    """Bounds and places. Times are in seconds and bound a whole call, its retries included."""

    connect_timeout: float = 10.0
    """Asking a server what it hosts."""
    timeout: float = 120.0
    """Score and PromptGradients."""
    generate_timeout: float = 600.0
    """A whole generation."""
    bundle_timeout: float = 600.0
    """One attempt to download the bundle; an interrupted download goes on where it stopped."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    max_message_bytes: int = 64 << 20
    """Larger replies are refused."""
    keepalive: float = 30.0
    """Seconds without data after which an ongoing call's connection is tested, as mobile networks need it; 0 never tests."""
    cache: Path | None = None
    """Where bundles are kept; None stands for $LOPA_CACHE, else the user's cache folder."""
    bundle_days: float = 90.0
    """Bundles that were not used for so many days are removed when another one is fetched; 0 keeps all."""
    trusted_keys: tuple[str, ...] = ()
    """Ed25519 public keys in hex; when there are any, a bundle from a server must be signed by one of them."""
    soft_prompt_noise: ClipAndNoise | None = None
    """Applied to every soft prompt before it leaves the device, in generation, scoring and tuning alike."""
    threads: int = 1
    """Threads of the prompt encoder."""
