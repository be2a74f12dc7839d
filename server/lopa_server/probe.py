"""Asks a server's health and says it by the exit code, for probes of containers: 0 while it serves, 1 otherwise.

python -m lopa_server.probe 127.0.0.1:7071        # a --health-port, or any port in plain text
"""

from __future__ import annotations

import argparse
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="HOST:PORT")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds to wait for the answer")
    arguments = parser.parse_args()
    with grpc.insecure_channel(arguments.address) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=arguments.timeout)
        except grpc.RpcError as error:
            print(f"{arguments.address}: {error.code().name}", file=sys.stderr)
            return 1
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))
    return 0 if reply.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
