"""Users without a download: each held-out package on this machine is somebody with code of their own.

No file of these packages reached lopa-nano, its encoder or its shared heads (training/split.json). Two personal tasks:

- **completion**: the next lines of the user's code. Tuning and test items come from different files.
- **filing**: which of the user's own modules is a snippet from? The answer is the module's name. Tuning items come from
  the first part of every module, test items from the last, with a gap between them. The soft prompt stands between the
  snippet and the answer: what it has to steer is the answer alone, and the snippet's keys and values serve every step.
"""

from __future__ import annotations

import importlib.util
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STDLIB_USERS = ("asyncio", "distutils", "email", "idlelib", "importlib", "lib2to3", "multiprocessing", "tkinter", "unittest", "xml")
INSTALLED_USERS = ("grpc", "jinja2", "networkx", "rich")
HELD_OUT = STDLIB_USERS + INSTALLED_USERS
TASKS = ("completion", "filing")
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "_vendor", "__pycache__"})


@dataclass(frozen=True)
class Item:
    """One example. `append_end`: the target ends with the model's end token. The soft prompt stands behind `prefix`, if there is one."""

    prompt: str
    target: str
    append_end: bool = False
    prefix: str = ""

    @property
    def text(self) -> str:
        """What the model and the prompt encoder read before the target."""
        return self.prefix + self.prompt


@dataclass(frozen=True)
class TaskData:
    """One user's items for one task, test items from elsewhere than tuning items. What a package repeats of itself is left out of
    completion's test items (`mostly_seen`), not of filing's.
    """

    user: str
    task: str
    tuning: tuple[Item, ...]
    test: tuple[Item, ...]
    labels: tuple[str, ...] = ()
    """Filing: the user's modules, largest first. Chance is one in so many."""


@dataclass(frozen=True)
class TaskSizes:
    """How items are cut. Lengths are in characters; a token of lopa-nano is about 3.4 of them."""

    prompt_chars: int = 220
    target_chars: int = 220
    snippet_chars: int = 360
    max_tuning: int = 240
    max_filing: int = 480
    """Tuning items of filing: about forty for each module."""
    max_test: int = 48
    max_modules: int = 12
    tuning_part: float = 0.7
    """Filing: the part of every module that tuning may see, from its beginning."""
    test_files_part: float = 0.25
    """Completion: whole files are set aside for the test until they hold this part of the items."""
    gap_part: float = 0.02
    """Filing: the part between tuning and test that neither sees."""
    min_module_chars: int = 3000


class NoSuchUser(LookupError):
    """A held-out package that this Python does not have, or that has too little code for the tasks."""


def package_folder(user: str) -> Path:
    """Where a package's source lies: the standard library first, then what is installed.

    Raises:
        NoSuchUser: this Python doesn't have it as a folder of source files.
    """
    stdlib = Path(sysconfig.get_path("stdlib")) / user
    if stdlib.is_dir():
        return stdlib
    spec = importlib.util.find_spec(user)
    if spec is None or not spec.submodule_search_locations:
        raise NoSuchUser(f"this Python has no package {user!r}")
    return Path(next(iter(spec.submodule_search_locations)))


def read_modules(folder: Path) -> dict[str, str]:
    """Module name (`mime/text`) to source text, in name order; tests, generated and `__init__` files left out."""
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and not path.name.startswith("__") and not path.stem.endswith("_pb2"):
            modules[relative.with_suffix("").as_posix()] = path.read_text(encoding="utf-8", errors="replace").expandtabs(4)
    return modules


def load_task(user: str, task: str, sizes: TaskSizes | None = None, seed: int = 0) -> TaskData:
    """The items of one held-out user; the same on every machine with the same package version.

    Raises:
        NoSuchUser: the package is missing or too small.
    """
    return build_task(user, task, read_modules(package_folder(user)), sizes or TaskSizes(), seed)


