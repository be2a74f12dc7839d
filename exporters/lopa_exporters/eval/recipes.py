"""The paper's hyper-parameters by task and method.

From the official repositories' code (github.com/jabhinav/Prompt-Tuning-Strikes-Back-with-LOPA: README.md, utils/config.py,
trainers/base.py, tune_fft_baseline.py; …-LOPA-NLU: utils/config.py, trainers/base.py, trainers/lora.py, plots/plot_data.py) and the
paper, "Prompt Tuning Strikes Back" (Jain, Chaudhuri, Reps, Jermaine, NeurIPS 2024, arXiv:2405.15282).

- m = 10; r = 1 on code, r = 4 on GLUE. The published counts of trained parameters (4.23 M on CruxEval at d = 2048; 0.80 M, 1.07 M
  and 1.60 M on GLUE at r = 1, 2, 4; IDPG's 16.34 M and 2.89 M) say how wide the heads' inner layer is: the encoder's width on code, 256
  on GLUE.
- Code: 10 epochs (4 for full fine-tuning on CruxEval) of batches of 2; constant rates of 1e-3 (prompt tuning, IDPG, LoPA) and 1e-4 (LoRA)
  with AdamW's own weight decay; full fine-tuning 1e-5, 500 steps of warm-up, then linearly to zero, decay 0.05, gradients
  clipped at 1 (transformers' Trainer).
- GLUE: 20 epochs of batches of 16, no weight decay, 6 % warm-up, then constant: 1e-5 (LoPA, full), 1e-4 (LoRA, prompt tuning, IDPG).
- LoRA: rank 16, alpha 32, dropout 0.1 on queries, keys and values.
- Encoders: CodeSage on code, RoBERTa-large on GLUE. CodeSage comes with Python code of its own, which is never run here; the
  default on code is the paper's other encoder, CodeBERT.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

METHODS = ("none", "prompt-tuning", "idpg", "lopa", "lora", "full")
WITH_ENCODER = ("idpg", "lopa")
SCHEDULES = ("constant", "linear")


@dataclass(frozen=True)
class Recipe:
    """How a method is trained on a task, and how a model answers it."""

    rows: int = 10
    """m, rows of the soft prompt."""
    rank: int = 1
    """r, LoPA's rank."""
    head_width: int = 0
    """w, inner width of LoPA's heads and of IDPG's; 0 is the encoder's."""
    encoder: str = "microsoft/codebert-base"
    """The text encoder of LoPA and IDPG: folder or id."""
    encoder_tokens: int = 512
    truncation_side: str = "left"
    """Which end of a longer input the encoder does not see."""
    train_encoder: bool = False
    """The official GLUE code trains the encoder along with the heads; the paper's counts leave it out."""
    dropout: float = 0.1
    """Before each head."""
    prompt_start: str = "vocabulary"
    """"vocabulary": rows of the embedding table; "random": N(0, 1), as the official code has it."""
    learning_rate: float = 1e-3
    epochs: int = 10
    batch: int = 2
    schedule: str = "constant"
    """After the warm-up: "constant", or "linear" to zero at the end."""
    warmup: float = 0.0
    """Steps; below 1, their share of all."""
    weight_decay: float = 0.01
    clip: float = 0.0
    """Largest norm of the gradient; 0 clips nothing."""
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    max_tokens: int = 512
    """Tokens of input and answer together, soft rows not counted."""
    max_prompt: int = 0
    """A longer prompt loses its beginning. 0: no bound of its own; then one that leaves no room for an answer has none."""
    max_new: int = 0
    """Tokens that are written at most; 0: what the prompt leaves of max_tokens."""
    temperature: float = 0.0
    """0 is greedy decoding. The official code samples at 0.6 (MBPP) and 0.2 (CruxEval), top_p 0.95."""
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if min(self.rows, self.rank, self.encoder_tokens, self.epochs, self.batch, self.lora_rank, self.max_tokens) < 1:
            raise ValueError("rows, rank, encoder_tokens, epochs, batch, lora_rank and max_tokens must be at least 1")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; known are {', '.join(SCHEDULES)}")
        if self.prompt_start not in ("vocabulary", "random"):
            raise ValueError(f"prompt_start is {self.prompt_start!r}; known are vocabulary and random")
        rest = ("learning_rate", "warmup", "weight_decay", "clip", "temperature", "head_width", "max_prompt", "max_new")
        if any(getattr(self, name) < 0 for name in rest):
            raise ValueError(f"{', '.join(rest)} must not be negative")


_CODE_RATES = {"lora": 1e-4, "full": 1e-5}
_GLUE_RATES = {"lora": 1e-4, "prompt-tuning": 1e-4, "idpg": 1e-4}


def paper_recipe(task: str, method: str) -> Recipe:
    """Raises ValueError for an unknown method; any task that is neither MBPP nor CruxEval is one of GLUE's."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; known are {', '.join(METHODS)}")
    if task.startswith("glue-"):
        return Recipe(
            rank=4,
            head_width=256,
            encoder="FacebookAI/roberta-large",
            encoder_tokens=256,
            truncation_side="right",
            learning_rate=_GLUE_RATES.get(method, 1e-5),
            epochs=20,
            batch=16,
            warmup=0.06,
            weight_decay=0.0,
            max_tokens=256,
        )
    recipe = Recipe(learning_rate=_CODE_RATES.get(method, 1e-3), max_tokens=512)
    if task == "mbpp":
        # 581 positions, 325 of them for the prompt, less m = 10 soft rows.
        recipe = replace(recipe, max_tokens=571, max_prompt=315, max_new=256)
    if method == "full":
        epochs = 10 if task == "mbpp" else 4
        return replace(recipe, epochs=epochs, schedule="linear", warmup=500.0, weight_decay=0.05, clip=1.0)
    return recipe
