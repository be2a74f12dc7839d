"""Programs that attack the sandbox: none passes, none outlives its check, none touches anything outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lopa_exporters.eval.jail import syscalls, values
from lopa_exporters.eval.sandbox import FOLDER, Check, CodeExecutionRefused, Limits, Sandbox, Verdict

LIMITS = Limits(cpu_seconds=1, wall_seconds=30, memory_bytes=256 << 20)
TEST = "def check(candidate):\n    assert candidate(2) == 3\n    assert candidate(40) == 41\n"
RIGHT = "def f(x):\n    return x + 1\n"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(LIMITS, allow_code_execution=True)


def run(sandbox: Sandbox, program: str, test: str = TEST) -> Verdict:
    return sandbox.check(Check(textwrap.dedent(program), test, "f"))


def test_code_is_executed_only_when_somebody_said_so() -> None:
    with pytest.raises(CodeExecutionRefused, match="--allow-code-execution"):
        Sandbox(allow_code_execution=False)


def test_right_passes_and_wrong_does_not(sandbox: Sandbox) -> None:
    assert run(sandbox, RIGHT) == Verdict(True, "passed")
    assert run(sandbox, "def f(x):\n    return 3\n") == Verdict(False, "a test failed")
    assert "ZeroDivisionError" in run(sandbox, "def f(x):\n    return x / 0\n").reason
    assert "SyntaxError" in run(sandbox, "def f(x) return").reason


FORGERIES = {
    "ends the process before the asserts": "import os\nos._exit(0)",
    "ends the process in the asserts": "import os\ndef f(x):\n    os._exit(0)",
    "leaves by SystemExit": "raise SystemExit(0)",
    "is equal to everything": "class Yes:\n    def __eq__(self, other): return True\ndef f(x): return Yes()",
    "is a number equal to everything": "class Yes(int):\n    def __eq__(self, other): return True\ndef f(x): return Yes(0)",
    "replaces what asserts use": """
        import builtins
        builtins.AssertionError = KeyError
        def check(candidate): pass
        builtins.exec = builtins.compile = lambda *a, **k: None
        def f(x): return None""",
    "replaces the function that checks, in every frame": """
        import sys
        def f(x):
            frame = sys._getframe()
            while frame:
                frame.f_globals['check'] = frame.f_globals['candidate'] = lambda *a: None
                frame = frame.f_back""",
    "writes a verdict of its own to every pipe": """
        import os, json
        body = json.dumps({"passed": True, "reason": "passed"}).encode()
        for pipe in range(64):
            try: os.write(pipe, len(body).to_bytes(4, "big") + body)
            except OSError: pass
        os._exit(0)""",
    "looks for the expected value in memory": """
        import gc
        def f(x):
            for thing in gc.get_objects():
                if isinstance(thing, dict) and 'test' in thing: return x + 1
            return 0""",
    "reads the judge's memory": """
        import os
        def f(x):
            for name in os.listdir('/proc'):
                if name.isdecimal() and int(name) != os.getpid():
                    try: open(f'/proc/{name}/mem', 'rb').read(1)
                    except OSError: continue
                    return x + 1
            return 0""",
    "returns a huge value": "def f(x):\n    return 'x' * (100 << 20)",
    "returns a value that holds itself": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "returns without an end": "def f(x):\n    return iter(int, 1)",
    "takes all memory": "def f(x):\n    held = []\n    while True: held.append(bytearray(8 << 20))",
    "never ends": "def f(x):\n    while True: pass",
    "never begins": "while True: pass",
    "prints without end": "while True: print('x' * 100000)",
    "ignores the signal of too much time": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
}


@pytest.mark.parametrize("attack", FORGERIES)
def test_nothing_but_the_right_values_passes(sandbox: Sandbox, attack: str) -> None:
    began = time.monotonic()
    assert not run(sandbox, FORGERIES[attack]).passed
    assert time.monotonic() - began < LIMITS.wall_seconds + 5


def test_sleeping_ends_at_the_deadline() -> None:
    quick = Sandbox(Limits(cpu_seconds=1, wall_seconds=1.0), allow_code_execution=True)
    assert run(quick, "import threading\nthreading.Event().wait()") == Verdict(False, "not finished after 1 s")


REFUSED = {
    "starts processes without end": "import os\nwhile True: os.fork()",
    "starts a program": "import os\nos.execv('/bin/sh', ['sh', '-c', 'true'])",
    "starts a thread": "import threading\nthreading.Thread(target=print).start()",
    "connects to a network": "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=2)",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "kills everything": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "reads a stranger's file": "open('/etc/passwd').read()",
    "reads the tests": f"open({str(Path(__file__))!r}).read()",
    "reads another process's environment": "import os\nopen(f'/proc/{os.getppid()}/environ').read()",
    "writes beside itself": "open('x', 'w').write('x')",
    "changes its parent's limits": "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)",
    "slows its parent down": "import os\np = os.PRIO_PROCESS, os.getppid()\nos.setpriority(*p, os.getpriority(*p))",
    "moves its parent": "import os\nos.sched_setaffinity(os.getppid(), os.sched_getaffinity(os.getppid()))",
    "has a pipe signal its parent": "import fcntl, os\nfcntl.fcntl(os.pipe()[0], 8, os.getppid())",
    "has a pipe signal by another signal": "import fcntl, os\nfcntl.fcntl(os.pipe()[0], 10, 9)",
    "sees memory of others": "import ctypes\nimport os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0, 'refused'",
}


@pytest.mark.skipif(sys.platform != "linux", reason="what is prevented here is told by measure()")
@pytest.mark.parametrize("attack", REFUSED)
def test_what_computing_does_not_need_is_refused(sandbox: Sandbox, attack: str) -> None:
    """The program is told so by an exception, at once: it does not run into a limit of time."""
    verdict = run(sandbox, REFUSED[attack] + "\n" + RIGHT)
    assert not verdict.passed
    assert any(word in verdict.reason for word in ("Error", "refused")), verdict
    assert "ended" not in verdict.reason


def test_a_process_may_see_to_itself(sandbox: Sandbox) -> None:
    """Calls that are refused with some arguments only."""
    program = (
        "import fcntl, resource\ndef f(x):\n    return resource.getrlimit(resource.RLIMIT_CPU)[0] + fcntl.fcntl(0, fcntl.F_GETFD) + x\n"
    )
    assert run(sandbox, program).passed


@pytest.mark.skipif(sys.platform != "linux", reason="what is prevented here is told by measure()")
def test_files_outside_stay_as_they_are(sandbox: Sandbox, tmp_path: Path) -> None:
    """Even where anybody may write: each way of changing a file is refused by itself."""
    tmp_path.chmod(0o777)
    victim = tmp_path / "victim"
    victim.write_text("kept")
    victim.chmod(0o666)
    ways = ["open(p, 'w')", "open(p, 'a').write('x')", "open(p + '2', 'x')", "os.unlink(p)", "os.rename(p, p + '2')", "os.mkdir(p + '3')"]
    ways += ["os.truncate(p, 0)", "os.chmod(p, 0)", "os.symlink(p, p + '4')", "os.link(p, p + '5')", "os.utime(p)", "os.mkfifo(p + '6')"]
    ways += ["os.setxattr(p, 'user.x', b'x')", "change_mode()"]
    program = f"import ctypes, os\np = {str(victim)!r}\ndone = []\n"
    # fchmodat2, which Landlock does not know and Python does not use.
    program += "def change_mode():\n    if ctypes.CDLL(None).syscall(452, -100, p.encode(), 0o600, 0): raise OSError\n"
    for way in ways:
        program += f"try:\n    {way}\n    done.append({way!r})\nexcept OSError:\n    pass\n"
    program += "def f(x):\n    return done\n"
    assert run(sandbox, program, "def check(candidate):\n    assert candidate(0) == [], candidate(0)\n").passed
    assert victim.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


def test_the_environment_is_empty_and_input_has_ended(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    program = "import os, sys\ndef f(x):\n    return [v for v in os.environ.values() if 'hunter' in v], sys.stdin.read(), len(sys.path)\n"
    assert run(sandbox, program, "def check(candidate):\n    found = candidate(0)\n    assert found[:2] == ([], '')\n").passed
    assert not run(sandbox, "import torch\n" + RIGHT).passed


def test_nothing_is_left_behind(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither processes nor folders nor pipes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def mine() -> tuple[set[str], int, set[str]]:
        listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True)
        children = {line for line in listed.stdout.splitlines() if "jail" in line}
        return children, len(list(Path("/proc/self/fd").iterdir())), {path.name for path in tmp_path.iterdir()}

    run(sandbox, RIGHT)
    before = mine()
    for program in (RIGHT, "while True: pass", "import os\nos._exit(0)"):
        run(sandbox, program)
    assert not before[0]
    assert not before[2]
    assert mine() == before


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's own measures")
@pytest.mark.parametrize("layer", ["seccomp", "landlock"])
def test_each_layer_holds_alone(layer: str, tmp_path: Path) -> None:
    """The system-call filter and the file rules, each in a process without any other measure."""
    code = f"""
        import ctypes, os, sys
        sys.path.insert(0, {str(FOLDER)!r})
        from jail import landlock, seccomp, confine
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        took = seccomp.apply(libc) if {layer!r} == "seccomp" else landlock.apply(libc, confine.needed())
        print(bool(took), confine.attempts())
    """
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    if done.stdout.startswith("False"):
        pytest.skip(f"no {layer} here")
    prevented = ("processes", "network", "writing") if layer == "seccomp" else ("network", "writing", "reading")
    assert all(f"'{name}': False" in done.stdout for name in prevented), done.stdout


@pytest.mark.parametrize(
    ("column", "header"), [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")]
)
def test_numbers_of_system_calls_are_the_kernels(column: int, header: str) -> None:
    """Against the headers of this machine's kernel; calls that are newer than these are not in them."""
    if not Path(header).is_file():
        pytest.skip(f"no {header} here")
    lines = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\s", Path(header).read_text())
    theirs = {name: int(number) for name, number in lines}
    ours = {name: numbers[column] for name, numbers in {**syscalls.denied(), **syscalls.CHECKED}.items()}
    newest = max(theirs.values())
    assert {name: number for name, number in ours.items() if number is not None and number <= newest and theirs.get(name) != number} == {}
    assert {name for name, number in ours.items() if number is None} & theirs.keys() == set()


def test_what_holds_here_is_measured(sandbox: Sandbox) -> None:
    found = sandbox.measure()
    assert set(found["possible"]) == {"processes", "network", "writing", "reading"}
    assert {"rlimit_cpu", "rlimit_fsize"} <= set(found["measures"])
    if "seccomp" in found["measures"]:
        assert not any(found["possible"][name] for name in ("processes", "network", "writing"))


def test_names_of_the_solution_can_be_arguments(sandbox: Sandbox) -> None:
    program = "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\nroot = Pair(1, 2)\ndef f(p): return p[0].a + p[1].b\n"
    assert run(sandbox, program, "def check(candidate):\n    assert candidate([Pair(5, 6), root]) == 7\n").passed
    assert run(sandbox, "def f(kind): return kind('3')\n", "def check(candidate):\n    assert candidate(int) == 3\n").passed


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(PLAIN)
def test_values_arrive_as_they_are(value: object) -> None:
    assert values.decode(values.encode(value)) == value
    assert type(values.decode(values.encode(value))) is type(value)
