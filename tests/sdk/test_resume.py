"""Killed at any moment: the folder opens with the last completed step, and the run ends as if it had never stopped."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lopa
import pytest
from lopa.retry import RetryPolicy
from lopa.tensorfile import read_metadata

from tests.sdk.conftest import EXAMPLES, SETTINGS

DEVICE = """
import sys, lopa
from pathlib import Path
from tests.sdk.conftest import EXAMPLES, SETTINGS
address, folder, cache = sys.argv[1:]
with lopa.connect(address, config=lopa.ClientConfig(cache=Path(cache))) as client:
    def tell(now):
        print(now.step, flush=True)
        if now.step == SETTINGS["steps"] - 1:
            sys.stdin.read()  # however fast this is, it does not finish before it is killed
    client.personal(folder).tune(EXAMPLES, on_step=tell, **SETTINGS)
"""


@pytest.fixture(scope="module")
def unbroken(address: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, lopa.TuneReport]:
    """What the run gives when nothing happens: the factors file and the report."""
    with lopa.connect(address, config=lopa.ClientConfig(cache=cache)) as client:
        persona = client.personal(tmp_path_factory.mktemp("unbroken"))
        report = persona.tune(EXAMPLES, **SETTINGS)
        assert report.kept
        return persona.factors_path.read_bytes(), report


def stop(_: lopa.TuneProgress) -> None:
    raise KeyboardInterrupt


def same_run(report: lopa.TuneReport, other: lopa.TuneReport) -> bool:
    return (report.losses, report.validation, report.gradient_norms) == (other.losses, other.validation, other.gradient_norms)


def steps_on_disk(folder: Path) -> int:
    metadata = read_metadata((folder / "personas/default/tuning.safetensors").read_bytes())
    step = json.loads(metadata["progress"])["step"]
    assert isinstance(step, int)
    return step


@pytest.mark.parametrize("seed", range(3))
def test_device_killed_at_a_random_moment(
    client: lopa.Client, address: str, cache: Path, tmp_path: Path, unbroken: tuple[bytes, lopa.TuneReport], seed: int
) -> None:
    kill_after = random.Random(seed).randrange(1, SETTINGS["steps"] - 1)
    command = [sys.executable, "-c", DEVICE, address, str(tmp_path), str(cache)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as device:
        assert device.stdout is not None
        for line in device.stdout:
            if int(line) == kill_after:
                device.kill()
                break
    persona = client.personal(tmp_path)
    assert persona.version == 1 and persona.unfinished
    done = steps_on_disk(tmp_path)
    assert done >= kill_after
    report = persona.tune(EXAMPLES, **SETTINGS)
    assert report.resumed_from == done
    assert same_run(report, unbroken[1])
    assert persona.factors_path.read_bytes() == unbroken[0]


def test_stopped_by_the_user_at_every_step(client: lopa.Client, tmp_path: Path, unbroken: tuple[bytes, lopa.TuneReport]) -> None:
    persona = client.personal(tmp_path)

    for step in range(1, SETTINGS["steps"] + 1):
        with pytest.raises(KeyboardInterrupt):
            persona.tune(EXAMPLES, on_step=stop, **SETTINGS)
        assert steps_on_disk(tmp_path) == step and persona.version == 1
    report = persona.tune(EXAMPLES, **SETTINGS)
    assert same_run(report, unbroken[1]) and report.resumed_from == report.steps
    assert persona.factors_path.read_bytes() == unbroken[0]


def test_another_run_does_not_go_on_from_this_one(client: lopa.Client, tmp_path: Path) -> None:
    persona = client.personal(tmp_path)

    with pytest.raises(KeyboardInterrupt):
        persona.tune(EXAMPLES, on_step=stop, **SETTINGS)
    assert persona.tune(EXAMPLES[:-1], **SETTINGS).resumed_from == 0
    with pytest.raises(KeyboardInterrupt):
        persona.tune(EXAMPLES, on_step=stop, **SETTINGS)
    assert persona.tune(EXAMPLES, **{**SETTINGS, "learning_rate": 0.01}).resumed_from == 0


def test_a_damaged_state_is_said(client: lopa.Client, tmp_path: Path) -> None:
    persona = client.personal(tmp_path)
    path = tmp_path / "personas/default/tuning.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0not a header....")
    with pytest.raises(lopa.FolderError, match="remove it to tune from the start"):
        persona.tune(EXAMPLES, **SETTINGS)


def test_two_runs_at_once_are_refused(client: lopa.Client, tmp_path: Path) -> None:
    persona = client.personal(tmp_path)
    refused = []

    def second(now: lopa.TuneProgress) -> None:
        for change in (lambda: client.personal(tmp_path).tune(EXAMPLES, **SETTINGS), lambda: persona.rollback(1)):
            with pytest.raises(lopa.FolderError, match="being tuned or changed by another process"):
                change()
            refused.append(now.step)

    persona.tune(EXAMPLES, on_step=second, **{**SETTINGS, "steps": 1})
    assert refused == [1, 1]


@contextmanager
def serve(fm: Path, bundle: Path, folder: Path, port: str = "0") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`lopa serve` as a process of its own."""
    ready = folder / "ready"
    ready.unlink(missing_ok=True)
    arguments = ["serve", "--fm", str(fm), "--bundle", str(bundle), "--port", port, "--threads", "1", "--ready-file", str(ready)]
    with subprocess.Popen([sys.executable, "-m", "lopa.cli", *arguments], stderr=subprocess.DEVNULL, text=True) as process:
        try:
            while not ready.exists():
                with suppress(subprocess.TimeoutExpired):
                    raise RuntimeError(f"the server ended with {process.wait(0.05)}")
            yield process, ready.read_text()
        finally:
            process.kill()


