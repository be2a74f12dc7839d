"""What this server offers, and its bundle in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from lopa.v1 import catalog_pb2
from lopa.wire.errors import Reason, WireError

from lopa_server.engine.base import EngineSpec
from lopa_server.limits import ServiceLimits
from lopa_server.service.bundles import PublishedBundle
from lopa_server.validation.softprompts import DTYPES

CHUNK_BYTES = 256 << 10


def model_revision(spec: EngineSpec, version: str) -> str:
    """What receipts repeat: everything that a reply's numbers depend on, in one string."""
    return f"{spec.fingerprint}/{spec.compute_dtype}/lopa-{version}"


@dataclass(frozen=True)
class CatalogHandler:
    """Answers about the server itself. It never touches the engine."""

    spec: EngineSpec
    limits: ServiceLimits
    max_row_norm: float
    has_chat: bool
    version: str
    bundles: tuple[PublishedBundle, ...]
    """The current one first; older ones are only found by their id."""

    @property
    def bundle(self) -> PublishedBundle | None:
        """The current one."""
        return self.bundles[0] if self.bundles else None

    def model_info(self) -> catalog_pb2.ModelInfo:
        """GetModel's answer."""
        spec, limits = self.spec, self.limits
        return catalog_pb2.ModelInfo(
            name=spec.name,
            fingerprint=spec.fingerprint,
            revision=model_revision(spec, self.version),
            hidden_size=spec.hidden_size,
            context_length=spec.context_length,
            vocab_size=spec.vocab_size,
            limits=catalog_pb2.Limits(
                max_virtual_tokens=limits.max_virtual_tokens,
                max_message_bytes=limits.max_message_bytes,
                max_pairs=limits.max_pairs,
                max_new_tokens=limits.max_new_tokens,
                max_stop_strings=limits.max_stop_strings,
                max_stop_bytes=limits.max_stop_bytes,
                max_logprobs=limits.max_logprobs,
                max_row_norm=self.max_row_norm,
                max_continuations=limits.max_continuations,
                max_logit_bias=limits.max_logit_bias,
                max_schema_bytes=limits.max_schema_bytes,
            ),
            soft_prompt_dtypes=DTYPES,
            features=self._features(),
            bundle_id=self.bundle.id if self.bundle else "",
            bundle_bytes=self.bundle.size if self.bundle else 0,
            server_version=self.version,
        )

    def _features(self) -> list[catalog_pb2.Feature.ValueType]:
        features = [
            catalog_pb2.FEATURE_GENERATE,
            catalog_pb2.FEATURE_SCORE,
            catalog_pb2.FEATURE_PROMPT_GRADIENTS,
            catalog_pb2.FEATURE_LOGPROBS,
        ]
        if self.spec.json_schemas:
            features.append(catalog_pb2.FEATURE_JSON_SCHEMA)
        if self.has_chat:
            features.append(catalog_pb2.FEATURE_CHAT)
        if self.bundle:
            features.append(catalog_pb2.FEATURE_BUNDLE)
        return features

    async def bundle_chunks(self, request: catalog_pb2.FetchBundleRequest) -> AsyncGenerator[catalog_pb2.BundleChunk, None]:
        """The archive from the offset on; an offset at its end gives one empty chunk.

        Raises:
            WireError: UNKNOWN_BUNDLE, BUNDLE_OFFSET.
        """
        bundle = next((known for known in self.bundles if known.id == request.bundle_id), None)
        if bundle is None:
            raise WireError(Reason.UNKNOWN_BUNDLE, "bundle_id", limit=self.bundle.id if self.bundle else "none", found=request.bundle_id)
        if request.offset > bundle.size:
            raise WireError(Reason.BUNDLE_OFFSET, "offset", limit=bundle.size, found=request.offset)
        position = request.offset
        while True:
            data = await asyncio.to_thread(bundle.read, position, CHUNK_BYTES)
            yield catalog_pb2.BundleChunk(offset=position, data=data, total_bytes=bundle.size)
            position += len(data)
            if position >= bundle.size:
                return
