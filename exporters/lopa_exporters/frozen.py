"""The frozen foundation model as training sees it: likelihoods of targets behind soft prompts, differentiable in the soft prompts.

Legend: b pairs, m soft-prompt rows, d hidden size, t positions, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

Ids = Sequence[Sequence[int]]


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

    @classmethod
    def load(cls, folder: Path | str, *, bf16: bool = False, device: str | None = None) -> FrozenModel:
        """Weights in float32 unless `bf16` on CUDA.

        Raises:
            OSError, ValueError: not a causal language model that transformers can load.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.bfloat16 if bf16 and place.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(place).eval().requires_grad_(False)
        return cls(model, AutoTokenizer.from_pretrained(folder), place, bf16)

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

    def losses(self, soft: Tensor | None, prompts: Ids, targets: Ids) -> PairLosses:
        """Likelihood of each target after [soft ; prompt]; soft (b, m, d), or None for the plain model."""
        rows = 0 if soft is None else soft.shape[1]
        sizes = [rows + len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)]
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        parts = []
        for start in range(0, len(order), self.max_rows):
            chunk = order[start : start + self.max_rows]
            part = None if soft is None else soft[chunk]
            parts.append(self._losses(part, [prompts[i] for i in chunk], [targets[i] for i in chunk]))
        back = torch.tensor(order).argsort()
        nll, exact = (torch.cat([part[i] for part in parts])[back.to(self.device)] for i in range(2))
        return PairLosses(nll, torch.tensor([len(target) for target in targets], device=self.device), exact)

    def _losses(self, soft: Tensor | None, prompts: Ids, targets: Ids) -> tuple[Tensor, Tensor]:
        """nll and exact of pairs of about one length. Padding stands at the end, where causal attention never reads it."""
        m = 0 if soft is None else soft.shape[1]
        # The last target token is only predicted, never read.
        ids = pad_sequence([torch.tensor([*p, *t][:-1], dtype=torch.long) for p, t in zip(prompts, targets, strict=True)], batch_first=True)
        embeds = self.model.get_input_embeddings()(ids.to(self.device))
        if soft is not None:
            embeds = torch.cat((soft.to(embeds), embeds), dim=1)
        counts = torch.tensor([len(target) for target in targets], device=self.device)
        pairs = torch.arange(len(targets), device=self.device).repeat_interleave(counts)
        places = torch.cat([torch.arange(m + len(p) - 1, m + len(p) + len(t) - 1) for p, t in zip(prompts, targets, strict=True)])
        wanted = torch.tensor([token for target in targets for token in target], device=self.device)
        logits = self._logits_at(embeds, pairs, places.to(self.device))
        zeros = torch.zeros(len(targets), device=self.device)
        nll = zeros.index_add(0, pairs, functional.cross_entropy(logits, wanted, reduction="none"))
        return nll, zeros.index_add(0, pairs, (logits.argmax(dim=-1) != wanted).float()) == 0

    def _logits_at(self, embeds: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """(n, v) float32 logits at n places of (b, t, d): the output head sees those places only."""

        def cut(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (arguments[0][rows, places][None], *arguments[1:])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(cut)
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                positions = torch.arange(embeds.shape[1], device=self.device)[None]
                return self.model(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits[0].float()
        finally:
            handle.remove()
