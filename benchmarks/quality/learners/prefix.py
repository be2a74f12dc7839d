"""Prefix tuning (Li and Liang 2021) with PEFT's parameters: learnt keys and values in every layer.

They stand where the soft prompt of the other methods stands: at the front, or behind what is read, just before its last token, which must
see them to predict the answer.

Legend: b pairs, m learnt positions, f prefix positions, e head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from lopa_exporters.frozen import FrozenModel, PairLosses, Past, TokenPair
from peft import PrefixEncoder, PrefixTuningConfig, TaskType
from torch import Tensor
from transformers import DynamicCache

from benchmarks.quality.learners.learner import Footprint, TorchLearner, bytes_at_rest, count


@dataclass(frozen=True)
class PrefixModel(FrozenModel):
    """A frozen model that reads `virtual` (layers, 2, heads, m, e) behind every prefix."""

    virtual: Tensor | None = None

    def _past(self, rows: int, pairs: Sequence[TokenPair]) -> Past | None:
        if self.virtual is None:
            return super()._past(rows, pairs)
        before = self._read([pair.prefix for pair in pairs]) if pairs[0].prefix else None
        cache = DynamicCache()
        for layer, learnt in enumerate(self.virtual):
            keys, values = (tensor.expand(len(pairs), -1, -1, -1) for tensor in learnt)
            if before is not None:
                old = before.cache.layers[layer]
                keys, values = torch.cat((old.keys, keys.to(old.keys)), dim=2), torch.cat((old.values, values.to(old.values)), dim=2)
            cache.update(keys, values, layer)
        mask = torch.ones(len(pairs), self.virtual.shape[3], dtype=torch.int64, device=self.device)
        return Past(cache, mask if before is None else torch.cat((before.mask, mask), dim=1))


class PrefixLearner(TorchLearner):
    """PEFT's prefix encoder without projection; its start is N(0, 1), as `torch.nn.Embedding` has it."""

    def __init__(self, fm: FrozenModel, seed: int, rows: int) -> None:
        torch.manual_seed(seed)
        model = fm.model.config
        self.fm, self.rows = fm, rows
        config = PrefixTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=rows,
            token_dim=model.hidden_size,
            num_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            num_transformer_submodules=1,
        )
        self.encoder = PrefixEncoder(config)
        super().__init__(dict(self.encoder.named_parameters()))
        numbers = count(self.parameters)
        self.footprint = Footprint(numbers, device=bytes_at_rest(numbers), wire=numbers)

    def losses(self, rows: Sequence[int], pairs: Sequence[TokenPair]) -> PairLosses:
        del rows
        return self._model().losses(None, [_before_last(pair) for pair in pairs])

    def _model(self) -> PrefixModel:
        model = self.fm.model.config
        flat = self.encoder(torch.arange(self.rows)).view(self.rows, model.num_hidden_layers, 2, model.num_attention_heads, -1)
        fields = {name: getattr(self.fm, name) for name in ("model", "tokenizer", "device", "bf16", "max_rows", "prefixes")}
        return PrefixModel(**fields, virtual=flat.permute(1, 2, 3, 0, 4).to(self.fm.device))


def _before_last(pair: TokenPair) -> TokenPair:
    """A prefix's last token belongs behind the learnt positions."""
    return replace(pair, prefix=pair.prefix[:-1], prompt=[*pair.prefix[-1:], *pair.prompt])
