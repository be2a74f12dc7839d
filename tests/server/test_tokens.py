"""Bearer tokens of an identity provider: only what it signed, for us, in time."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.server
import json
import ssl
import threading
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jwt
import lopa_server.identity.tokens as tokens
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from lopa.wire.errors import Reason, WireError
from lopa_server.identity.authenticator import Authenticator
from lopa_server.identity.caller import Caller, Scope
from lopa_server.identity.config import AccessConfig
from lopa_server.identity.tokens import JwksError, KeySet, parse_jwks

from tests.server.certificates import Authority

GENERATE = "/lopa.v1.Inference/Generate"
KEYS = {
    "rsa": ("RS256", rsa.generate_private_key(public_exponent=65537, key_size=2048)),
    "ec": ("ES256", ec.generate_private_key(ec.SECP256R1())),
    "ed": ("EdDSA", ed25519.Ed25519PrivateKey.generate()),
}
Result = TypeVar("Result")


def jwks(*names: str) -> dict[str, Any]:
    """The public keys of these names."""
    entries = []
    for name in names:
        algorithm, key = KEYS[name]
        public = json.loads(jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key()))
        entries.append({**public, "kid": name, "use": "sig", "alg": algorithm})
    return {"keys": entries}


def claims(**changes: Any) -> dict[str, Any]:
    """Of a token that is good for the tenant acme; None takes a claim out."""
    now = int(time.time())
    good = {"iss": "https://id.example", "aud": "lopa", "sub": "acme", "scope": "generate tune", "iat": now, "exp": now + 300, **changes}
    return {name: value for name, value in good.items() if value is not None}


def signed(name: str = "rsa", **changes: Any) -> str:
    algorithm, key = KEYS[name]
    return jwt.encode(claims(**changes), key, algorithm=algorithm, headers={"kid": name})


def run(work: Awaitable[Result]) -> Result:
    return asyncio.run(work)


async def admitted(config: AccessConfig, token: str, method: str = GENERATE) -> Caller:
    authenticator = Authenticator(config)
    await authenticator.start()
    return await authenticator.admit(method, [("authorization", f"Bearer {token}")], {})


@pytest.fixture
def config(tmp_path: Path) -> AccessConfig:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(jwks(*KEYS)))
    return AccessConfig(jwks=str(path), issuer="https://id.example", audience="lopa")


@pytest.mark.parametrize("name", KEYS)
def test_a_good_token_is_its_tenant(config: AccessConfig, name: str) -> None:
    caller = run(admitted(config, signed(name)))
    assert (caller.tenant, caller.scopes) == ("acme", {Scope.GENERATE, Scope.TUNE})


def _unsigned() -> str:
    return jwt.encode(claims(), None, algorithm="none", headers={"kid": "rsa"})


def _public_key_as_secret() -> str:
    """The classic confusion: HMAC with the public key, which everybody knows, as its secret."""
    public = json.dumps(jwks("rsa")["keys"][0]).encode()
    parts = [{"alg": "HS256", "typ": "JWT", "kid": "rsa"}, claims()]
    head = b".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts)
    return f"{head.decode()}.{base64.urlsafe_b64encode(jwt.get_algorithm_by_name('HS256').sign(head, public)).rstrip(b'=').decode()}"


def _other_key() -> str:
    return jwt.encode(claims(), ec.generate_private_key(ec.SECP256R1()), algorithm="ES256", headers={"kid": "ec"})


def _changed() -> str:
    head, _, signature = signed().split(".")
    return ".".join((head, base64.urlsafe_b64encode(json.dumps(claims(sub="other")).encode()).rstrip(b"=").decode(), signature))


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (lambda: signed(exp=int(time.time()) - 120), Reason.EXPIRED_CREDENTIALS),
        (lambda: signed(exp=None), Reason.INVALID_CREDENTIALS),
        (lambda: signed(nbf=int(time.time()) + 3600), Reason.INVALID_CREDENTIALS),
        (lambda: signed(aud="somebody else"), Reason.INVALID_CREDENTIALS),
        (lambda: signed(aud=None), Reason.INVALID_CREDENTIALS),
        (lambda: signed(iss="https://other.example"), Reason.INVALID_CREDENTIALS),
        (lambda: signed(sub=None), Reason.INVALID_CREDENTIALS),
        (lambda: signed(sub="two\nlines"), Reason.INVALID_CREDENTIALS),
        (lambda: signed(scope="score"), Reason.MISSING_SCOPE),
        (lambda: signed(scope=["tune", 7, None]), Reason.MISSING_SCOPE),
        (lambda: signed(scope=None), Reason.MISSING_SCOPE),
        (_unsigned, Reason.INVALID_CREDENTIALS),
        (_public_key_as_secret, Reason.INVALID_CREDENTIALS),
        (_other_key, Reason.INVALID_CREDENTIALS),
        (_changed, Reason.INVALID_CREDENTIALS),
        (lambda: "a.b.c", Reason.INVALID_CREDENTIALS),
        (lambda: "\x00", Reason.INVALID_CREDENTIALS),
    ],
)
def test_any_other_token_is_refused(config: AccessConfig, token: Any, reason: Reason) -> None:
    with pytest.raises(WireError) as refused:
        run(admitted(config, token()))
    assert refused.value.reason is reason


def test_keys_are_rotated_without_a_restart(config: AccessConfig) -> None:
    async def rotate() -> None:
        authenticator = Authenticator(config)
        await authenticator.start()
        Path(config.jwks).write_text(json.dumps(jwks("ed")))
        assert (await authenticator.admit(GENERATE, [("authorization", f"bearer {signed('ed')}")], {})).tenant == "acme"
        with pytest.raises(WireError):
            await authenticator.admit(GENERATE, [("authorization", f"Bearer {signed('rsa')}")], {})

    run(rotate())


@contextlib.contextmanager
def provider(folder: Path, authority: Authority) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """An https server on this machine: its address, the paths asked for, and what it answers."""
    asked: list[str] = []
    document: dict[str, Any] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("location", "/jwks")
            else:
                self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, *_: object) -> None:
            """Quiet."""

    certificate, key = authority.leaf("localhost").write(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"https://localhost:{server.server_port}", asked, document
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_keys_come_over_https_and_strangers_cannot_cause_fetches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority()
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    now = [1000.0]
    monkeypatch.setattr(tokens.time, "monotonic", lambda: now[0])
    with provider(tmp_path, authority) as (address, asked, document):
        with pytest.raises(JwksError, match="CERTIFICATE_VERIFY_FAILED"):
            run(KeySet(f"{address}/jwks").load())
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        with pytest.raises(JwksError, match="302"):
            run(KeySet(f"{address}/moved").load())
        document.update(jwks("rsa"))
        asked.clear()

        async def use() -> None:
            keys = KeySet(f"{address}/jwks")
            await keys.load()
            assert await keys.key("rsa") is not None
            assert [await keys.key(f"stranger {number}") for number in range(20)] == [None] * 20
            assert len(asked) == 1
            document.update(jwks("ec"))
            now[0] += tokens.AGAIN_SECONDS
            assert await keys.key("ec") is not None and len(asked) == 2
            now[0] += tokens.FRESH_SECONDS
            document.clear()
            assert await keys.key("ec") is not None, "a provider that fails changes nothing"
            assert len(asked) == 3

        run(use())


@pytest.mark.parametrize(
    "document", [b"", b"[]", b'{"keys": []}', b'{"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "a"}]}', b'{"keys": [7]}']
)
def test_a_set_without_a_usable_key_is_refused(document: bytes) -> None:
    with pytest.raises(JwksError):
        parse_jwks(document)
