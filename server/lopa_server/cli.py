"""`lopa serve`: the server as a command. Importing this brings no torch."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from lopa import event_loop
from lopa.cli.output import fail
from lopa.noise import ClipAndNoise

from lopa_server import heap
from lopa_server.config import ConfigError, ServerConfig
from lopa_server.engine.base import EngineError, UnsupportedModel
from lopa_server.identity.config import AccessConfig
from lopa_server.keeper import EXIT_BROKEN, keep_running
from lopa_server.limits import ServiceLimits, TrafficLimits
from lopa_server.logs import log_to_stderr, open_standard_streams
from lopa_server.metering.cli import DEFAULT_PLACE
from lopa_server.models import nano_bundle_folder, nano_folder

DEFAULTS = ServerConfig(fm="")


def serve(
    fm: Annotated[str | None, typer.Option(help="Hugging Face id or folder of the model. Default: the embedded lopa-nano.")] = None,
    bundle: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of the bundle to publish; again for older ones, the current first. Default: lopa-nano's."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = DEFAULTS.host,
    port: Annotated[int, typer.Option(help="Port; 0 takes any free one.")] = 7070,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: bfloat16 on CUDA, float32 on the CPU.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: CUDA where there is one.")] = None,
    max_batch: Annotated[int, typer.Option(help="Requests that generate at the same time.")] = DEFAULTS.max_batch,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait for a place.")] = DEFAULTS.max_waiting,
    max_waiting_tokens: Annotated[int, typer.Option(help="Tokens to read and write, of all that wait.")] = DEFAULTS.max_waiting_tokens,
    max_virtual_tokens: Annotated[int, typer.Option(help="Rows of a soft prompt at most.")] = DEFAULTS.limits.max_virtual_tokens,
    step_positions: Annotated[int | None, typer.Option(help="Positions in one step. More: faster; less: others get in sooner.")] = None,
    kv_memory_mib: Annotated[int | None, typer.Option(help="MiB for the key-value pool. Default: 40 % of the free memory.")] = None,
    block_size: Annotated[int, typer.Option(help="Positions in one block of that pool.")] = DEFAULTS.block_size,
    threads: Annotated[int | None, typer.Option(help="CPU threads for torch. Default: torch's own choice.")] = None,
    native: Annotated[bool, typer.Option(help="Our own kernels, where they can be compiled.")] = True,
    cuda_graphs: Annotated[bool, typer.Option(help="On CUDA: decode steps captured as graphs, where the model allows it.")] = True,
    engine_process: Annotated[
        bool, typer.Option(help="The engine in a process of its own: a crashed or stuck one is replaced while the server answers.")
    ] = os.name == "posix",
    step_seconds: Annotated[
        float, typer.Option(help="An engine step that takes longer is stuck: the engine is started again.")
    ] = DEFAULTS.step_seconds,
    drain_seconds: Annotated[float, typer.Option(help="How long running calls may take after SIGTERM.")] = DEFAULTS.drain_seconds,
    log_level: Annotated[
        str, typer.Option(help="debug, info, warning or error. At no level does the log hold what clients send.")
    ] = "info",
    ready_file: Annotated[Path | None, typer.Option(help="File that gets host:port once the server is ready.")] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="Certificate chain, PEM: serve with TLS. Read again when it changes.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key of the certificate, PEM.")] = None,
    client_ca: Annotated[Path | None, typer.Option(help="Mutual TLS: clients need a certificate signed by these, PEM.")] = None,
    identify_by_certificate: Annotated[
        bool, typer.Option(help="Without a bearer credential, the client certificate's name is the tenant.")
    ] = False,
    keys: Annotated[Path | None, typer.Option(help="API keys are needed: a file made by `lopa keys`.")] = None,
    jwks: Annotated[str | None, typer.Option(help="Tokens are accepted: public keys of their issuer, a file or https URL.")] = None,
    issuer: Annotated[str | None, typer.Option(help="Issuer (iss) of tokens.")] = None,
    audience: Annotated[str | None, typer.Option(help="Audience (aud) of tokens.")] = None,
    tenant_claim: Annotated[str, typer.Option(help="Claim of a token that names the tenant.")] = DEFAULTS.access.tenant_claim,
    scope_claim: Annotated[str, typer.Option(help="Claim of a token that holds its scopes.")] = DEFAULTS.access.scope_claim,
    limits: Annotated[Path | None, typer.Option(help="Rates and quotas of tenants, TOML. Read again when it changes.")] = None,
    usage: Annotated[
        str | None, typer.Option(help="SQLite file or PostgreSQL URL for usage counters. Default with identity: lopa-usage.sqlite.")
    ] = None,
    max_call_seconds: Annotated[float, typer.Option(help="Age of a stream at most.")] = DEFAULTS.traffic.stream_seconds,
    max_calls: Annotated[
        int | None, typer.Option(help="Calls of all kinds at the same time. Default: 1024, or more for a large queue.")
    ] = None,
    max_connections: Annotated[int, typer.Option(help="Connections at the same time.")] = DEFAULTS.traffic.connections,
    gradient_clip: Annotated[float | None, typer.Option(help="L2 norm of a returned gradient at most. With --gradient-noise.")] = None,
    gradient_noise: Annotated[float, typer.Option(help="Noise on every returned value, as a multiple of that norm.")] = 0.0,
    health_port: Annotated[int | None, typer.Option(help="One more port that answers only health checks, in plain text.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Show Prometheus metrics at http://METRICS_HOST:PORT/metrics.")] = None,
    metrics_host: Annotated[str, typer.Option(help="Address of the metrics page.")] = DEFAULTS.metrics_host,
    traces: Annotated[bool, typer.Option(help="Send OpenTelemetry spans to OTEL_EXPORTER_OTLP_ENDPOINT.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Start the server again when it has crashed or its engine is stuck.")] = False,
    insecure_listen: Annotated[
        bool, typer.Option(help="Listen beyond this machine although something of encryption and identity is off.")
    ] = False,
) -> None:
    """Serve one frozen model to everybody. Ends with SIGTERM or Ctrl-C, after running calls have finished."""
    open_standard_streams()
    problems = log_to_stderr(log_level)
    if restart:
        sys.exit(keep_running([sys.executable, "-P", "-m", "lopa.cli", *(word for word in sys.argv[1:] if word != "--restart")]))
    bundles = bundle or []
    if fm is None and not bundles and nano_bundle_folder().is_dir():
        bundles = [nano_bundle_folder()]
    if usage is None and (keys is not None or jwks is not None or identify_by_certificate):
        usage = DEFAULT_PLACE
    config = ServerConfig(
        fm=fm or nano_folder(),
        bundle=bundles[0] if bundles else None,
        older_bundles=tuple(bundles[1:]),
        host=host,
        port=port,
        insecure_listen=insecure_listen,
        access=AccessConfig(
            keys=keys,
            jwks=jwks,
            issuer=issuer,
            audience=audience,
            tenant_claim=tenant_claim,
            scope_claim=scope_claim,
            certificate=tls_certificate,
            key=tls_key,
            client_ca=client_ca,
            client_certificates_identify=identify_by_certificate,
        ),
        tenant_limits=limits,
        usage=usage,
        traffic=TrafficLimits(stream_seconds=max_call_seconds, connections=max_connections),
        gradient_noise=_gradient_noise(gradient_clip, gradient_noise, problems),
        health_port=health_port,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
        traces=traces,
        dtype=dtype,
        device=device,
        threads=threads,
        native=native,
        cuda_graphs=cuda_graphs,
        max_batch=max_batch,
        max_waiting=max_waiting,
        max_calls=max_calls,
        max_waiting_tokens=max_waiting_tokens,
        step_positions=step_positions,
        kv_memory_mib=kv_memory_mib,
        block_size=block_size,
        limits=ServiceLimits(max_virtual_tokens=max_virtual_tokens),
        engine_process=engine_process,
        step_seconds=step_seconds,
        drain_seconds=drain_seconds,
        ready_file=ready_file,
    )
    _run(config, problems)


def _run(config: ServerConfig, problems: list[str]) -> None:
    """Serve until the end. problems: found already, told with all others."""
    try:
        config.check(problems)
        event_loop.run(_serve(config))
    except ConfigError as error:
        problems = str(error).splitlines()
        for problem in problems[:-1]:
            typer.echo(f"lopa: {problem}", err=True)
        fail(problems[-1])
    except (UnsupportedModel, EngineError, OSError) as error:
        fail(str(error))


def _gradient_noise(clip: float | None, noise: float, problems: list[str]) -> ClipAndNoise | None:
    """What is wrong goes to `problems`, to be told with the rest."""
    if clip is None:
        problems += ["--gradient-noise is a multiple of --gradient-clip: give both"] if noise else []
        return None
    try:
        return ClipAndNoise(clip, noise)
    except ValueError as error:
        problems.append(f"--gradient-clip and --gradient-noise: {error}")
        return None


async def _serve(config: ServerConfig) -> None:
    """Run until a signal says stop. A signal before the server is ready ends it at once."""
    from lopa_server.app import ServerApp

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    typer.echo(f"Loading {config.fm} …", err=True)
    app = ServerApp(config)
    starting, stopping = asyncio.create_task(app.start()), asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.wait({starting})
        return
    await starting
    heap.settle()
    typer.echo(f"Serving {app.name} on {app.address}" + (f", metrics on {app.metrics_address}" if app.metrics_address else ""))
    broken = asyncio.create_task(app.gave_up())
    await asyncio.wait({stopping, broken}, return_when=asyncio.FIRST_COMPLETED)
    typer.echo("Draining: new calls are refused, running ones may finish.", err=True)
    await app.drain()
    if broken.done():
        typer.echo("lopa: the engine failed; the log above says why. Start the server again", err=True)
        sys.stderr.flush()
        os._exit(EXIT_BROKEN)  # a stuck thread would keep the interpreter from ending
    broken.cancel()
