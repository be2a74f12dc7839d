"""Which scope each RPC asks for. A method that is not listed here asks for `admin`: forgetting one closes it."""

from __future__ import annotations

from collections.abc import Mapping

from lopa_server.identity.caller import Scope

OPEN = frozenset({"/grpc.health.v1.Health/Check"})
"""Answered without credentials: liveness probes have none. It says only whether the server serves."""

REQUIRED: Mapping[str, Scope | None] = {
    "/lopa.v1.Catalog/GetModel": None,
    "/lopa.v1.Catalog/FetchBundle": Scope.FETCH,
    "/lopa.v1.Inference/Generate": Scope.GENERATE,
    "/lopa.v1.Inference/Score": Scope.SCORE,
    "/lopa.v1.Tuning/PromptGradients": Scope.TUNE,
    "/grpc.health.v1.Health/Watch": None,
    "/grpc.health.v1.Health/List": None,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": None,
}
"""None: any valid credential will do."""


def required_scope(method: str) -> Scope | None:
    """The scope that a full method name (`/package.Service/Method`) asks for."""
    return REQUIRED.get(method, Scope.ADMIN)
