"""Messages over a pipe: four bytes of length, then JSON."""

from __future__ import annotations

import json
import os
from typing import Any


class ChannelError(Exception):
    """The other side sent what is no message."""


def send(pipe: int, message: Any, limit: int) -> None:
    """Write one message.

    Raises:
        ValueError: it has more than `limit` bytes.
    """
    body = json.dumps(message).encode("ascii")
    if len(body) > limit:
        raise ValueError(f"{len(body)} bytes; the limit is {limit}")
    left = memoryview(len(body).to_bytes(4, "big") + body)
    while left:
        left = left[os.write(pipe, left) :]


def receive(pipe: int, limit: int) -> Any:
    """Read one message; None when the other side has ended.

    Raises:
        ChannelError: longer than `limit` bytes (nothing is read then), cut off, or not JSON.
    """
    head = _exactly(pipe, 4)
    if not head:
        return None
    size = int.from_bytes(head, "big")
    if size > limit:
        raise ChannelError(f"a message of {size} bytes; the limit is {limit}")
    body = _exactly(pipe, size)
    if len(head) < 4 or len(body) < size:
        raise ChannelError("a message was cut off")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ChannelError("a message is not JSON") from error


def _exactly(pipe: int, size: int) -> bytes:
    """So many bytes, or fewer at the end."""
    parts = []
    while size:
        part = os.read(pipe, min(size, 1 << 16))
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
