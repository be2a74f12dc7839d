"""The connection to a server, as an app sees it: generate, stream, score, gradients, bundles, personal folders.

    with lopa.connect("localhost:50051") as client:
        print(client.generate("def add(", max_tokens=20).text)
        persona = client.personal("~/me")

Clients are thin: what they do is in `Session`, as flows that either kind of connection carries out.
Legend: m soft-prompt rows, d hidden size of the foundation model (FM).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

import grpc

from lopa.config import ClientConfig
from lopa.link import Link
from lopa.session import Session, WireOptions, whole
from lopa.stream import GenerationStream
from lopa.transport import Endpoint, Tls, Token
from lopa.values import (
    Dtype,
    Float32,
    Generation,
    Model,
    Pair,
    PairGradient,
    PairScore,
    Placement,
    Prompt,
    Sampling,
    SamplingOptions,
    Traffic,
)

if TYPE_CHECKING:
    from lopa.bundle import Bundle
    from lopa.encoder import PromptEncoder
    from lopa.local import Mismatch
    from lopa.persona import Persona
    from lopa.vault import Secret

Security = bool | Tls | grpc.ChannelCredentials
"""True for TLS with the system's roots, `Tls` for certificates of your own, or gRPC's credentials; False for none."""


def connect(address: str, *, tls: Security = False, token: Token | None = None, config: ClientConfig | None = None) -> Client:
    """Connect to the server at "host:port" and ask what it hosts.

    tls: see `Security`. token: an API key or JWT, or a function that gives the current one; sent as `authorization: Bearer`,
    over TLS only, except on this machine.

    >>> with lopa.connect(address) as client:
    ...     print(client.model.hidden_size)
    32

    Raises:
        Unavailable: nobody answers there.
        RemoteError: the server refused. InvalidRequest: a token without TLS, or certificates that don't fit.
    """
    client = Client(address, tls=tls, token=token, config=config)
    try:
        client.refresh()
    except BaseException:
        client.close()
        raise
    return client


class Connection:
    """What both clients know."""

    _session: Session

    @property
    def config(self) -> ClientConfig:
        return self._session.config

    @property
    def address(self) -> str:
        return self._session.address

    @property
    def traffic(self) -> Traffic:
        """Message bytes of every call so far, failed attempts included."""
        return self._session.meter.traffic

    def encoder(self, bundle: Bundle) -> PromptEncoder:
        """The prompt encoder of a bundle; one for all personas of this client."""
        return self._session.encoder(bundle)


class Client(Connection):
    """A connection. Safe between threads; close it, or use it in a `with` block.

    Unlike `connect`, making one does not contact the server.
    """

    def __init__(self, address: str, *, tls: Security = False, token: Token | None = None, config: ClientConfig | None = None) -> None:
        self._session = Session(address, config or ClientConfig())
        self._link = Link(endpoint(self._session, tls, token))

    def metered(self) -> Client:
        """The same connection with a byte count of its own, which starts at zero. Closing either closes both."""
        twin = object.__new__(Client)
        twin._link, twin._session = self._link, self._session.metered()
        return twin

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Calls under way end as `Cancelled`."""
        self._link.close()

    @property
    def model(self) -> Model:
        """What the server hosts; asked once and kept.

        Raises:
            RemoteError: it was not known yet and the server can't be asked.
        """
        return self._link.run(self._session.model())

    def refresh(self) -> Model:
        """Ask the server again what it hosts.

        Raises:
            RemoteError: the call failed.
            ProtocolError: the answer makes no sense.
        """
        return self._link.run(self._session.refresh())

    def generate(
        self,
        prompt: Prompt,
        *,
        prefix: str | Sequence[int] | None = None,
        soft_prompt: Float32 | None = None,
        dtype: Dtype = "F32",
        placement: Placement = "front",
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation:
        """Continue a prompt and wait for the end. Keywords of `Sampling` choose how: max_tokens, temperature, seed, ...

        soft_prompt: (m, d) rows to put before the prompt; None asks the plain FM. prefix: shared text before the prompt.

        >>> client.generate("def add(a, b):", max_tokens=4, seed=1).usage.completion_tokens
        4

        Raises:
            InvalidRequest: a value that the server refuses; names field and limit.
            RemoteError: the call failed. ProtocolError: the receipt does not fit the soft prompt.
        """
        wire = WireOptions(dtype=dtype, placement=placement, timeout=timeout)
        flow = self._session.open_generation(prompt, Sampling(**sampling), prefix=prefix, soft_prompt=soft_prompt, wire=wire)
        return self._link.run(whole(flow))

    def stream(
        self,
        prompt: Prompt,
        *,
        prefix: str | Sequence[int] | None = None,
        soft_prompt: Float32 | None = None,
        dtype: Dtype = "F32",
        placement: Placement = "front",
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> GenerationStream:
        """As `generate`, delta by delta: iterate over it, then read `.generation`. Leaving its `with` block early stops the server's work.

        A lost connection is retried before the first delta only: after that you decide.

        >>> with client.stream("def add(a, b):", max_tokens=4) as stream:
        ...     text = "".join(delta.text for delta in stream)
        >>> text == stream.generation.text
        True
        """
        wire = WireOptions(dtype=dtype, placement=placement, timeout=timeout)
        flow = self._session.open_generation(prompt, Sampling(**sampling), prefix=prefix, soft_prompt=soft_prompt, wire=wire)
        return GenerationStream(self._link, self._link.run(flow))

    def score(
        self, pairs: Sequence[Pair], *, dtype: Dtype = "F32", placement: Placement = "front", timeout: float | None = None
    ) -> list[PairScore]:
        """Negative log-likelihood of each pair's target, in as many requests as the server's limits ask for.

        timeout: seconds for each of these requests.

        >>> [score] = client.score([lopa.Pair("def add(a, b):", " return a + b")])
        >>> score.nll == score.nll_sum / score.target_tokens
        True

        Raises:
            InvalidRequest: names field and limit. RemoteError: the call failed. ProtocolError: a reply that breaks the contract.
        """
        return self._link.run(self._session.score(pairs, WireOptions(dtype=dtype, placement=placement, timeout=timeout)))

    def prompt_gradients(
        self,
        pairs: Sequence[Pair],
        *,
        dtype: Dtype = "F32",
        gradient_dtype: Dtype = "F32",
        placement: Placement = "front",
        max_pairs: int | None = None,
        timeout: float | None = None,
    ) -> list[PairGradient]:
        """Loss and its gradient with respect to each pair's soft prompt, in as many requests as the server's limits ask for.

        max_pairs: pairs in one request at most, if fewer than the server's limit. timeout: seconds for each request.

        Raises:
            InvalidRequest: names field and limit. RemoteError: the call failed. ProtocolError: a reply that breaks the contract.
        """
        return self._link.run(self._session.prompt_gradients(pairs, WireOptions(dtype, gradient_dtype, placement, max_pairs, timeout)))

    def bundle(self, *, progress: Callable[[int, int], None] | None = None) -> Bundle:
        """The server's bundle, from the cache or downloaded into it.

        progress: called with (bytes so far, bytes in all) while downloading.

        Raises:
            NotFound: the server publishes none. BundleError: what came is not what its id says.
            FingerprintMismatch: the bundle was made for another FM. StorageError: no space. RemoteError: the call failed.
        """
        from lopa.cache import fetch_bundle

        return self._link.run(fetch_bundle(self._session, progress=progress))

    def personal(
        self,
        path: Path | str,
        persona: str = "default",
        *,
        bundle: Bundle | None = None,
        secret: Secret | None = None,
        mismatch: Mismatch = "refuse",
        progress: Callable[[int, int], None] | None = None,
    ) -> Persona:
        """Open a user's folder, or create it, with one persona in it.

        A persona stays with the bundle that it was made with: that one is used as long as it is in the cache and fits the
        server's FM, even when the server publishes a newer one. bundle: use this one. progress: see `bundle`.
        secret: a passphrase, or a key of 32 bytes: a new persona is encrypted with it, an encrypted one is opened.
        mismatch: "plain" opens a persona of another FM or bundle too; the plain FM answers until `Persona.migrate`.

        >>> mail = client.personal("my-app/user", persona="mail", secret="correct horse battery staple")
        >>> mail.version, mail.placement
        (1, 'front')

        Raises:
            FingerprintMismatch: the persona belongs to another FM or another bundle.
            FolderError, FactorsError: the folder is damaged, or the secret is wrong. Others: see `bundle`.
        """
        from lopa.local import OpenOptions, opened
        from lopa.persona import Persona

        found = self._link.run(opened(self._session, path, persona, OpenOptions(bundle, secret, mismatch, progress)))
        return Persona(found, self._session, self._link)


def endpoint(session: Session, tls: Security, token: Token | None) -> Endpoint:
    config = session.config
    return Endpoint.of(session.address, tls, token, max_bytes=config.max_message_bytes, keepalive=config.keepalive)
