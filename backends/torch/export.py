"""Torch functions for export: dequantised weights, and the exported files' log-probs by transformers and PEFT."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, LogitsProcessorList

from lite_dil.backends.torch import out_of_memory
from lite_dil.backends.torch.device import compute_dtype
from lite_dil.backends.torch.head import QuantizedHead
from lite_dil.backends.torch.load import auto_class, load_base
from lite_dil.backends.torch.peft_names import targets_of
from lite_dil.backends.types import DenseWeight, Sequences
from lite_dil.base.errors import UserError, first_line
from lite_dil.base.files import work_folder
from lite_dil.data.rendering import library_prompt
from lite_dil.models.find import load_tokenizer
from lite_dil.models.options import ModelOptions

_LOGITS = 2**28  # in a pass: a GiB in float32


def dense(backend: Any) -> dict[str, DenseWeight]:
    """Return the backend's quantised weights, dequantised as it computes with them, by layer name."""
    found: dict[str, DenseWeight] = {}
    for name, module in backend.base.named_modules():
        if isinstance(module, QuantizedHead):
            width = backend.base.get_input_embeddings().weight.shape[1]
            found[name] = DenseWeight((module.vocabulary, width), functools.partial(_head, module))
        elif type(module).__name__ == "Linear4bit":
            shape = (module.out_features, module.in_features)
            found[name.removesuffix(".base_layer")] = DenseWeight(shape, functools.partial(_linear, module))
    return found


def _linear(module: Any) -> np.ndarray:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return weight.reshape(module.out_features, module.in_features).float().cpu().numpy()


def _head(module: QuantizedHead) -> np.ndarray:
    return torch.cat([tile.float().cpu() for _, tile in module.tiles()]).numpy()


def peft_targets(model: str, layers: set[str]) -> dict[str, list[str]] | None:
    """Return PEFT's options that select exactly these layers, or None if the model's config is not here."""
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        with torch.device("meta"):
            return targets_of(auto_class(config).from_config(config, trust_remote_code=False), layers)
    except (OSError, ValueError, ImportError, RuntimeError):
        return None


def renamed(model: str, keys: Iterable[str]) -> dict[str, str]:
    """Return the names in transformers' model of those tensors of its files that have another name there."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # older versions rename nothing
        return {}
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    with torch.device("meta"):
        base = auto_class(config).from_config(config, trust_remote_code=False)
    steps = [step for step in get_model_conversion_mapping(base) if isinstance(step, WeightRenaming)]
    found = {}
    for key in keys:
        name = key
        for step in steps:
            name = step.rename_source_key(name)[0]
        if name != key:
            found[key] = name
    return found


class Exported:
    """A Hugging Face folder as transformers loads it; see `lite_dil.export.runtime.Runtime`."""

    name = "transformers"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def logps(self, sequences: Sequences) -> list[np.ndarray]:
        """Return each response's log-probs, by the model's own logits."""
        return own_logps(self.model, sequences)

    def prompt(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Return the tokens of a text or a conversation."""
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt).input_ids)
        return list(self.tokenizer(library_prompt(self.tokenizer, prompt), add_special_tokens=False).input_ids)

    def end_ids(self) -> set[int]:
        """Return the tokens that end a generation."""
        found = self.model.generation_config.eos_token_id
        return set() if found is None else {found} if isinstance(found, int) else set(found)

    def ends_after(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        """Return whether a generation in which `tokens` are forced ends with the last of them."""
        start = len(prompt)

        def force(ids: Tensor, scores: Tensor) -> Tensor:
            if (at := ids.shape[1] - start) < len(tokens):
                scores = torch.full_like(scores, -torch.inf)
                scores[:, tokens[at]] = 0
            return scores

        ids = torch.tensor([list(prompt)], device=_device(self.model))
        with torch.no_grad():
            found = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=len(tokens) + 2,
                logits_processor=LogitsProcessorList([force]),
            )
        return found[0, start:].tolist() == list(tokens)


@contextmanager
def exported(folder: Path, max_memory: dict[Any, Any] | None = None) -> Iterator[Exported]:
    """Load a Hugging Face folder, in its own type, while the block lasts.

    Weights that do not fit in memory stay in the folder's files and are read layer by layer.

    Args:
        max_memory: memory limits in accelerate's form; None uses what is free.
    """
    with work_folder(folder) as offload:
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = auto_class(config).from_pretrained(
                folder,
                dtype="auto",
                device_map="auto",
                max_memory=max_memory,
                offload_folder=offload,
                trust_remote_code=False,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"transformers cannot load what was exported ({first_line(error)})") from None
        yield Exported(model.eval(), load_tokenizer(str(folder)))


def adapter_logps(model: str, folder: Path, config: ModelOptions, sequences: Sequences) -> list[np.ndarray]:
    """Return each response's log-probs by the base model, quantised by `config`, with an adapter as PEFT loads it."""
    from peft import PeftModel

    device = config.backend if config.backend in ("cpu", "cuda") else "cuda" if torch.cuda.is_available() else "cpu"
    what = (model, compute_dtype(config.dtype, device), torch.device(device), config.load_in_4bit)
    make = functools.partial(load_base, *what, trust_remote_code=config.trust_remote_code)
    base = out_of_memory.loaded(model, torch.device(device), (), make)
    with warnings.catch_warnings():
        # PEFT 0.21 uses an attribute's old name in transformers 5.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # It warns of tensors that its model or the file lacks.
        warnings.filterwarnings("error", "Found missing adapter keys")
        return own_logps(PeftModel.from_pretrained(base, str(folder)), sequences)


def own_logps(model: Any, sequences: Sequences) -> list[np.ndarray]:
    """Compute log-probs from the model's own logits, independently of training's way, in passes of few logits."""
    model.eval()
    found: list[np.ndarray] = []
    for group in _groups(sequences, _LOGITS // model.config.get_text_config().vocab_size):
        longest = max(len(prompt) + len(response) for prompt, response in group)
        # Padded on the right, where no token looks. Zeros, since any token would do.
        rows = [[*prompt, *response] + [0] * (longest - len(prompt) - len(response)) for prompt, response in group]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(rows, device=_device(model)), use_cache=False).logits
        for row, (prompt, response) in zip(logits, group, strict=True):
            own = row[len(prompt) - 1 : len(prompt) + len(response) - 1].float().log_softmax(-1)
            ids = torch.tensor(response, device=own.device)
            found.append(own.gather(-1, ids[:, None])[:, 0].cpu().numpy())
    return found


def _groups(sequences: Sequences, limit: int) -> Iterator[Sequences]:
    """Yield the sequences in groups of at most `limit` tokens with their padding, or of one."""
    group: Sequences = []
    longest = 0
    for sequence in sequences:
        longest = max(longest, sum(map(len, sequence)))
        if group and longest * (len(group) + 1) > limit:
            yield group
            group, longest = [], sum(map(len, sequence))
        group.append(sequence)
    if group:
        yield group


def _device(model: Any) -> torch.device:
    """Return where a model takes its tokens."""
    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device
