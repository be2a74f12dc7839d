"""The deployment files say what the command understands, and the command writes where they let it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from lopa_server import probe
from lopa_server.app import RunningServer
from lopa_server.cli import serve
from lopa_server.identity.caller import DEVICE_SCOPES
from lopa_server.identity.keys import KeyFile
from lopa_server.metering.limits import read_limits

from tests.server.certificates import Authority

ROOT = Path(__file__).resolve().parents[2]
RESOURCES = [*yaml.safe_load_all((ROOT / "deploy/kubernetes/lopa.yaml").read_text(encoding="utf-8"))]
CONTAINERFILE = (ROOT / "deploy/Containerfile").read_text(encoding="utf-8")
COMMAND = typer.main.get_command((lambda app: app.command()(serve) and app)(typer.Typer()))


def _resource(kind: str) -> dict[str, Any]:
    (found,) = [resource for resource in RESOURCES if resource["kind"] == kind]
    return found


POD = _resource("Deployment")["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def _unit() -> dict[str, list[str]]:
    """The systemd unit's settings: every value of each key."""
    text = (ROOT / "deploy/lopa.service").read_text(encoding="utf-8").replace("\\\n", " ")
    settings: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            settings.setdefault(key, []).append(value.strip())
    return settings


def _container_command() -> list[str]:
    entry = re.findall(r"^ENTRYPOINT \[(.*)\]$", CONTAINERFILE, re.MULTILINE)[0]
    program, command, *options = [part.strip().strip('"') for part in entry.split(",")]
    assert (program, command) == ("lopa", "serve")
    return options


def _parsed(options: Sequence[str]) -> dict[str, Any]:
    """Options as `lopa serve` takes them. Fails for one that it doesn't know, or a value that isn't of its kind."""
    return COMMAND.make_context("serve", list(options)).params


SYSTEMD = shlex.split(_unit()["ExecStart"][0])[2:]
EVERYWHERE = {"systemd": SYSTEMD, "kubernetes": CONTAINER["args"], "container": _container_command()}


@pytest.mark.parametrize("where", EVERYWHERE)
def test_the_command_understands_its_options(where: str) -> None:
    assert _parsed(EVERYWHERE[where])


@pytest.mark.parametrize("file", ["docs/operations.md", "SECURITY.md", "docs/observability.md"])
def test_every_option_in_the_documentation_exists(file: str) -> None:
    known = {name for parameter in COMMAND.params for name in (*parameter.opts, *parameter.secondary_opts)}
    used = set(re.findall(r"(?<=`)--[a-z-]+", (ROOT / file).read_text(encoding="utf-8")))
    assert used and used <= known | {"--quick", "--only", "--share", "--once", "--cv"}


def test_containers_have_no_root_and_nothing_writable() -> None:
    user = re.findall(r"^USER (\d+):\d+$", CONTAINERFILE, re.MULTILINE)
    pod, own = POD["securityContext"], CONTAINER["securityContext"]
    assert user == [str(pod["runAsUser"])] and pod["runAsUser"] > 0 and pod["runAsNonRoot"] is True
    assert (own["readOnlyRootFilesystem"], own["allowPrivilegeEscalation"], own["capabilities"]) == (True, False, {"drop": ["ALL"]})
    unit = _unit()
    assert unit["DynamicUser"] == ["yes"] and unit["ProtectSystem"] == ["strict"] and unit["CapabilityBoundingSet"] == [""]


def test_probes_ask_a_port_that_the_server_has() -> None:
    options = _parsed(CONTAINER["args"])
    ports = {entry["name"]: entry["containerPort"] for entry in CONTAINER["ports"]}
    assert ports == {"grpc": options["port"], "health": options["health_port"]}
    assert CONTAINER["startupProbe"]["grpc"] == CONTAINER["readinessProbe"]["grpc"] == {"port": ports["health"]}
    assert CONTAINER["livenessProbe"]["tcpSocket"] == {"port": ports["health"]}
    (service,) = _resource("Service")["spec"]["ports"]
    assert service["targetPort"] == "grpc" and service["port"] == ports["grpc"]
    (ingress,) = _resource("NetworkPolicy")["spec"]["ingress"]
    assert [entry["port"] for entry in ingress["ports"]] == [ports["grpc"]]
    probed = re.findall(r'HEALTHCHECK.*"127\.0\.0\.1:(\d+)"', CONTAINERFILE)
    assert probed == [str(_parsed(_container_command())["health_port"])]


