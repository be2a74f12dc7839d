"""DePT (Shi and Lipani 2024): a shorter soft prompt, and a change of low rank to the embeddings of what is read, position by position.

As in the paper the soft prompt stands at the front, also where the other methods' prompts stand behind what is read.

Legend: b pairs, m soft-prompt rows, d hidden size, s positions of the longest text read, r rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from lopa_exporters.frozen import FrozenModel, PairLosses, TokenPair
from torch import Tensor

from benchmarks.quality.learners.learner import Footprint, TorchLearner, bytes_at_rest, count
from benchmarks.quality.material import Material

RANK = 2
"""r: at lopa-nano's width and these lengths it leaves the soft prompt most of the numbers."""
SLOWER = 0.003
"""Learning rate of A and B over that of the soft prompt: the paper's two rates lie about so far apart."""


class DecomposedLearner(TorchLearner):
    """[P ; E + A B], E the embeddings of prefix and prompt: as many trainable numbers as a soft prompt of `rows` rows, or slightly fewer.

    A is (s, r) and starts at random, B is (r, d) and starts at zero (the paper's section 2.2).
    """

    def __init__(self, fm: FrozenModel, material: Material, seed: int, *, rows: int) -> None:
        pairs = material.of((*material.training, *material.validation, *material.test))
        longest = max(len(pair.prefix) + len(pair.prompt) for pair in pairs)
        short = rows - -(-RANK * (longest + fm.hidden) // fm.hidden)
        if short < 1:
            raise ValueError(f"texts of {longest} tokens leave none of {rows} rows to the soft prompt")
        generator = torch.Generator().manual_seed(seed)
        vocabulary = fm.vocabulary()
        picked = torch.randperm(len(vocabulary), generator=generator)[:short]
        parameters = {
            "prompt": vocabulary[picked],
            "A": torch.randn(longest, RANK, generator=generator) / SLOWER,
            "B": torch.zeros(RANK, fm.hidden),
        }
        super().__init__({name: tensor.requires_grad_() for name, tensor in parameters.items()})
        self.fm = fm
        numbers = count(self.parameters)
        self.footprint = Footprint(numbers, device=bytes_at_rest(numbers), wire=(short + longest) * fm.hidden)

    def losses(self, rows: Sequence[int], pairs: Sequence[TokenPair]) -> PairLosses:
        """One forward pass for each length of text: what is read goes in as soft rows, and those of one pass are equally many."""
        del rows
        groups = defaultdict(list)
        for place, pair in enumerate(pairs):
            groups[len(pair.prefix) + len(pair.prompt)].append(place)
        parts = [self._alike([pairs[place] for place in places]) for places in groups.values()]
        back = torch.tensor([place for places in groups.values() for place in places]).argsort()
        return PairLosses(*(torch.cat([getattr(part, name) for part in parts])[back] for name in ("nll", "tokens", "exact")))

    def _alike(self, pairs: Sequence[TokenPair]) -> PairLosses:
        return self.fm.losses(self._inputs(pairs), [TokenPair([], pair.target) for pair in pairs])

    def _inputs(self, pairs: Sequence[TokenPair]) -> Tensor:
        """(b, m + t, d) of texts of t tokens."""
        read = torch.tensor([[*pair.prefix, *pair.prompt] for pair in pairs], device=self.fm.device)
        change = SLOWER * self.parameters["A"][: read.shape[1]] @ (SLOWER * self.parameters["B"])
        embeddings = self.fm.model.get_input_embeddings()(read).float() + change.to(self.fm.device)
        return torch.cat((self.parameters["prompt"].to(self.fm.device).expand(len(pairs), -1, -1), embeddings), dim=1)
