"""The server's ports: gRPC servers bounded by the traffic's limits, and what is told when one can't be had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from lopa_server.config import ConfigError
from lopa_server.identity.config import AccessConfig
from lopa_server.identity.tls import CertificateError, CertificateFiles
from lopa_server.limits import TrafficLimits
from lopa_server.service.door import PROBE_SECONDS, patient

GROSS = 2
"""gRPC itself refuses messages of more than so many times the limit, without details; up to there the refusal is ours."""
PROBE_CALLS = 64
"""At a time, on the port for probes."""
PROBE_BYTES = 1 << 10


def service_server(
    interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]], message_bytes: int, traffic: TrafficLimits
) -> grpc.aio.Server:
    """For the port that devices call. message_bytes: the limit of ours."""
    return grpc.aio.server(interceptors=interceptors, options=channel_options(GROSS * message_bytes, traffic))


def probe_server(servicer: Any, traffic: TrafficLimits) -> grpc.aio.Server:
    """For the port for probes: liveness only, as `servicer` answers it."""
    server = grpc.aio.server(options=channel_options(PROBE_BYTES, traffic), maximum_concurrent_rpcs=PROBE_CALLS)
    check = grpc.unary_unary_rpc_method_handler(
        servicer.Check,
        request_deserializer=health_pb2.HealthCheckRequest.FromString,
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )
    only = {"Check": patient(check, PROBE_SECONDS)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(health.SERVICE_NAME, only),))
    return server


def listen(server: grpc.aio.Server, host: str, port: int, access: AccessConfig | None = None, purpose: str = "") -> str:
    """Take the port (0: any free one); gives host:port.

    access: what encrypts it; None leaves it plain. purpose: for the message.

    Raises:
        ConfigError: it is taken, or its certificate can't be used.
    """
    wanted = f"{host}:{port}"
    try:
        if access is None or not access.encrypted:
            return f"{host}:{server.add_insecure_port(wanted)}"
        return f"{host}:{server.add_secure_port(wanted, CertificateFiles(access).credentials())}"
    except CertificateError as error:
        raise ConfigError(str(error)) from error
    except RuntimeError as error:
        raise ConfigError(f"can't listen on {wanted}{purpose}: {error}") from error


def channel_options(longest: int, traffic: TrafficLimits) -> list[tuple[str, int]]:
    """longest: message in bytes that gRPC receives."""
    return [
        ("grpc.max_receive_message_length", longest),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),
        ("grpc.max_metadata_size", traffic.header_bytes),
        ("grpc.absolute_max_metadata_size", traffic.header_bytes),
        ("grpc.server.max_pending_requests", traffic.pending_calls),
        ("grpc.server.max_pending_requests_hard_limit", 2 * traffic.pending_calls),
        ("grpc.server_max_unrequested_time_in_server", traffic.pending_seconds),
        ("grpc.max_concurrent_streams", traffic.streams_per_connection),
        ("grpc.max_allowed_incoming_connections", traffic.connections),
        ("grpc.max_connection_age_ms", round(traffic.connection_seconds * 1000)),
        ("grpc.max_connection_age_grace_ms", round(traffic.stream_seconds * 1000)),
        ("grpc.max_connection_idle_ms", round(traffic.idle_seconds * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]
