"""The connection to a server, as an app sees it: generate, stream, score, gradients, bundles, personal folders.

    with lopa.connect("localhost:50051") as client:
        print(client.generate("def add(", max_tokens=20).text)
        persona = client.personal("~/me")

Legend: m soft-prompt rows, d hidden size of the foundation model (FM).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

import grpc

from lopa.config import ClientConfig
from lopa.errors import ProtocolError
from lopa.protocol import replies, requests
from lopa.stream import GenerationStream
from lopa.transport import Link, LinkConfig, Meter
from lopa.v1 import catalog_pb2, common_pb2, inference_pb2, tuning_pb2
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
    from lopa.persona import Persona


def connect(address: str, *, tls: bool | grpc.ChannelCredentials = False, config: ClientConfig | None = None) -> Client:
    """Connect to the server at "host:port" and ask what it hosts.

    tls: True for TLS with the system's roots, or credentials of your own.

    Raises:
        Unavailable: nobody answers there.
        RemoteError: the server refused.
    """
    credentials = grpc.ssl_channel_credentials() if tls is True else tls or None
    client = Client(address, credentials=credentials, config=config)
    try:
        client.refresh()
    except BaseException:
        client.close()
        raise
    return client


class Client:
    """A connection. Safe between threads; close it, or use it in a `with` block.

    Unlike `connect`, making one does not contact the server.
    """

    def __init__(self, address: str, *, credentials: grpc.ChannelCredentials | None = None, config: ClientConfig | None = None) -> None:
        self.config = config or ClientConfig()
        self._link = Link(address, LinkConfig(credentials, self.config.retry, self.config.max_message_bytes))
        self._meter = Meter()
        self._shared = _Shared()

    def metered(self) -> Client:
        """The same connection with a byte count of its own, which starts at zero. Closing either closes both."""
        twin = object.__new__(Client)
        twin.config, twin._link, twin._shared = self.config, self._link, self._shared
        twin._meter = Meter(self._meter)
        return twin

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Calls under way end as `Cancelled`."""
        self._link.close()

    @property
    def address(self) -> str:
        return self._link.address

    @property
    def traffic(self) -> Traffic:
        """Message bytes of every call so far, failed attempts included."""
        return self._meter.traffic

    @property
    def model(self) -> Model:
        """What the server hosts; asked once and kept.

        Raises:
            RemoteError: it was not known yet and the server can't be asked.
        """
        return self._shared.model or self.refresh()

    def refresh(self) -> Model:
        """Ask the server again what it hosts.

        Raises:
            RemoteError: the call failed.
            ProtocolError: the answer makes no sense.
        """
        info = self._link.unary(
            self._link.catalog.GetModel, catalog_pb2.GetModelRequest(), timeout=self.config.connect_timeout, meter=self._meter
        )
        self._shared.model = model = replies.parse_model(info)
        return model

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

        Raises:
            InvalidRequest: a value that the server refuses; names field and limit.
            RemoteError: the call failed. ProtocolError: the receipt does not fit the soft prompt.
        """
        stream = self.stream(prompt, prefix=prefix, soft_prompt=soft_prompt, dtype=dtype, placement=placement, timeout=timeout, **sampling)
        with stream:
            for _ in stream:
                pass
        return stream.generation

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
        """
        soft = None if soft_prompt is None else requests.soft_prompt(soft_prompt, dtype, placement)
        request = requests.generate_request(prompt, Sampling(**sampling), prefix=prefix, soft=soft, fingerprint=self.model.fingerprint)
        timeout = self.config.generate_timeout if timeout is None else timeout
        stream = self._link.stream(self._link.inference.Generate, request, timeout=timeout, meter=self._meter)
        return GenerationStream(stream, replies.GenerationReader(request), self._revision)

    def score(
        self, pairs: Sequence[Pair], *, dtype: Dtype = "F32", placement: Placement = "front", timeout: float | None = None
    ) -> list[PairScore]:
        """Negative log-likelihood of each pair's target, in as many requests as the server's limits ask for.

        timeout: seconds for each of these requests.

        Raises:
            InvalidRequest: names field and limit. RemoteError: the call failed. ProtocolError: a reply that breaks the contract.
        """
        scores: list[PairScore] = []
        for batch in self._batches(pairs, dtype, placement):
            request = inference_pb2.ScoreRequest(pairs=batch, fm_fingerprint=self.model.fingerprint)
            reply = self._link.unary(
                self._link.inference.Score, request, timeout=self.config.timeout if timeout is None else timeout, meter=self._meter
            )
            revision = self._revision(_first_revision(reply.scores))
            scores += replies.check_scores(reply.scores, batch, revision)
        return scores

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
        code = requests.dtype_code(gradient_dtype, "gradient_dtype")
        gradients: list[PairGradient] = []
        for batch in self._batches(pairs, dtype, placement, max_pairs=max_pairs, reply_dtype=code):
            request = tuning_pb2.PromptGradientsRequest(pairs=batch, gradient_dtype=code, fm_fingerprint=self.model.fingerprint)
            reply = self._link.unary(
                self._link.tuning.PromptGradients, request, timeout=self.config.timeout if timeout is None else timeout, meter=self._meter
            )
            revision = self._revision(_first_revision(reply.gradients))
            gradients += replies.check_gradients(reply.gradients, batch, revision, code)
        return gradients

    def bundle(self, *, progress: Callable[[int, int], None] | None = None) -> Bundle:
        """The server's bundle, from the cache or downloaded into it.

        progress: called with (bytes so far, bytes in all) while downloading.

        Raises:
            NotFound: the server publishes none. BundleError: what came is not what its id says.
            FingerprintMismatch: the bundle was made for another FM. StorageError: no space. RemoteError: the call failed.
        """
        from lopa.cache import fetch_bundle

        return fetch_bundle(self, progress=progress)

    def bundle_chunks(self, bundle_id: str, offset: int) -> Iterator[catalog_pb2.BundleChunk]:
        """The archive's chunks from `offset` (bytes) on, as the server sends them.

        Raises:
            RemoteError: the call failed, at the start or later.
        """
        request = catalog_pb2.FetchBundleRequest(bundle_id=bundle_id, offset=offset)
        return self._link.stream(self._link.catalog.FetchBundle, request, timeout=self.config.bundle_timeout, meter=self._meter)

    def encoder(self, bundle: Bundle) -> PromptEncoder:
        """The prompt encoder of a bundle; one for all personas of this client."""
        from lopa.encoder import PromptEncoder

        with self._shared.lock:
            known = self._shared.encoders
            if bundle.manifest.id not in known:
                known[bundle.manifest.id] = PromptEncoder(bundle, threads=self.config.threads)
            return known[bundle.manifest.id]

    def personal(
        self,
        path: Path | str,
        persona: str = "default",
        *,
        bundle: Bundle | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Persona:
        """Open a user's folder, or create it, with one persona in it.

        A persona stays with the bundle that it was made with: that one is used as long as it is in the cache and fits the
        server's FM, even when the server publishes a newer one. bundle: use this one. progress: see `bundle`.

        Raises:
            FingerprintMismatch: the persona belongs to another FM or another bundle.
            FolderError, FactorsError: the folder is damaged. Others: see `bundle`.
        """
        from lopa.persona import open_with_client

        return open_with_client(self, path, persona, bundle=bundle, progress=progress)

    def _batches(
        self,
        pairs: Sequence[Pair],
        dtype: Dtype,
        placement: Placement,
        *,
        max_pairs: int | None = None,
        reply_dtype: common_pb2.DType.ValueType | None = None,
    ) -> Iterator[list[common_pb2.Pair]]:
        limits = self.model.limits
        messages = [requests.pair_message(pair, dtype, placement, f"pairs[{i}]") for i, pair in enumerate(pairs)]
        return requests.split_pairs(
            messages,
            max_pairs=min(max_pairs or limits.max_pairs, limits.max_pairs),
            max_bytes=min(limits.max_message_bytes, self.config.max_message_bytes),
            reply_dtype=reply_dtype,
        )

    def _revision(self, replied: str | None) -> str:
        """The revision that receipts must name. A new one is asked for once: the server may have been restarted in another version."""
        model = self.model
        if replied is not None and replied != model.revision:
            fresh = self.refresh()
            if fresh.fingerprint != model.fingerprint:
                raise ProtocolError(
                    f"{self.address} changed its model from {model.fingerprint[:12]} to {fresh.fingerprint[:12]} during a call"
                )
            model = fresh
        return model.revision


class _Shared:
    """What a client and its metered twins have in common."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.model: Model | None = None
        self.encoders: dict[str, PromptEncoder] = {}


def _first_revision(items: Sequence[inference_pb2.PairScore] | Sequence[tuning_pb2.PairGradient]) -> str | None:
    receipts = map(replies.receipt_of, items)
    return next((receipt.model_revision for receipt in receipts if receipt is not None), None)
