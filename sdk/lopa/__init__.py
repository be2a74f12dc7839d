"""The device: a personal version of a frozen language model, without torch.

    import lopa

    with lopa.connect("localhost:50051") as client:
        persona = client.personal("~/me")
        persona.tune([("prompt", "target"), ...])
        print(persona.generate("prompt").text)

Names are loaded on first use, so that importing lopa costs nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

# ONNX Runtime keeps a device id in the user's cache folder and sends usage to its maker, unless told not to before it is loaded; the
# second name is that of later versions. Whoever wants it sets these otherwise before importing lopa.
for _name in ("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED"):
    os.environ.setdefault(_name, "1")

if TYPE_CHECKING:
    from lopa.archive import import_persona
    from lopa.async_client import AsyncClient, connect_async
    from lopa.async_persona import AsyncPersona
    from lopa.bundle import Bundle
    from lopa.client import Client, connect
    from lopa.config import ClientConfig
    from lopa.control import TuneControl
    from lopa.encoder import PromptEncoder
    from lopa.errors import (
        BundleError,
        Cancelled,
        DeadlineExceeded,
        FactorsError,
        FingerprintMismatch,
        FolderError,
        InvalidRequest,
        LocalError,
        LopaError,
        MissingDependency,
        NotFound,
        PermissionDenied,
        PreconditionFailed,
        ProtocolError,
        RemoteError,
        ResourceExhausted,
        ServerError,
        StorageError,
        TuningError,
        Unauthenticated,
        Unavailable,
    )
    from lopa.examples import Example
    from lopa.factors import Factors
    from lopa.folder import personas
    from lopa.manifest import Manifest
    from lopa.noise import ClipAndNoise
    from lopa.persona import Persona, open_personal
    from lopa.record import Version
    from lopa.retry import RetryPolicy
    from lopa.stream import AsyncGenerationStream, GenerationStream
    from lopa.system_keyring import keyring_key
    from lopa.transport import Tls
    from lopa.tuning import TuneConfig, TuneProgress, TuneReport
    from lopa.values import (
        Delta,
        Generation,
        Limits,
        Message,
        Model,
        Pair,
        PairGradient,
        PairScore,
        Receipt,
        Sampling,
        TokenLogprob,
        TokenLogprobs,
        Traffic,
        Usage,
    )

_HOMES = {
    "lopa.archive": "import_persona",
    "lopa.async_client": "AsyncClient connect_async",
    "lopa.async_persona": "AsyncPersona",
    "lopa.bundle": "Bundle",
    "lopa.manifest": "Manifest",
    "lopa.client": "Client connect",
    "lopa.config": "ClientConfig",
    "lopa.control": "TuneControl",
    "lopa.encoder": "PromptEncoder",
    "lopa.errors": (
        "BundleError Cancelled DeadlineExceeded FactorsError FingerprintMismatch FolderError "
        "InvalidRequest LocalError LopaError MissingDependency NotFound PermissionDenied PreconditionFailed ProtocolError "
        "RemoteError ResourceExhausted ServerError StorageError TuningError Unauthenticated Unavailable"
    ),
    "lopa.examples": "Example",
    "lopa.factors": "Factors",
    "lopa.folder": "personas",
    "lopa.persona": "Persona open_personal",
    "lopa.record": "Version",
    "lopa.noise": "ClipAndNoise",
    "lopa.retry": "RetryPolicy",
    "lopa.stream": "AsyncGenerationStream GenerationStream",
    "lopa.system_keyring": "keyring_key",
    "lopa.transport": "Tls",
    "lopa.tuning": "TuneConfig TuneProgress TuneReport",
    "lopa.values": (
        "Delta Generation Limits Message Model Pair PairGradient PairScore Receipt Sampling TokenLogprob TokenLogprobs Traffic Usage"
    ),
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "AsyncClient",
    "AsyncGenerationStream",
    "AsyncPersona",
    "Bundle",
    "BundleError",
    "Cancelled",
    "Client",
    "ClientConfig",
    "ClipAndNoise",
    "DeadlineExceeded",
    "Delta",
    "Example",
    "Factors",
    "FactorsError",
    "FingerprintMismatch",
    "FolderError",
    "Generation",
    "GenerationStream",
    "InvalidRequest",
    "Limits",
    "LocalError",
    "LopaError",
    "Manifest",
    "Message",
    "MissingDependency",
    "Model",
    "NotFound",
    "Pair",
    "PairGradient",
    "PairScore",
    "PermissionDenied",
    "Persona",
    "PreconditionFailed",
    "PromptEncoder",
    "ProtocolError",
    "Receipt",
    "RemoteError",
    "ResourceExhausted",
    "RetryPolicy",
    "Sampling",
    "ServerError",
    "StorageError",
    "Tls",
    "TokenLogprob",
    "TokenLogprobs",
    "Traffic",
    "TuneConfig",
    "TuneControl",
    "TuneProgress",
    "TuneReport",
    "TuningError",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "Version",
    "__version__",
    "connect",
    "connect_async",
    "import_persona",
    "keyring_key",
    "open_personal",
    "personas",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("lopa")
    if name not in _WHERE:
        raise AttributeError(f"module 'lopa' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
