"""An app's OpenTelemetry trace goes on in the server. Nothing is imported for it: an app that traces has imported it itself."""

from __future__ import annotations

import sys
from typing import Any


def trace_headers() -> list[tuple[str, str]]:
    """Headers that name the current span, such as `traceparent`; none when the app doesn't trace."""
    propagate: Any = sys.modules.get("opentelemetry.propagate")
    if propagate is None:
        return []
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return [(name.lower(), value) for name, value in carrier.items() if value.isascii() and value.isprintable()]
