"""Encryption: TLS and mutual TLS, with certificates that change while the server runs."""

from __future__ import annotations

import re
import socket
import ssl
from pathlib import Path

import grpc
import pytest
from lopa.cli import main
from lopa.v1 import catalog_pb2
from lopa_server.app import ConfigError, ServerConfig, start_server
from lopa_server.identity.caller import DEVICE_SCOPES
from lopa_server.identity.config import AccessConfig
from lopa_server.identity.keys import KeyFile

from tests.server.certificates import Authority
from tests.server.client import Client, failure, generate_request

GET_MODEL = catalog_pb2.GetModelRequest()


def _common_name(address: str, authority: Authority) -> str:
    """The common name in the certificate that a new connection is shown."""
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.set_alpn_protocols(["h2"])
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=20) as plain, context.wrap_socket(plain, server_hostname="localhost") as tls:
        return dict(entry[0] for entry in tls.getpeercert()["subject"])["commonName"]


def test_a_new_certificate_is_served_without_a_restart(tiny_fm: Path, tmp_path: Path) -> None:
    authority = Authority()
    certificate, key = authority.leaf("first").write(tmp_path)
    config = ServerConfig(fm=tiny_fm, threads=1, access=AccessConfig(certificate=certificate, key=key))
    credentials = grpc.ssl_channel_credentials(authority.pem)
    with start_server(config) as server, grpc.secure_channel(server.address, credentials) as channel:
        call = Client(channel).inference.Generate(generate_request(max_tokens=300))
        tokens = len(next(call).token_ids)
        assert _common_name(server.address, authority) == "first"
        authority.leaf("second").write(tmp_path)
        assert _common_name(server.address, authority) == "second"
        key.write_bytes(b"damaged")
        assert _common_name(server.address, authority) == "second"
        assert tokens + sum(len(delta.token_ids) for delta in call) == 300, "open connections live on"
        with grpc.insecure_channel(server.address) as plain, pytest.raises(grpc.RpcError):
            Client(plain).catalog.GetModel(GET_MODEL, timeout=20)


def test_mutual_tls_identifies_by_certificate(tiny_fm: Path, tmp_path: Path) -> None:
    authority, clients = Authority(), Authority("clients")
    certificate, key = authority.leaf("server").write(tmp_path)
    (tmp_path / "clients.pem").write_bytes(clients.pem)
    access = AccessConfig(certificate=certificate, key=key, client_ca=tmp_path / "clients.pem", client_certificates_identify=True)
    with start_server(ServerConfig(fm=tiny_fm, threads=1, access=access)) as server:

        def connect(leaf: object) -> grpc.Channel:
            pair = (leaf.key, leaf.certificate) if leaf is not None else (None, None)
            return grpc.secure_channel(server.address, grpc.ssl_channel_credentials(authority.pem, *pair))

        with connect(clients.leaf("acme")) as channel:
            assert len(Client(channel).tokens(generate_request())) == 12
        with connect(clients.leaf("no tenant's name")) as channel:
            assert failure(lambda: Client(channel).catalog.GetModel(GET_MODEL)).reason == "INVALID_CREDENTIALS"
        for stranger in (None, Authority("clients").leaf("acme")):
            with connect(stranger) as channel, pytest.raises(grpc.RpcError) as refused:
                Client(channel).catalog.GetModel(GET_MODEL, timeout=20)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("wrong", ["another's key", "locked key", "no authority"])
def test_a_certificate_that_cannot_be_used_ends_the_start(tiny_fm: Path, tmp_path: Path, wrong: str) -> None:
    """A locked key must not have anybody asked for its passphrase."""
    leaf = Authority().leaf("server")
    certificate, key = leaf.write(tmp_path)
    (tmp_path / "ca.pem").write_bytes(b"nothing")
    if wrong == "another's key":
        key.write_bytes(Authority().leaf("other").key)
    elif wrong == "locked key":
        key.write_bytes(leaf.locked("secret"))
    authority = tmp_path / "ca.pem" if wrong == "no authority" else None
    with pytest.raises(ConfigError, match="can't be used for TLS"):
        start_server(ServerConfig(fm=tiny_fm, access=AccessConfig(certificate=certificate, key=key, client_ca=authority)))


