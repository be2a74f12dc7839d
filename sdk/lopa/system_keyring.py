"""Keys in the operating system's keyring (macOS Keychain, Windows Credential Locker, Secret Service), through the package `keyring`."""

from __future__ import annotations

import secrets

from lopa.errors import MissingDependency, StorageError
from lopa.vault import KEY_BYTES


def keyring_key(service: str, user: str, *, create: bool = True) -> bytes:
    """The key of 32 bytes that the system's keyring holds for this user of this app, for `secret=`.

    create: make a new random one when there is none yet. Whoever loses the keyring loses what was encrypted with its key.

        client.personal(path, secret=lopa.keyring_key("my-app", "ada"))

    Raises:
        MissingDependency: keyring is not installed. StorageError: the keyring is locked or missing, holds no such key, or something else
            under this name.
    """
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError as error:
        raise MissingDependency('the system\'s keyring needs the package keyring: pip install "lopa[keyring]"') from error
    where = f"the system's keyring has {{}} for {user} of {service}"
    try:
        held = keyring.get_password(service, user)
        if held is None:
            if not create:
                raise StorageError(where.format("no key") + "; open this persona where its key is, or call with create=True for a new one")
            keyring.set_password(service, user, secrets.token_hex(KEY_BYTES))
            held = keyring.get_password(service, user)  # what another process may have put there in between counts for both
    except KeyringError as error:
        raise StorageError(f"the system's keyring can't be used ({error}); unlock it, or give a passphrase instead") from error
    try:
        key = bytes.fromhex(held or "")
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise StorageError(where.format("something that is no key of lopa") + "; choose another name")
    return key
