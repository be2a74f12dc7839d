"""Which RPCs answer somebody without credentials. Methods come from the server's own reflection."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from lopa.v1 import catalog_pb2, inference_pb2, tuning_pb2
from lopa_server.identity.methods import OPEN

from trustbench.server import Server

DESCRIBED = (catalog_pb2, inference_pb2, tuning_pb2, health_pb2, reflection_pb2)
"""Imported for their descriptors: a service that is in none of them ends the benchmark."""


def methods(server: Server, channel: grpc.Channel) -> Iterator[tuple[str, object]]:
    """(full name, descriptor) of everything that the server has."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    (reply,) = stub.ServerReflectionInfo(asked, metadata=server.as_tenant("acme"), timeout=30)
    for service in reply.list_services_response.service:
        file = next(module for module in DESCRIBED if service.name.rpartition(".")[2] in module.DESCRIPTOR.services_by_name)
        for method in file.DESCRIPTOR.services_by_name[service.name.rpartition(".")[2]].methods:
            yield f"/{service.name}/{method.name}", method


def open_to_strangers(server: Server) -> tuple[int, list[str]]:
    """How many RPCs there are, and those that answered. Health `Check` is meant to, and left out."""
    found, answered = 0, []
    with server.channel() as channel:
        for path, method in methods(server, channel):
            if path in OPEN:
                continue
            found += 1
            for metadata in ((), (("authorization", "Bearer lopa_0000000000000000_x"),), (("authorization", "Bearer a.b.c"),)):
                if _code(channel, path, method, metadata) is not grpc.StatusCode.UNAUTHENTICATED:
                    answered.append(path)
                    break
    return found, answered


def _code(channel: grpc.Channel, path: str, method: object, metadata: tuple[tuple[str, str], ...]) -> grpc.StatusCode:
    """What an empty request is answered with."""
    way = ("stream" if method.client_streaming else "unary") + "_" + ("stream" if method.server_streaming else "unary")
    request = GetMessageClass(method.input_type)().SerializeToString()
    call = getattr(channel, way)(path, None, None)
    try:
        reply = call(iter([request]) if method.client_streaming else request, metadata=metadata, timeout=30)
        if method.server_streaming:
            next(reply, None)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK
