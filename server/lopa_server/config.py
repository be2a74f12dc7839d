"""The server's settings. Nothing here imports torch, so that a command line can show its help without it."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lopa.noise import ClipAndNoise

from lopa_server.identity.config import AccessConfig
from lopa_server.limits import ServiceLimits, TrafficLimits
from lopa_server.metering.limits import LimitsFileError, read_limits
from lopa_server.preflight import findings

DTYPES = ("float32", "bfloat16")
DEFAULT_CALLS = 1024
COUNTS = (
    "max_batch",
    "max_waiting",
    "max_waiting_tokens",
    "max_waiting_pairs",
    "max_calls",
    "step_positions",
    "block_size",
    "kv_memory_mib",
    "threads",
)
"""Settings that must be at least 1 where they are given."""


class ConfigError(ValueError):
    """Settings that don't fit together, or don't fit this machine or model. The message says what to do, one line a problem."""


@dataclass(frozen=True)
class ServerConfig:
    """One line a field."""

    fm: str | Path
    """Hugging Face id or folder of the foundation model."""
    bundle: str | Path | None = None
    """Folder of the bundle to publish; None publishes none."""
    older_bundles: tuple[str | Path, ...] = ()
    """Folders of bundles that devices may still fetch by their id."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but a loopback address needs insecure_listen."""
    port: int = 0
    """0: any free port."""
    insecure_listen: bool = False
    """Listen beyond this machine although nothing is encrypted and nobody is authenticated."""
    dtype: str | None = None
    """"float32" or "bfloat16"; None: bfloat16 on CUDA, float32 on the CPU."""
    device: str | None = None
    """"cpu", "cuda", "cuda:1"; None: CUDA where there is one."""
    engine_process: bool = False
    """The engine runs in a process of its own, as `lopa serve` has it: it can crash, be stuck and run out of memory by itself."""
    threads: int | None = None
    """CPU threads for torch; None: torch's own choice."""
    native: bool = True
    """Our own kernels, compiled on this machine: by its C compiler for a CPU, by Triton for CUDA. Where that fails, torch alone."""
    cuda_graphs: bool = True
    """On CUDA: decode steps captured as graphs, where the model allows it."""
    max_batch: int = 32
    """Generate requests in the batch at the same time."""
    max_waiting: int = 256
    """Generate requests waiting for a place in it."""
    max_waiting_tokens: int = 1 << 18
    """Tokens to read and to write, of all waiting generate requests together."""
    max_waiting_pairs: int = 8192
    """Pairs waiting to be scored or differentiated."""
    max_calls: int | None = None
    """Calls of every kind at the same time, so that their requests can't fill the memory; health checks don't count. Where callers
    are known, none of them gets the last fifth. None: 1024, or twice what max_batch and max_waiting allow where that is more."""
    step_positions: int | None = None
    """Positions in one step of streams or one micro-batch of pairs: more is faster, less lets others in sooner. None: what
    suits the device."""
    block_size: int = 8
    """Positions in one block of the key-value pool."""
    kv_memory_mib: int | None = None
    """MiB for the key-value pool and the prefix cache in it; one full context at least. None: 40 % of the free memory, on
    a CPU 4 GiB at most."""
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    traffic: TrafficLimits = field(default_factory=TrafficLimits)
    tenant_limits: Path | None = None
    """TOML file of rates and quotas (`metering.limits`); read again when it changes. None: no such limits."""
    usage: str | Path | None = None
    """SQLite file, or URL of a PostgreSQL database, for usage counters. None: they end with the process."""
    access: AccessConfig = field(default_factory=AccessConfig)
    """Who may call, and encryption."""
    gradient_noise: ClipAndNoise | None = None
    """Applied to every pair's gradient before it is returned."""
    health_port: int | None = None
    """One more port, plain text, that answers liveness probes and nothing else; 0: any free one. For probes that speak no TLS."""
    step_seconds: float = 300.0
    """A step of the engine that takes longer is stuck: its calls are answered, and the engine is ended and started again. Without a
    process of its own it can't be ended: the whole process has to."""
    metrics_port: int | None = None
    """Port of the Prometheus metrics page; 0: any free one. None: no metrics."""
    metrics_host: str = "127.0.0.1"
    """Address of that page: whoever reaches it sees totals, never who asked or what."""
    traces: bool = False
    """OpenTelemetry spans by OTLP; the standard OTEL_ variables say where to."""
    drain_seconds: float = 30.0
    """How long running calls may take to finish after SIGTERM."""
    ready_file: Path | None = None
    """Written with "host:port" once the server is SERVING."""

    @property
    def call_bound(self) -> int:
        """max_calls, or its default: wide enough that a full queue answers by itself, with its time to come back."""
        return self.max_calls or max(DEFAULT_CALLS, 2 * (self.max_batch + self.max_waiting))

    def check(self, also: Iterable[str] = ()) -> None:
        """Raises ConfigError with everything that can't work, one line each. also: problems that were found before."""
        problems = [*also, *self._ranges(), *self.access.problems(), *self._exposure(), *self._tenant_limits(), *findings(self)]
        if problems:
            raise ConfigError("\n".join(problems))

    def _ports(self) -> Iterator[str]:
        taken: dict[tuple[str, int], str] = {}
        for name, host in (("port", self.host), ("health_port", self.host), ("metrics_port", self.metrics_host)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 65535:
                yield f"{name} is {value}; it must be from 0 to 65535"
            elif value and (host, value) in taken:
                yield f"{name} is {value}, and so is {taken[host, value]}"
            elif value:
                taken[host, value] = name

    def _ranges(self) -> Iterator[str]:
        yield from self._ports()
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name} is {value}; it must be at least 1"
        if not _is_text(self.fm):
            yield f"fm is {str(self.fm)!r}; the name must be UTF-8"
        if self.dtype not in (None, *DTYPES):
            yield f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}"
        for limit in dataclasses.fields(self.traffic):
            value = getattr(self.traffic, limit.name)
            if value <= 0:
                yield f"traffic.{limit.name} is {value}; it must be above 0"
        if self.step_seconds <= 0:
            yield f"step_seconds is {self.step_seconds}; it must be above 0"
        if self.drain_seconds < 0:
            yield f"drain_seconds is {self.drain_seconds}; it can't be negative"
        if self.limits.max_virtual_tokens < 1:
            yield f"max_virtual_tokens is {self.limits.max_virtual_tokens}; it must be at least 1"
        if self.ready_file is not None and not self.ready_file.parent.is_dir():
            yield f"can't write the ready file {self.ready_file}: there is no folder {self.ready_file.parent}"

    def tenant_weights(self) -> dict[str, float]:
        """Shares of the tenants that have one of their own, relative to everybody else's.

        Raises:
            LimitsFileError: see `read_limits`.
        """
        if self.tenant_limits is None:
            return {}
        limits = read_limits(self.tenant_limits)
        return {name: own.weight / limits.default.weight for name, own in limits.tenants.items()}

    def _tenant_limits(self) -> list[str]:
        try:
            if self.tenant_limits is not None:
                read_limits(self.tenant_limits)
        except LimitsFileError as error:
            return str(error).splitlines()
        return []

    def _exposure(self) -> Iterator[str]:
        """Beyond this machine: encrypted and for known callers only, or with a flag that says otherwise."""
        if self.insecure_listen or is_loopback(self.host):
            return
        missing = [] if self.access.encrypted else ["is not encrypted (--tls-certificate, --tls-key)"]
        missing += [] if self.access.identified else ["lets everybody in (--keys, --jwks or --client-ca with --identify-by-certificate)"]
        if missing:
            yield (
                f"{self.host} is reachable from other machines, and this server {' and '.join(missing)}: use 127.0.0.1, "
                "or allow it with insecure_listen (--insecure-listen) behind something that encrypts and authenticates"
            )


def _is_text(name: str | Path) -> bool:
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