def test_selectors_select_what_is_deployed() -> None:
    labels = _resource("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert _resource("Deployment")["spec"]["selector"]["matchLabels"] == _resource("Service")["spec"]["selector"] == labels
    assert _resource("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert _resource("NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    assert POD["serviceAccountName"] == _resource("ServiceAccount")["metadata"]["name"]


def test_every_path_is_mounted_or_made(tmp_path: Path) -> None:
    """Kubernetes: each file from a read-only volume that exists, usage in a writable one. The limits that are mounted can be read."""
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in CONTAINER["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    options = _parsed(CONTAINER["args"])
    for name in ("tls_certificate", "tls_key", "keys", "limits"):
        assert mounts[str(Path(options[name]).parent)]["readOnly"] is True
    writable = {path for path, mount in mounts.items() if not mount.get("readOnly")}
    assert writable == {"/data", "/tmp"} and str(Path(options["usage"]).parent) in writable
    config = _resource("ConfigMap")
    assert config["metadata"]["name"] == volumes["limits"]["configMap"]["name"]
    (tmp_path / "limits.toml").write_text(config["data"][Path(options["limits"]).name])
    assert read_limits(tmp_path / "limits.toml").default.concurrent_calls
    unit, systemd = _unit(), _parsed(SYSTEMD)
    assert Path(systemd["usage"]).parent == Path("/var/lib") / unit["StateDirectory"][0]
    for place in dict(entry.split("=") for entry in unit["Environment"][0].split() if "=/" in entry).values():
        assert Path(place).is_relative_to(Path("/var/cache") / unit["CacheDirectory"][0])


def test_whoever_stops_the_server_waits_for_its_drain() -> None:
    assert POD["terminationGracePeriodSeconds"] > _parsed(CONTAINER["args"])["drain_seconds"]
    assert float(_unit()["TimeoutStopSec"][0]) > _parsed(SYSTEMD)["drain_seconds"]
    assert _unit()["Restart"] == ["on-failure"], "a stuck engine ends the process with a failure"


def test_the_probe_says_by_its_exit_code_whether_a_server_serves(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        for address, code in ((server.address, 0), (f"127.0.0.1:{nobody.getsockname()[1]}", 1)):
            monkeypatch.setattr(sys, "argv", ["probe", address])
            assert probe.main() == code
    assert "SERVING" in capsys.readouterr().out


WATCHED = """
import os, sys
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        print(os.path.abspath(os.fsdecode(arguments[0])), file=told, flush=True)
    if event in ("os.mkdir", "os.rename", "sqlite3.connect"):
        print(os.path.abspath(os.fsdecode(arguments[0])), file=told, flush=True)
told = open(sys.argv.pop(1), "w")
sys.addaudithook(watch)
from lopa.cli import main
main(sys.argv[1:])
"""


def _with_files(options: Sequence[str], places: Mapping[str, Path]) -> list[str]:
    """The same options with the deployment's folders elsewhere, and free ports on this machine."""
    here, moved = {"--port": "0", "--health-port": "0", "--host": "127.0.0.1"}, []
    for option in options:
        name, _, value = option.partition("=")
        value = next((str(place) + value.removeprefix(path) for path, place in places.items() if value.startswith(path)), value)
        moved.append(f"{name}={here.get(name, value)}")
    return moved


@pytest.mark.slow
def test_the_pods_command_serves_and_writes_to_its_writable_volumes_only(tiny_fm: Path, tmp_path: Path) -> None:
    mounts = [mount["mountPath"] for mount in CONTAINER["volumeMounts"]]
    places = {path: tmp_path / path.strip("/").replace("/", "-") for path in sorted(mounts, reverse=True)}
    for place in places.values():
        place.mkdir()
    certificate, key = Authority().leaf("server").write(tmp_path)
    certificate.rename(places["/etc/lopa/tls"] / "tls.crt")
    key.rename(places["/etc/lopa/tls"] / "tls.key")
    KeyFile(places["/etc/lopa/keys"] / "keys.json").create("acme", DEVICE_SCOPES, None)
    (places["/etc/lopa/limits"] / "limits.toml").write_text(_resource("ConfigMap")["data"]["limits.toml"])
    image = dict(re.findall(r"(\w+)=(/data\S*)", CONTAINERFILE))
    own = {name: value.replace("/data", str(places["/data"])) for name, value in image.items()}
    environment = {
        "PATH": os.environ["PATH"],
        **own,
        "TMPDIR": str(places["/tmp"]),
        "HOME": "/proc/nowhere",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    written = tmp_path / "written"
    options = [*_with_files(CONTAINER["args"], places), "--fm", str(tiny_fm), "--threads", "1", "--log-level", "warning"]
    command = [sys.executable, "-c", WATCHED, str(written), "serve", *options, "--ready-file", str(places["/tmp"] / "ready")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=places["/data"])
    try:
        line = process.stdout.readline()
        assert line.startswith("Serving"), line + process.stderr.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.communicate()
    allowed = (places["/data"], places["/tmp"], Path("/dev"), Path("/proc"))
    found = {Path(path) for path in written.read_text().splitlines()}
    assert {path for path in found if not any(path.is_relative_to(place) for place in allowed)} == set()
    assert places["/data"] / "usage.sqlite" in found
