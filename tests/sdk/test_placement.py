"""The soft prompt behind a prefix: the same numbers as torch, and a persona that remembers where it was tuned."""

from __future__ import annotations

from pathlib import Path

import lopa
import numpy as np
import pytest
from lopa.encoded import encode_examples

from tests.sdk.conftest import EXAMPLES

BEHIND = [lopa.Example("", example.target, prefix=str(example.prompt)) for example in EXAMPLES]
"""The same examples with the soft prompt right before the target."""


def torch_nll(fm_folder: Path, before: str, soft: np.ndarray, target: str) -> float:
    """-ln p(target | [before][soft]) in ordinary transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(fm_folder), AutoTokenizer.from_pretrained(fm_folder)
    head, tail = (tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids for text in (before, target))
    embed = model.get_input_embeddings()
    with torch.no_grad():
        rows = torch.cat([embed(head), torch.from_numpy(soft)[None], embed(tail)], dim=1)
        logits = model(inputs_embeds=rows).logits[0, -tail.shape[1] - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits, tail[0], reduction="sum"))


def test_an_empty_prompt_behind_a_prefix_is_what_torch_says(client: lopa.Client, fm_folder: Path, tmp_path: Path) -> None:
    persona = client.personal(tmp_path)
    soft = persona.soft_prompts([str(BEHIND[0].prefix)])[0]
    score = persona.score(BEHIND[:1], dtype="F32", placement="after_prefix")[0]
    assert score.nll_sum == pytest.approx(torch_nll(fm_folder, str(BEHIND[0].prefix), soft, str(BEHIND[0].target)), rel=1e-4)
    assert score.nll_sum != pytest.approx(persona.score(BEHIND[:1])[0].nll_sum, rel=1e-3)
    reply = client.generate("", prefix="def f(", soft_prompt=soft, placement="after_prefix", max_tokens=2)
    assert reply.receipt is not None and reply.receipt.offset > 0
    with pytest.raises(lopa.InvalidRequest, match="no tokens"):
        client.generate("")


def test_a_persona_remembers_where_it_was_tuned(client: lopa.Client, tmp_path: Path) -> None:
    persona = client.personal(tmp_path)
    assert persona.placement == "front"
    report = persona.tune(BEHIND, placement="after_prefix", steps=12, batch_size=4, learning_rate=0.05, validation=BEHIND)
    assert report.kept and client.personal(tmp_path).placement == "after_prefix"
    scores = persona.score(BEHIND)
    assert sum(s.nll_sum for s in scores) / sum(s.target_tokens for s in scores) == pytest.approx(report.end_nll, rel=1e-5)
    reply = persona.generate("", prefix="def f(a, b):\n    return ", max_tokens=2)
    assert reply.receipt is not None and reply.receipt.offset > 0
    assert persona.generate("def", placement="front", prefix="# x\n", max_tokens=2).receipt.offset == 0  # type: ignore[union-attr]
    again = persona.tune(BEHIND, steps=2, batch_size=4, learning_rate=0.01, validation=BEHIND)
    assert again.start_nll == pytest.approx(report.end_nll, rel=1e-5)
    persona.rollback(1)
    assert persona.placement == "front"


def test_the_encoder_reads_prefix_and_prompt(client: lopa.Client, tmp_path: Path) -> None:
    persona = client.personal(tmp_path)
    encoder = client.encoder(client.bundle())
    one, split, given = (
        encode_examples(encoder, [example]).instance
        for example in (
            lopa.Example("import os\nx", "y"),
            lopa.Example("x", "y", prefix="import os\n"),
            lopa.Example("x", "y", prefix=[5], encoder_text="import os\nx"),
        )
    )
    assert all(np.array_equal(one[name], split[name]) and np.array_equal(one[name], given[name]) for name in one)
    with pytest.raises(lopa.InvalidRequest, match="encoder_text"):
        persona.score([lopa.Example("x", "y", prefix=[5])])
