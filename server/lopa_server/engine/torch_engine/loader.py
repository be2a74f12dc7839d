"""Loads a Hugging Face folder and gives its model the few operations that the engine needs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lopa.fingerprint import fingerprint_folder

from lopa_server.config import ConfigError
from lopa_server.engine.base import EngineSpec, UnsupportedModel
from lopa_server.engine.text import Decode
from lopa_server.engine.torch_engine import attention, packed
from lopa_server.engine.torch_engine.fused import Fusions
from lopa_server.engine.torch_engine.gpu import find_gpu_kernels
from lopa_server.engine.torch_engine.native.kernels import find_native_kernels
from lopa_server.engine.torch_engine.paging import Kernels
from lopa_server.hub import resolve_folder

FULL, SLIDING = "full_attention", "sliding_attention"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Change = Callable[[torch.Tensor], torch.Tensor]
_loading = threading.Lock()
"""transformers replaces functions of its classes while it loads; after two loads at once a replacement may stay, and leave every later
model of the process without its tied weights."""


@dataclass(frozen=True)
class FoundationModel:
    """A frozen causal language model in evaluation mode, ready on its device."""

    model: Any
    tokenizer: Any
    spec: EngineSpec
    device: torch.device
    dtype: torch.dtype
    windows: tuple[int, ...]
    """Sliding window of each layer; 0: full attention."""
    own_attention: str
    """The attention that transformers chose; ours has taken its place."""
    kernels: Kernels | None = None
    """Ours for this device; None: torch does everything."""
    fusions: Fusions | None = None
    """The modules that compute by them."""
    graphs: bool = False
    """Whether decode steps may be captured as CUDA graphs."""
    passes: list[Change] = field(default_factory=list)
    """What the passes under way hand to the output head: several while one pauses for another."""

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings of (…) token ids: (…, d) in the compute dtype, a fresh tensor."""
        return self.model.get_input_embeddings()(ids)

    def logits_at(self, places: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """One forward pass, with logits only where they are wanted: (n, v) float32.

        places: (n,) int64, counted through all rows of the batch.
        The output head is the last and often the largest product. Its input is cut to the wanted places just before it,
        which works for every architecture, whatever it does to logits afterwards.
        """
        return self._pass(lambda states: states.flatten(0, 1)[places][None], inputs)

    def states_at(self, places: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The same pass up to the output head: what this would read at the places, (n, d)."""
        kept: list[torch.Tensor] = []

        def keep(states: torch.Tensor) -> torch.Tensor:
            kept.append(states.flatten(0, 1)[places])
            return kept[0][:1][None]

        self._pass(keep, inputs)
        return kept[0]

    def logits_of(self, states: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """(n, v) float32 logits of (n, d) states. inputs: any pass, the smallest; what it makes is thrown away at the output head."""
        return self._pass(lambda _: states[None], inputs)

    def _pass(self, change: Change, inputs: Mapping[str, Any]) -> torch.Tensor:
        """change: from what the output head would read to what it reads."""

        def hand_on(_: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (change(arguments[0]), *arguments[1:]) if self.passes[-1] is change else arguments

        handle = self.model.get_output_embeddings().register_forward_pre_hook(hand_on)
        self.passes.append(change)
        try:
            return self.model(**inputs).logits[0].float()
        finally:
            self.passes.pop()
            handle.remove()

    @contextlib.contextmanager
    def as_transformers(self) -> Iterator[Any]:
        """The model as transformers computes it, with the attention that it chose, for comparison."""
        self.model.set_attn_implementation(self.own_attention)
        if self.fusions is not None:
            self.fusions.off()
        try:
            yield self.model
        finally:
            self.model.set_attn_implementation(attention.NAME)
            if self.fusions is not None:
                self.fusions.on()


def load_foundation_model(
    fm: str | Path, *, dtype: str | None = None, device: str | None = None, native: bool = True, graphs: bool = True
) -> FoundationModel:
    """Load weights and tokenizer. Defaults: CUDA where there is one; bfloat16 on CUDA, float32 on the CPU.

    native: use our own kernels if they can be had. graphs: and on CUDA capture decode steps.

    Raises:
        ConfigError: no such device here.
        FileNotFoundError: no such model.
        UnsupportedModel: its architecture doesn't fit this engine.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = _place(device)
    folder = resolve_folder(fm)
    name = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    if name not in DTYPES or place.type not in ("cpu", "cuda"):
        raise UnsupportedModel(f"{name} on {place} is not supported: dtypes are {', '.join(DTYPES)}, devices cpu and cuda")
    try:
        with _loading:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[name], local_files_only=True)
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(f"{folder} holds no causal language model that transformers can load: {error}") from error
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    shown = Path(fm).name if Path(fm).exists() else str(fm)
    return prepare_model(model.to(place), tokenizer, name=shown, fingerprint=fingerprint_folder(folder), native=native, graphs=graphs)


def prepare_model(model: Any, tokenizer: Any, *, name: str, fingerprint: str, native: bool = True, graphs: bool = True) -> FoundationModel:
    """Make a transformers model, already on its device and in its dtype, ready to be served: it is changed in place.

    Raises:
        UnsupportedModel: its architecture doesn't fit this engine.
    """
    model = model.eval().requires_grad_(False)
    place, dtype = model.device, model.dtype
    if model.get_output_embeddings() is None:
        raise UnsupportedModel(f"{model.config.model_type}: it has no output head of its own")
    if packed.can_pack(place, dtype):
        packed.pack_linears(model)
    elif place.type == "cuda":
        packed.join_linears(model)
    attention.register()
    own_attention = model.config._attn_implementation
    try:
        model.set_attn_implementation(attention.NAME)
    except ValueError as error:
        raise UnsupportedModel(f"{model.config.model_type}: its attention can't be replaced: {error}") from error
    spec = _spec(name, fingerprint, model, tokenizer)
    kernels = _find_kernels(place) if native else None
    fused = Fusions(model, None if kernels is None else kernels.elementwise, place)
    windows, captured = _windows(model.config), graphs and kernels is not None and place.type == "cuda"
    return FoundationModel(model, tokenizer, spec, place, dtype, windows, own_attention, kernels, fused, captured)


def text_decoder(tokenizer: Any) -> Decode:
    """Text of token ids, special tokens left out.

    For a token at a time transformers' own way in takes several times as long as the tokenizer itself.
    """
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, PreTrainedTokenizerFast) and type(tokenizer)._decode is PreTrainedTokenizerFast._decode:
        decode = tokenizer.backend_tokenizer.decode
        return lambda ids: decode(ids, skip_special_tokens=True)
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _place(device: str | None) -> torch.device:
    """The device to compute on. Raises ConfigError when this machine doesn't have it."""
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device is {device!r}; it must be cpu, cuda or cuda:<number>") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r}, but torch finds no CUDA on this machine: use cpu")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {device!r}, but this machine has {torch.cuda.device_count()} CUDA devices; the first is cuda:0")
    if place.type == "cuda":
        place = torch.device("cuda", place.index or 0)
        torch.cuda.set_device(place)
    return place


