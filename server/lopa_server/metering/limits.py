"""What each tenant may use: one TOML file, a [default] and a [tenants.NAME] for whoever differs from it.

[default]
requests_per_second = 20
tokens_per_second = 2000
concurrent_calls = 32

[tenants.acme]
tokens_per_day = 50_000_000
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS = ("requests", "tokens", "pairs", "bytes")
"""tokens: read (soft-prompt rows included) and generated; pairs: scored or differentiated; bytes: of messages, both ways."""


class LimitsFileError(ValueError):
    """A limits file that can't be used. The message says which and why."""


@dataclass(frozen=True)
class TenantLimits:
    """One line a field; None: no such limit. Rates allow bursts of `burst_seconds` times themselves. Days are UTC."""

    requests_per_second: float | None = None
    tokens_per_second: float | None = None
    pairs_per_second: float | None = None
    bytes_per_second: float | None = None
    requests_per_day: int | None = None
    tokens_per_day: int | None = None
    pairs_per_day: int | None = None
    bytes_per_day: int | None = None
    concurrent_calls: int | None = None
    """Calls of every kind at the same time, streams included."""
    burst_seconds: float = 10.0
    weight: float = 1.0
    """Share of the engine relative to other tenants' when there is more work than it can do. Read when the server starts."""

    def rate(self, metric: str) -> float | None:
        """Of METRICS, a second."""
        value: float | None = getattr(self, f"{metric}_per_second")
        return value

    def quota(self, metric: str) -> int | None:
        """Of METRICS, a day."""
        value: int | None = getattr(self, f"{metric}_per_day")
        return value


@dataclass(frozen=True)
class Limits:
    """Everybody's."""

    default: TenantLimits = field(default_factory=TenantLimits)
    tenants: Mapping[str, TenantLimits] = field(default_factory=dict)

    def of(self, tenant: str) -> TenantLimits:
        return self.tenants.get(tenant, self.default)


def read_limits(path: Path) -> Limits:
    """What a tenant's table leaves out is as in [default].

    Raises:
        LimitsFileError: with every problem of the file, one line each.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LimitsFileError(f"can't read the limits {path}: {error}") from error
    problems = [f"{path}: unknown table [{name}]" for name in document if name not in ("default", "tenants")]
    tables = {"default": document.get("default", {}), **{f"tenants.{name}": table for name, table in document.get("tenants", {}).items()}}
    problems += [f"{path}: {problem}" for name, table in tables.items() for problem in _problems(name, table)]
    if problems:
        raise LimitsFileError("\n".join(problems))
    default = TenantLimits(**tables.pop("default"))
    return Limits(default, {name.removeprefix("tenants."): dataclasses.replace(default, **table) for name, table in tables.items()})


def _problems(name: str, table: Any) -> list[str]:
    if not isinstance(table, dict):
        return [f"{name} must be a table"]
    known = {entry.name for entry in dataclasses.fields(TenantLimits)}
    found = [f"[{name}] has no setting {key}" for key in table if key not in known]
    for key in known & set(table):
        value = table[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            found.append(f"[{name}] {key} is {value!r}; it must be a number above 0")
    return found
