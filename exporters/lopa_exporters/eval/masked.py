"""A masked language model that answers cloze questions, behind soft prompts or without.

Legend: b examples, m soft-prompt rows, d hidden size, t tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lopa_exporters.backbone import positions_of
from lopa_exporters.eval.glue import MASK
from lopa_exporters.frozen import head_at


@dataclass(frozen=True)
class TokenCloze:
    """ids with special tokens; mask: the place of the mask in them."""

    ids: Sequence[int]
    mask: int


@dataclass(frozen=True)
class MaskedModel:
    """Any Hugging Face masked language model."""

    model: Any
    tokenizer: Any
    device: torch.device
    bf16: bool
    """Autocast to bfloat16: faster, not exact."""

    @classmethod
    def load(cls, folder: Path | str, *, bf16: bool = False, device: str | None = None) -> MaskedModel:
        """Float32 weights without gradients.

        Raises:
            OSError, ValueError: not a masked language model that transformers can load, or its tokenizer has no mask.
        """
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.mask_token is None:
            raise ValueError(f"{folder} has no mask token: it is not a masked language model")
        model, info = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"{folder} has no weights for {', '.join(sorted(info['missing_keys'])[:5])}: they would be random")
        return cls(model.to(place).eval().requires_grad_(False), tokenizer, place, bf16)

    @property
    def hidden(self) -> int:
        return int(self.model.get_input_embeddings().embedding_dim)

    @property
    def context(self) -> int:
        """Positions at most; without a stated bound, practically none."""
        return positions_of(self.model) or 1 << 30

    def vocabulary(self) -> Tensor:
        """(v, d) float32 input embeddings."""
        return self.model.get_input_embeddings().weight.detach().float().cpu()

    def word_ids(self, words: Sequence[str]) -> list[int]:
        """Ids of label words, each with a space before it.

        Raises:
            ValueError: a word that is not one token, or two that are the same.
        """
        found = [self.tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
        for word, ids in zip(words, found, strict=True):
            if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
                raise ValueError(f"the label word {word!r} is {len(ids)} tokens of this model; it must be one known token")
        flat = [ids[0] for ids in found]
        if len(set(flat)) < len(flat):
            raise ValueError(f"two of the label words {', '.join(words)} are the same token of this model")
        return flat

    def tokenize(self, texts: Sequence[str], max_tokens: int) -> list[TokenCloze]:
        """Texts with one MASK; longer ones are cut on the right. A mask that was cut off becomes the last token but one."""
        own = [text.replace(MASK, self.tokenizer.mask_token) for text in texts]
        clozes = []
        for ids in self.tokenizer(own, truncation=True, max_length=max_tokens).input_ids:
            whole = list(ids)
            if self.tokenizer.mask_token_id not in whole:
                whole[-2] = self.tokenizer.mask_token_id
            clozes.append(TokenCloze(whole, whole.index(self.tokenizer.mask_token_id)))
        return clozes

    def logits(self, soft: Tensor | None, clozes: Sequence[TokenCloze]) -> Tensor:
        """(b, v) float32 at the masks of [soft ; text]; soft (b, m, d). Padding stands at the end, masked."""
        ids = pad_sequence([torch.tensor(cloze.ids) for cloze in clozes], batch_first=True).to(self.device)
        lengths = torch.tensor([len(cloze.ids) for cloze in clozes], device=self.device)
        embeds = self.model.get_input_embeddings()(ids)
        rows = 0
        if soft is not None:
            rows = soft.shape[1]
            embeds = torch.cat((soft.to(embeds), embeds), dim=1)
        mask = (torch.arange(embeds.shape[1], device=self.device) < rows + lengths[:, None]).long()
        places = torch.tensor([rows + cloze.mask for cloze in clozes], device=self.device)
        examples = torch.arange(len(clozes), device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16), head_at(self.model, examples, places):
            return self.model(inputs_embeds=embeds, attention_mask=mask).logits[0].float()
