"""Torch functions for export: dequantised weights, and the exported files' log-probs by transformers and PEFT."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lite_dil.backends.torch import out_of_memory
from lite_dil.backends.torch.device import compute_dtype
from lite_dil.backends.torch.head import QuantizedHead
from lite_dil.backends.torch.load import load_base, target_names
from lite_dil.backends.types import DenseWeight, Sequences
from lite_dil.base.errors import UserError, first_line
from lite_dil.base.files import work_folder
from lite_dil.models.options import ModelOptions


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


def peft_targets(model: str, layers: set[str]) -> list[str] | None:
    """Return the shortest names by which PEFT finds exactly these layers, or None if the model's config is not here."""
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        with torch.device("meta"):
            return target_names(AutoModelForCausalLM.from_config(config, trust_remote_code=False), layers)
    except (OSError, ValueError, ImportError, RuntimeError):
        return None


def model_logps(folder: Path, sequences: Sequences, max_memory: dict[Any, Any] | None = None) -> list[np.ndarray]:
    """Return each response's log-probs by a Hugging Face folder as transformers loads it, in its own type.

    Weights that do not fit in memory stay in the folder's files and are read layer by layer.

    Args:
        max_memory: memory limits in accelerate's form; None uses what is free.
    """
    with work_folder(folder) as offload:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto",
                device_map="auto",
                max_memory=max_memory,
                offload_folder=offload,
                trust_remote_code=False,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"transformers cannot load what was exported ({first_line(error)})") from None
        return _logps(model, sequences)


def adapter_logps(model: str, folder: Path, config: ModelOptions, sequences: Sequences) -> list[np.ndarray]:
    """Return each response's log-probs by the base model, quantised by `config`, with an adapter as PEFT loads it."""
    from peft import PeftModel

    device = config.backend if config.backend in ("cpu", "cuda") else "cuda" if torch.cuda.is_available() else "cpu"
    make = functools.partial(load_base, model, compute_dtype(config.dtype, device), torch.device(device), config.load_in_4bit)
    base = out_of_memory.loaded(model, torch.device(device), (), make)
    with warnings.catch_warnings():
        # PEFT 0.21 uses an attribute's old name in transformers 5.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # It warns of tensors that its model or the file lacks.
        warnings.filterwarnings("error", "Found missing adapter keys")
        return _logps(PeftModel.from_pretrained(base, str(folder)), sequences)


def _logps(model: Any, sequences: Sequences) -> list[np.ndarray]:
    """Compute log-probs from the model's own logits, one response at a time, independently of training's way."""
    model.eval()
    device = model.get_input_embeddings().weight.device
    found = []
    for prompt, response in sequences:
        ids = torch.tensor([[*prompt, *response]], device="cpu" if device.type == "meta" else device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        logps = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None].to(logits.device))
        found.append(logps[:, 0].cpu().numpy())
    return found