def test_a_new_authority_of_clients_counts_without_a_restart(tiny_fm: Path, tmp_path: Path) -> None:
    authority, old, new = Authority(), Authority("clients"), Authority("clients")
    certificate, key = authority.leaf("server").write(tmp_path)
    place = tmp_path / "clients.pem"
    place.write_bytes(old.pem)
    access = AccessConfig(certificate=certificate, key=key, client_ca=place, client_certificates_identify=True)

    def answers(clients: Authority) -> bool:
        leaf = clients.leaf("acme")
        with grpc.secure_channel(server.address, grpc.ssl_channel_credentials(authority.pem, leaf.key, leaf.certificate)) as channel:
            try:
                return bool(Client(channel).catalog.GetModel(GET_MODEL, timeout=20).hidden_size)
            except grpc.RpcError as refused:
                assert refused.code() is grpc.StatusCode.UNAVAILABLE
                return False

    with start_server(ServerConfig(fm=tiny_fm, threads=1, access=access)) as server:
        assert (answers(old), answers(new)) == (True, False)
        place.write_bytes(new.pem)
        assert (answers(old), answers(new)) == (False, True)
        place.write_bytes(b"half a f")
        assert (answers(old), answers(new)) == (False, True), "what can't be used changes nothing"


def test_every_wrong_setting_is_told_at_once(tmp_path: Path) -> None:
    access = AccessConfig(certificate=tmp_path / "none.pem", client_certificates_identify=True, jwks="http://id.example/keys")
    with pytest.raises(ConfigError) as told:
        ServerConfig(fm="x", port=70000, host="0.0.0.0", max_batch=0, dtype="int4", drain_seconds=-1, access=access).check()
    lines = str(told.value).splitlines()
    for number, expected in enumerate(
        [
            "port is 70000",
            "max_batch is 0",
            "'int4'",
            "drain_seconds is -1",
            "TLS needs both",
            "identify",
            "--issuer",
            "not https",
            "none.pem",
        ]
    ):
        assert re.search(re.escape(expected), lines[number]), lines


def test_wrong_files_are_told_together_with_wrong_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certificate, key = Authority().leaf("server").write(tmp_path)
    key.write_bytes(Authority().leaf("other").key)
    (tmp_path / "damaged").write_text("{")
    damaged, port = str(tmp_path / "damaged"), ["--port", "7070", "--health-port", "7070"]
    tls = ["--tls-certificate", str(certificate), "--tls-key", str(key)]
    identity = ["--keys", damaged, "--jwks", damaged, "--issuer", "i", "--audience", "a", "--limits", damaged]
    places = ["--fm", str(tmp_path), "--bundle", str(tmp_path), "--usage", str(tmp_path / "none" / "usage")]
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--log-level", "loud", "--gradient-noise", "1", *port, *tls, *identity, *places])
    lines = capsys.readouterr().err.splitlines()
    expected = [
        "log_level is 'loud'",
        "--gradient-noise",
        "health_port is 7070, and so is port",
        "can't read the limits",
        "no config.json",
        "is not a bundle",
        "is no key file",
        "not a JWKS",
        "can't be used for TLS",
        "there is no folder",
    ]
    assert ended.value.code == 1 and len(lines) == len(expected)
    assert all(part in line for part, line in zip(expected, lines, strict=True)), lines


@pytest.mark.parametrize("missing", ["is not encrypted", "lets everybody in"])
def test_beyond_this_machine_needs_encryption_and_identity(tmp_path: Path, missing: str) -> None:
    certificate, key = Authority().leaf("server").write(tmp_path)
    KeyFile(tmp_path / "keys.json").create("acme", DEVICE_SCOPES, None)
    access = AccessConfig(keys=tmp_path / "keys.json") if missing == "is not encrypted" else AccessConfig(certificate=certificate, key=key)
    with pytest.raises(ConfigError, match=missing):
        ServerConfig(fm="x", host="0.0.0.0", access=access).check()
    ServerConfig(fm="x", host="0.0.0.0", access=access, insecure_listen=True).check()
    ServerConfig(fm="x", host="0.0.0.0", access=AccessConfig(keys=tmp_path / "keys.json", certificate=certificate, key=key)).check()