def _find_kernels(place: torch.device) -> Kernels | None:
    return find_gpu_kernels(place) if place.type == "cuda" else find_native_kernels()


def _spec(name: str, fingerprint: str, model: Any, tokenizer: Any) -> EngineSpec:
    embeddings = model.get_input_embeddings()
    return EngineSpec(
        name=name,
        fingerprint=fingerprint,
        hidden_size=embeddings.embedding_dim,
        context_length=_context_length(model.config),
        vocab_size=embeddings.num_embeddings,
        compute_dtype=next(name for name, dtype in DTYPES.items() if dtype == model.dtype),
        embedding_norm=_embedding_norm(embeddings),
        end_ids=_end_ids(model, tokenizer),
    )


def _context_length(config: Any) -> int:
    """Positions that the model was made for.

    Rotary positions of kind longrope change for everybody in a pass once one sequence grows beyond the original length; an
    answer would then depend on who else is in the batch. Such a model is served up to that length.
    """
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not length:
        raise UnsupportedModel(f"{config.model_type}: its configuration names no context length")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]
    originals = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return int(min([length, *originals]))


def _windows(config: Any) -> tuple[int, ...]:
    """Of each layer, 0 for full attention. Raises UnsupportedModel for a layer that is neither full nor sliding."""
    window: int = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or [SLIDING if window else FULL] * config.num_hidden_layers
    strange = sorted(set(kinds) - {FULL, SLIDING})
    if strange:
        raise UnsupportedModel(f"{config.model_type}: layers of kind {', '.join(strange)} are not supported by the torch engine")
    if SLIDING in kinds and not window:
        raise UnsupportedModel(f"{config.model_type}: sliding-window layers without a window")
    return tuple(window if kind == SLIDING else 0 for kind in kinds)


@torch.inference_mode()
def _embedding_norm(embeddings: Any) -> float:
    """The largest L2 norm over the table as the model applies it (some architectures scale it), in blocks of rows."""
    ids = torch.arange(embeddings.num_embeddings, device=embeddings.weight.device)
    return max(float(embeddings(block).float().norm(dim=1).max()) for block in ids.split(8192))


def _end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence ids, the tokenizer's own first."""
    configured = model.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    ids = [tokenizer.eos_token_id, *several]
    return tuple(dict.fromkeys(int(token) for token in ids if token is not None))
