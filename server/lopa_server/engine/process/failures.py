"""Errors of the engine's process, as its server raises them again."""

from __future__ import annotations

from lopa_server.config import ConfigError
from lopa_server.engine.base import EngineError, EngineFailed, EngineStopped, QueueFull, UnsupportedModel, UnsupportedSchema
from lopa_server.engine.process.wire import Failed, NotLoaded
from lopa_server.logs import trace_of

KINDS: dict[str, type[EngineError]] = {kind.__name__: kind for kind in (UnsupportedSchema, QueueFull, EngineStopped, EngineFailed)}
NOT_LOADED: dict[str, type[Exception]] = {kind.__name__: kind for kind in (ConfigError, UnsupportedModel, FileNotFoundError, OSError)}
"""What an operator can do something about. Anything else is a ChildProcessError, with its trace in the log."""


def failed(name: str, error: Exception) -> Failed:
    """The message for a request's error. Its trace goes along, without what anybody wrote."""
    if type(error).__name__ not in KINDS:
        error, cause = EngineFailed(f"{type(error).__name__}: {error}"), error
        error.__cause__ = cause
    arguments: list[str | int | float] = [str(error)]
    if isinstance(error, QueueFull):
        arguments = [error.queue, error.waiting, error.limit, error.retry_after]
    return Failed(name, type(error).__name__, arguments, trace_of(error))


def error_of(failed: Failed) -> EngineError:
    """The error of a message."""
    error = KINDS[failed.kind](*failed.arguments)
    error.trace = failed.trace
    return error


def not_loaded(error: Exception) -> NotLoaded:
    """The message for an engine that can't start. No client has said anything yet: the error's own words may go along."""
    known = next((name for name, kind in NOT_LOADED.items() if isinstance(error, kind)), "")
    return NotLoaded(known, str(error) if known else f"the engine can't be loaded: {type(error).__name__}: {error}")


def load_error_of(message: NotLoaded) -> Exception:
    """The error of a message."""
    return NOT_LOADED.get(message.kind, ChildProcessError)(message.message)
