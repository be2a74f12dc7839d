"""Training windows for lopa-nano: what the foundation model sees, and how it learns to be steered.

Two kinds of window, mixed at random:

- **code**: `<|repo|>R<|file|>F<|code|>` and then the file's tokens. Repository and file are each dropped at random
  (StarCoder, Li et al. 2023, section 5.1), so the model has a place where "whose code is this" enters and does without.
- **shelf**: snippets of one repository, each followed by its file: `<|code|>snippet<|file|>F<|end|>`, repeated. The
  header sometimes lists the files (`<|files|>F1 F2 ...`), and sometimes all files bear names borrowed from elsewhere, so that
  the answer has to come from what stands in front and not from the snippet alone.

Windows are a pure function of (corpus, seed, step): a resumed run sees what an unbroken one would have seen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END, REPO, FILE, FILES, CODE = "<|end|>", "<|repo|>", "<|file|>", "<|files|>", "<|code|>"
SPECIAL_TOKENS = [END, REPO, FILE, FILES, CODE]
SPLIT = r"\n+ *|[^\S\n]+(?=[^\S\n])|[^\S\n]?[A-Z]?[a-z]+|[^\S\n]?[A-Z]+(?![a-z])|[^\S\n]?\d|[^\S\n]?_+|[^\S\n]?[^\s\w]+|\s+|."
"""Words split at case and underscores, digits one by one, indentation kept with its newline."""
Ids = NDArray[np.uint16]


@dataclass(frozen=True)
class WindowMix:
    """How windows are drawn; probabilities are per window (or per file header)."""

    shelf: float = 0.35
    drop_repo: float = 0.3
    drop_file: float = 0.3
    list_files: float = 0.5
    rename_files: float = 0.3
    max_shelf_files: int = 12
    snippet_tokens: tuple[int, int] = (24, 64)


def module_name(repo: str, path: str) -> str:
    """`email/mime/text.py` of repo `email` is `mime/text`: the name that headers and filing answers use."""
    return path.removesuffix(".py").removeprefix(repo + "/")


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE without unknowns (Radford et al. 2019)."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Corpus:
    """A JSONL of source files as one array of token ids with an index of files and repositories."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        rows = [json.loads(line) for line in path.open()]
        encoded: list[Ids] = []
        for start in range(0, len(rows), 512):
            batch = tokenizer.encode_batch([row["text"] for row in rows[start : start + 512]])
            encoded += [np.array(item.ids, dtype=np.uint16) for item in batch]
        self.tokenizer = tokenizer
        self.files = encoded
        self.lengths = np.array([len(ids) for ids in encoded])
        self.modules = [self._ids(module_name(row["repo"], row["path"])) for row in rows]
        self.repos = [self._ids(row["repo"]) for row in rows]
        self.by_repo: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            if "__init__" not in row["path"] and len(encoded[index]) >= 256:
                self.by_repo.setdefault(row["repo"], []).append(index)
        self.shelves = [indices for indices in self.by_repo.values() if len(indices) >= 3]
        vocabulary = [tokenizer.decode([i], skip_special_tokens=False) for i in range(tokenizer.get_vocab_size())]
        self.breaks_line = np.array(["\n" in token for token in vocabulary])
        self.special = {name: tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def snippet(self, index: int, length: int, rng: np.random.Generator) -> list[int]:
        """`length` tokens of a file from a random place, starting after a line break where there is one near."""
        ids = self.files[index]
        start = int(rng.integers(0, max(1, len(ids) - length)))
        breaks = np.flatnonzero(self.breaks_line[ids[start : start + 40]])
        start += int(breaks[0]) + 1 if len(breaks) else 0
        return [int(token) for token in ids[start : start + length]]

    def code_window(self, length: int, mix: WindowMix, rng: np.random.Generator) -> list[int]:
        window: list[int] = []
        while len(window) < length:
            index = int(rng.choice(len(self.files), p=self.lengths / self.lengths.sum()))
            if rng.random() >= mix.drop_repo:
                window += [self.special[REPO], *self.repos[index]]
            if rng.random() >= mix.drop_file:
                window += [self.special[FILE], *self.modules[index]]
            ids = self.files[index]
            room = length - len(window)
            start = int(rng.integers(0, max(1, len(ids) - room // 2)))
            window += [self.special[CODE], *map(int, ids[start : start + room])]
            if start + room >= len(ids):
                window.append(self.special[END])
        return window[:length]

    def shelf_window(self, length: int, mix: WindowMix, rng: np.random.Generator) -> list[int]:
        indices = self.shelves[int(rng.integers(len(self.shelves)))]
        count = int(rng.integers(2, mix.max_shelf_files + 1))
        chosen = [int(i) for i in rng.permutation(indices)[:count]]
        names = [self.modules[i] for i in chosen]
        if rng.random() < mix.rename_files:
            names = [self.modules[int(i)] for i in rng.integers(0, len(self.modules), len(chosen))]
        window: list[int] = []
        if rng.random() >= mix.drop_repo:
            window += [self.special[REPO], *self.repos[chosen[0]]]
        if rng.random() < mix.list_files:
            window.append(self.special[FILES])
            for name in names:
                window += [*name, self.special[FILE]]
        low, high = mix.snippet_tokens
        while len(window) < length:
            slot = int(rng.integers(len(chosen)))
            snippet = self.snippet(chosen[slot], int(rng.integers(low, high + 1)), rng)
            window += [self.special[CODE], *snippet, self.special[FILE], *names[slot], self.special[END]]
        return window[:length]

    def batch(self, step: int, rows: int, length: int, mix: WindowMix, seed: int) -> NDArray[np.int64]:
        """The windows of one step: (rows, length) int64 token ids."""
        rng = np.random.default_rng((seed, step))
        kinds = [self.shelf_window if rng.random() < mix.shelf else self.code_window for _ in range(rows)]
        return np.array([draw(length, mix, rng) for draw in kinds], dtype=np.int64)
