"""Looks at PEM files before gRPC does: it would take ones that it can't use, and then say that the connection was refused."""

from __future__ import annotations

import binascii
import os
import re
import ssl
from io import FileIO

_BLOCK = rb"-----BEGIN ([A-Z0-9 ]*PRIVATE KEY)-----\s(.*?)-----END \1-----"


class PemError(ValueError):
    """Bytes that are not what they should be. The message says what is wrong with them, and holds nothing of them."""


def check_certificates(pem: bytes) -> None:
    """Raises PemError unless there is at least one certificate, and none is damaged."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise PemError("no certificate in PEM, or a damaged one") from error


def check_key(pem: bytes) -> None:
    """Raises PemError unless there is a private key that needs no passphrase."""
    found = re.search(_BLOCK, pem, re.DOTALL)
    if found is None:
        raise PemError("no private key in PEM")
    if b"ENCRYPTED" in found[1] or b"ENCRYPTED" in found[2]:
        raise PemError("a private key with a passphrase, which gRPC can't ask for")
    try:
        binascii.a2b_base64(found[2])
    except ValueError as error:
        raise PemError("a damaged private key") from error


def check_pair(key: bytes, chain: bytes) -> None:
    """Raises PemError when the key is not that of the chain's first certificate. Where the system has no files in memory alone this
    isn't looked at: a private key is not written to a disk for it.
    """
    if not hasattr(os, "memfd_create"):
        return
    with _in_memory(chain) as chain_file, _in_memory(key) as key_file:
        at = [f"/proc/self/fd/{file.fileno()}" for file in (chain_file, key_file)]
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(at[0], at[1], password=lambda: "")
        except ssl.SSLError as error:
            raise PemError("a key that doesn't belong to the certificate, or a damaged one") from error
        except OSError:  # no /proc here: gRPC will see
            return


def _in_memory(data: bytes) -> FileIO:
    file = FileIO(os.memfd_create("lopa-pem"), "wb")
    file.write(data)
    return file
