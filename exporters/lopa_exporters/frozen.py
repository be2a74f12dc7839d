"""The frozen foundation model as training sees it: likelihoods of targets behind soft prompts, differentiable in the soft prompts.

A soft prompt stands at the front, or behind a prefix. What stands before it depends on no soft prompt: it is read once, without gradients.

Legend: b pairs, m soft-prompt rows, d hidden size, f prefix positions, t positions behind the prefix, v vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class TokenPair:
    """[prefix ; soft prompt ; prompt], and the target whose likelihood is measured. Prefix or prompt may be empty."""

    prompt: Sequence[int]
    target: Sequence[int]
    prefix: Sequence[int] = ()

    def __len__(self) -> int:
        """Positions without soft rows."""
        return len(self.prefix) + len(self.prompt) + len(self.target)


class PrefixStore:
    """Keys and values of prefixes that were read before, so that a population's examples are read once and not once an epoch.

    Holds at most `limit` bytes; the prefixes that were not used for longest go first.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._rows: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def get(self, prefix: Sequence[int]) -> Tensor | None:
        """(layers, 2, heads, f, e), or None."""
        row = self._rows.get(tuple(prefix))
        if row is not None:
            self._rows.move_to_end(tuple(prefix))
        return row

    def put(self, prefix: Sequence[int], row: Tensor) -> None:
        self._rows[tuple(prefix)] = row
        self.nbytes += row.nbytes
        while self.nbytes > self.limit:
            self.nbytes -= self._rows.popitem(last=False)[1].nbytes


@dataclass(frozen=True)
class Past:
    """What was read before the soft prompts: transformers' cache, and (b, f) int64, 1 at real tokens."""

    cache: Any
    mask: Tensor


@dataclass(frozen=True)
class PairLosses:
    """What the model makes of each pair, in the order given.

    nll: (b,) sums over the target's tokens of -ln p, differentiable.
    tokens: (b,) the targets' lengths.
    exact: (b,) bool, whether greedy decoding would give exactly the target.
    """

    nll: Tensor
    tokens: Tensor
    exact: Tensor

    def mean(self) -> Tensor:
        """NLL per target token over all pairs together, differentiable: ()."""
        return self.nll.sum() / self.tokens.sum()


