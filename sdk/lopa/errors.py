"""Everything that can go wrong on the device, as one tree. Catch `LopaError` for all of it.

    LopaError
    ├── RemoteError                 the server answered with an error, or did not answer
    │   ├── Unavailable             no connection, or the server is starting or shutting down: try again
    │   ├── DeadlineExceeded        no answer within the time allowed
    │   ├── Cancelled               the call was cancelled
    │   ├── InvalidRequest          a field of the request is wrong: .field, .limit
    │   ├── PreconditionFailed      the request does not fit the server's state
    │   │   └── FingerprintMismatch factors, bundle and foundation model do not belong together (also found locally)
    │   ├── NotFound                no such bundle
    │   ├── ResourceExhausted       queue full or quota spent; .retry_after says when to come back
    │   ├── Unauthenticated         no valid credentials
    │   ├── PermissionDenied        valid credentials, but not for this
    │   └── ServerError             the server failed
    ├── ProtocolError               a reply that breaks the contract: a wrong receipt, shape or number
    └── LocalError                  on this device
        ├── BundleError             a bundle that is damaged, incomplete, or not what its id says (also a ValueError)
        ├── FolderError             a personal folder that is damaged, locked, of another schema, or lacks what was asked for
        ├── FactorsError            a factors file that is damaged or does not fit its bundle
        ├── StorageError            not enough disk space, or a file that can't be written
        ├── TuningError             examples or settings that can't be tuned on (also a ValueError)
        └── MissingDependency       a Python package that this needs is not installed: the message says which (also an ImportError)

`lopa.transport.translate` is the one place where gRPC's errors become these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lopa.wire.errors import Reason


class LopaError(Exception):
    """Root of the tree. The message is one line that says what is wrong and, where known, what to do."""


class RemoteError(LopaError):
    """A call that failed."""

    def __init__(self, message: str, *, reason: Reason | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        """The catalogue's word for it; None when the failure came from the network."""
        self.retry_after = retry_after
        """Seconds after which the server asks to be tried again; None when it does not ask for that."""


class Unavailable(RemoteError):
    """No connection, or the server is starting or shutting down. Trying again later can help; local work goes on."""


class DeadlineExceeded(RemoteError):
    """No answer within the time allowed."""


class Cancelled(RemoteError):
    """The call was cancelled before its end."""


class InvalidRequest(RemoteError):
    """A field of the request breaks a rule. The same request will fail again."""

    def __init__(self, message: str, *, field: str = "", limit: str = "", found: str = "", reason: Reason | None = None) -> None:
        super().__init__(message, reason=reason)
        self.field = field
        """Path in the request, such as `pairs[3].soft_prompt.data`."""
        self.limit = limit
        """What is allowed."""
        self.found = found
        """What was sent."""


class PreconditionFailed(RemoteError):
    """The request is well formed, but does not fit the server's state."""


class FingerprintMismatch(PreconditionFailed):
    """Factors, bundle and foundation model do not belong together."""


class NotFound(RemoteError):
    """The server does not have what was asked for."""


class ResourceExhausted(RemoteError):
    """The server's queue is full or a quota is spent. Without `retry_after`, trying again has no point."""


class Unauthenticated(RemoteError):
    """No valid credentials."""


class PermissionDenied(RemoteError):
    """Valid credentials, but not for this."""


class ServerError(RemoteError):
    """The server failed. Its log has the detail."""


class ProtocolError(LopaError):
    """A reply that breaks the contract. Nothing of it was used."""


class LocalError(LopaError):
    """Something on this device."""


class BundleError(LocalError, ValueError):
    """A bundle that is damaged, incomplete, of an unknown schema, or not what its id says."""


class FolderError(LocalError):
    """A personal folder that is damaged, in use by another process, of an unknown schema, or lacks what was asked for."""


class FactorsError(LocalError):
    """A factors file that is damaged or does not fit its bundle."""


class StorageError(LocalError):
    """Not enough disk space, or a file that can't be written."""


class TuningError(LocalError, ValueError):
    """Examples or settings that can't be tuned on."""


class MissingDependency(LocalError, ImportError):
    """A Python package that this needs is not installed. The message says what to install."""
