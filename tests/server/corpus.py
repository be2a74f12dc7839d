"""What the fuzzer found: for every way in which a server of lopa-nano answers (method, status, reason, field), the shortest request that
makes it answer so. One line each in `fuzz_corpus.txt`: method and bytes in hex.

python benchmarks/trust.py --only fuzz --work FOLDER
python -m tests.server.corpus FOLDER/fuzz/corpus        # merges what is new into the file
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
from lopa_server.app import ServerConfig, start_server
from lopa_server.models import nano_bundle_folder, nano_folder

from tests.server.client import take_apart

FILE = Path(__file__).with_name("fuzz_corpus.txt")
SERVICES = {"GetModel": "Catalog", "FetchBundle": "Catalog", "Generate": "Inference", "Score": "Inference", "PromptGradients": "Tuning"}
LONGEST = 2048
"""Bytes of a request that is kept."""
CONFIG = ServerConfig(fm=nano_folder(), bundle=nano_bundle_folder(), threads=1)


def kept() -> Iterator[tuple[str, bytes]]:
    """Full method names and requests."""
    for line in FILE.read_text(encoding="utf-8").splitlines():
        method, _, data = line.partition(" ")
        yield method, bytes.fromhex(data)


def answer(channel: grpc.Channel, method: str, data: bytes) -> tuple[str, str, str]:
    """(status, reason, field with its numbers left out). A stream is left after two messages.

    Raises:
        AssertionError: an untyped error.
    """
    streams = method.endswith(("Generate", "FetchBundle"))
    call = (channel.unary_stream if streams else channel.unary_unary)(method, None, None)
    try:
        reply = call(data, timeout=120)
        if streams:
            for _ in range(2):
                next(reply, None)
            reply.cancel()
    except grpc.RpcError as error:
        told = take_apart(error)
        return told.code.name, told.reason, re.sub(r"\d+", "N", told.field)
    return "OK", "", ""


def merge(folder: Path) -> None:
    """The corpus in `folder` into the file."""
    found = list(kept()) if FILE.exists() else []
    for path in folder.glob("*.bin"):
        name, data = path.name.partition("-")[0], path.read_bytes()
        if len(data) <= LONGEST:
            found.append((f"/lopa.v1.{SERVICES[name]}/{name}", data))
    best: dict[tuple[str, ...], bytes] = {}
    with start_server(CONFIG) as server, grpc.insecure_channel(server.address) as channel:
        for method, data in sorted(found, key=lambda entry: (len(entry[1]), entry)):
            best.setdefault((method, *answer(channel, method, data)), data)
    lines = [f"{method} {data.hex()}".rstrip() for (method, *_), data in sorted(best.items())]
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} requests, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    merge(Path(sys.argv[1]))