@pytest.mark.slow
def test_server_killed_and_restarted_in_the_middle(
    fm_folder: Path, bundle_folder: Path, cache: Path, tmp_path: Path, unbroken: tuple[bytes, lopa.TuneReport]
) -> None:
    """The run waits for the server and goes on by itself; no step is lost."""
    config = lopa.ClientConfig(cache=cache, retry=RetryPolicy(attempts=2, initial=0.01))
    restarted = []
    with serve(fm_folder, bundle_folder, tmp_path) as (first, address), lopa.connect(address, config=config) as client:
        persona = client.personal(tmp_path / "me")
        second = serve(fm_folder, bundle_folder, tmp_path, address.rpartition(":")[2])

        def watch(now: lopa.TuneProgress) -> None:
            if now.waiting and not restarted:
                second.__enter__()
                restarted.append(now)
            elif now.step == 4 and not now.waiting:
                first.kill()
                first.wait()

        try:
            report = persona.tune(EXAMPLES, on_step=watch, **SETTINGS)
        finally:
            if restarted:
                second.__exit__(None, None, None)
    assert len(restarted) == 1 and restarted[0].waiting
    assert restarted[0].step in (4, 5)  # the fifth step's gradients may have come before the server went
    assert same_run(report, unbroken[1]) and report.resumed_from == 0
    assert persona.factors_path.read_bytes() == unbroken[0]


@pytest.mark.slow
def test_server_gone_for_good(
    client: lopa.Client, fm_folder: Path, bundle_folder: Path, cache: Path, tmp_path: Path, unbroken: tuple[bytes, lopa.TuneReport]
) -> None:
    """Patience ends with a typed error, the state stays, and another server of the same model finishes the run."""
    config = lopa.ClientConfig(cache=cache, retry=RetryPolicy(attempts=3, initial=0.01))
    with serve(fm_folder, bundle_folder, tmp_path) as (process, address), lopa.connect(address, config=config) as other:

        def watch(now: lopa.TuneProgress) -> None:
            if now.step == 3 and not now.waiting:
                process.kill()
                process.wait()

        with pytest.raises(lopa.Unavailable):
            other.personal(tmp_path / "me").tune(EXAMPLES, on_step=watch, **{**SETTINGS, "patience": 0.5})
    done = steps_on_disk(tmp_path / "me")
    assert done in (3, 4)  # the fourth step's gradients may have come before the server went
    persona = client.personal(tmp_path / "me")
    report = persona.tune(EXAMPLES, **SETTINGS)
    assert report.resumed_from == done and same_run(report, unbroken[1])
    assert persona.factors_path.read_bytes() == unbroken[0]