def build_task(user: str, task: str, modules: dict[str, str], sizes: TaskSizes, seed: int) -> TaskData:
    """Cut a package's modules (name to source) into items."""
    rng = random.Random(f"{seed}/{user}/{task}")
    data = _completion(user, modules, sizes, rng) if task == "completion" else _filing(user, modules, sizes, rng)
    if len(data.tuning) < 16 or len(data.test) < 8:
        raise NoSuchUser(f"package {user!r} has too little code for {task}: {len(data.tuning)} tuning and {len(data.test)} test items")
    return data


def _completion(user: str, modules: dict[str, str], sizes: TaskSizes, rng: random.Random) -> TaskData:
    names = [name for name, text in modules.items() if len(text) >= sizes.min_module_chars]
    rng.shuffle(names)
    cut = {name: _cut_completions(modules[name], sizes) for name in names}
    wanted = sum(map(len, cut.values())) * sizes.test_files_part
    tuning: list[Item] = []
    test: list[Item] = []
    for name in names:
        (test if len(test) < wanted else tuning).extend(cut[name])
    seen = {line.strip() for item in tuning for line in (item.text + item.target).splitlines()}
    test = [item for item in test if not mostly_seen(item.target, seen)]
    return TaskData(user, "completion", _sample(tuning, sizes.max_tuning, rng), _sample(test, sizes.max_test, rng))


def mostly_seen(text: str, seen: set[str]) -> bool:
    """Whether most lines of a test target stand in the tuning items word for word (licence headers, copied blocks)."""
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 12]
    return bool(lines) and sum(line in seen for line in lines) > len(lines) / 2


def _cut_completions(text: str, sizes: TaskSizes) -> list[Item]:
    pieces = _cut_lines(text, sizes.prompt_chars + sizes.target_chars)
    items = []
    for piece in pieces:
        lines = piece.splitlines(keepends=True)
        size, at = 0, 0
        while at < len(lines) - 1 and size < sizes.prompt_chars:
            size += len(lines[at])
            at += 1
        prompt, target = "".join(lines[:at]), "".join(lines[at:])
        if prompt.strip() and target.strip():
            items.append(Item("<|code|>" + prompt, target[: 2 * sizes.target_chars]))
    return items


def _filing(user: str, modules: dict[str, str], sizes: TaskSizes, rng: random.Random) -> TaskData:
    large = sorted((name for name, text in modules.items() if len(text) >= sizes.min_module_chars), key=lambda n: (-len(modules[n]), n))
    labels = tuple(large[: sizes.max_modules])
    if len(labels) < 3:
        return TaskData(user, "filing", (), (), labels)
    tuning: list[Item] = []
    test: list[Item] = []
    for name in labels:
        text = modules[name]
        end, start = int(len(text) * sizes.tuning_part), int(len(text) * (sizes.tuning_part + sizes.gap_part))
        tuning += _sample(_cut_snippets(text[:end], name, sizes), sizes.max_filing // len(labels), rng)
        test += _sample(_cut_snippets(text[start:], name, sizes), sizes.max_test // len(labels), rng)
    return TaskData(user, "filing", _sample(tuning, len(tuning), rng), _sample(test, len(test), rng), labels)


def _cut_snippets(text: str, label: str, sizes: TaskSizes) -> list[Item]:
    return [Item("", label, append_end=True, prefix=f"<|code|>{piece.rstrip()}<|file|>") for piece in _cut_lines(text, sizes.snippet_chars)]


def _cut_lines(text: str, chars: int) -> list[str]:
    """Consecutive runs of whole lines of about `chars` characters; runs that are mostly blank are left out."""
    pieces, current, size = [], [], 0
    for line in text.splitlines(keepends=True):
        current.append(line)
        size += len(line)
        if size >= chars:
            piece = "".join(current)
            if len(piece.strip()) > chars // 2 and size < 3 * chars:
                pieces.append(piece)
            current, size = [], 0
    return pieces


def _sample(items: Sequence[Item], count: int, rng: random.Random) -> tuple[Item, ...]:
    return tuple(rng.sample(list(items), min(count, len(items))))