@dataclass(frozen=True)
class FrozenModel:
    """A causal language model without gradients of its own."""

    model: Any
    tokenizer: Any
    device: torch.device
    bf16: bool
    """Autocast to bfloat16: faster, not exact."""
    max_rows: int = 16
    """Pairs in one forward pass; more are split by length, so that little padding is computed."""
    prefixes: PrefixStore = dataclasses.field(default_factory=lambda: PrefixStore(0), compare=False)
    """What was read before; by default nothing is kept."""

    @classmethod
    def load(cls, folder: Path | str, *, bf16: bool = False, device: str | None = None, prefix_bytes: int = 0) -> FrozenModel:
        """Weights in float32 unless `bf16` on CUDA. prefix_bytes: memory for keys and values of prefixes, see `PrefixStore`.

        Raises:
            OSError, ValueError: not a causal language model that transformers can load.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.bfloat16 if bf16 and place.type == "cuda" else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model = model.to(place).eval().requires_grad_(False)
        return cls(model, AutoTokenizer.from_pretrained(folder), place, bf16, prefixes=PrefixStore(prefix_bytes))

    @property
    def hidden(self) -> int:
        return int(self.model.get_input_embeddings().embedding_dim)

    @property
    def context(self) -> int:
        """Positions at most; without a stated bound, practically none."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 30)

    def vocabulary(self) -> Tensor:
        """(v, d) float32 input embeddings of all tokens, as the model applies them (some architectures scale the table)."""
        embeddings = self.model.get_input_embeddings()
        with torch.no_grad():
            return embeddings(torch.arange(embeddings.num_embeddings, device=self.device)).float().cpu()

    def tokenize_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """As the server reads a text prompt: with the tokenizer's special tokens, if it adds any."""
        return list(self.tokenizer(list(texts)).input_ids)

    def tokenize_targets(self, texts: Sequence[str], append_end: Sequence[bool]) -> list[list[int]]:
        """As the server reads a text target: no special tokens, then the end token where asked for."""
        ids = self.tokenizer(list(texts), add_special_tokens=False).input_ids
        return [row + [self.tokenizer.eos_token_id] * end for row, end in zip(ids, append_end, strict=True)]

    def losses(self, soft: Tensor | None, pairs: Sequence[TokenPair]) -> PairLosses:
        """Likelihood of each target after [prefix ; soft ; prompt]; soft (b, m, d), or None for the plain model."""
        order = sorted(range(len(pairs)), key=lambda i: (bool(pairs[i].prefix), len(pairs[i])))
        parts = []
        for prefixed in (False, True):
            group = [i for i in order if bool(pairs[i].prefix) == prefixed]
            for start in range(0, len(group), self.max_rows):
                chunk = group[start : start + self.max_rows]
                parts.append(self._losses(None if soft is None else soft[chunk], [pairs[i] for i in chunk]))
        back = torch.tensor(order).argsort()
        nll, exact = (torch.cat([part[i] for part in parts])[back.to(self.device)] for i in range(2))
        return PairLosses(nll, torch.tensor([len(pair.target) for pair in pairs], device=self.device), exact)

    def _losses(self, soft: Tensor | None, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
        """nll and exact of pairs of about one length. Padding stands at the end, where causal attention never reads it."""
        m = 0 if soft is None else soft.shape[1]
        past = self._past(m, pairs)
        heads = [[*pair.prompt] if past else [*pair.prefix, *pair.prompt] for pair in pairs]
        # The last target token is only predicted, never read.
        rows = [torch.tensor([*head, *pair.target][:-1], dtype=torch.long) for head, pair in zip(heads, pairs, strict=True)]
        embeds = self.model.get_input_embeddings()(pad_sequence(rows, batch_first=True).to(self.device))
        if soft is not None:
            embeds = torch.cat((soft.to(embeds), embeds), dim=1)
        owners = torch.tensor([i for i, pair in enumerate(pairs) for _ in pair.target], device=self.device)
        places = torch.cat([m + len(head) - 1 + torch.arange(len(pair.target)) for head, pair in zip(heads, pairs, strict=True)])
        wanted = torch.tensor([token for pair in pairs for token in pair.target], device=self.device)
        logits = self._logits_at(embeds, owners, places.to(self.device), past)
        zeros = torch.zeros(len(pairs), device=self.device)
        nll = zeros.index_add(0, owners, functional.cross_entropy(logits, wanted, reduction="none"))
        return nll, zeros.index_add(0, owners, (logits.argmax(dim=-1) != wanted).float()) == 0

    def _past(self, rows: int, pairs: Sequence[TokenPair]) -> Past | None:
        """What is read apart and before the rest: the prefixes, if soft rows stand behind them. All pairs have one, or none has."""
        return self._read([pair.prefix for pair in pairs]) if rows and pairs[0].prefix else None

    def _read(self, prefixes: Sequence[Sequence[int]]) -> Past:
        """Keys and values of prefixes. Padded on the left, so that what follows has its true distance to every token."""
        from transformers import DynamicCache

        rows = [self.prefixes.get(prefix) for prefix in prefixes]
        missing = [i for i, row in enumerate(rows) if row is None]
        for i, row in zip(missing, self._compute([prefixes[i] for i in missing]) if missing else (), strict=True):
            rows[i] = row
            self.prefixes.put(prefixes[i], row)
        width = max(map(len, prefixes))
        padded = torch.stack([functional.pad(row, (0, 0, width - row.shape[3], 0)) for row in rows if row is not None], dim=2)
        cache: Any = DynamicCache()
        for layer, (keys, values) in enumerate(padded):
            cache.update(keys, values, layer)
        return Past(cache, _left_padded([[1] * len(prefix) for prefix in prefixes]).to(self.device))

    @torch.no_grad()
    def _compute(self, prefixes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Read prefixes: (layers, 2, heads, f, e) each."""
        from transformers import DynamicCache

        ids = _left_padded(prefixes).to(self.device)
        mask = _left_padded([[1] * len(prefix) for prefix in prefixes]).to(self.device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        cache: Any = DynamicCache()
        with self._autocast():
            self.model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        whole = torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers])
        return [whole[:, :, row, :, ids.shape[1] - len(prefix) :].clone() for row, prefix in enumerate(prefixes)]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _logits_at(self, embeds: Tensor, rows: Tensor, places: Tensor, past: Past | None) -> Tensor:
        """(n, v) float32 logits at n places of (b, t, d): the output head sees those places only."""

        positions = torch.arange(embeds.shape[1], device=self.device)[None]
        inputs: dict[str, Any] = {"position_ids": positions, "use_cache": False}
        if past is not None:
            mask = torch.cat((past.mask, past.mask.new_ones(embeds.shape[:2])), dim=1)
            inputs = {
                "position_ids": positions + past.mask.sum(1, keepdim=True),
                "attention_mask": mask,
                "past_key_values": past.cache,
                "use_cache": True,
            }
        with self._autocast(), head_at(self.model, rows, places):
            return self.model(inputs_embeds=embeds, **inputs).logits[0].float()


@contextlib.contextmanager
def head_at(model: Any, rows: Tensor, places: Tensor) -> Iterator[None]:
    """Within, the model's output head sees n places of (b, t, d) only, as (1, n, d): logits are large. rows, places: (n,) int64."""

    def cut(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][rows, places][None], *arguments[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()


def _left_padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """(b, longest) int64, zeros before shorter rows."""
    width = max(map(len, rows))
    return torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
