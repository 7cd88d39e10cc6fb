"""What transformers computes for a model's small twin; see lite_dil.backends.twin."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig
from transformers.utils import logging

from lite_dil.backends.foreign import foreign
from lite_dil.backends.torch.load import auto_class, decoder_of, linear_layers
from lite_dil.backends.torch.probing import adaptable
from lite_dil.base import files
from lite_dil.models import tensors
from lite_dil.models.twin import probe, weight_digest

Shapes = dict[str, tuple[int, ...]]


def figures_of(
    folder: Path, trust_remote_code: bool, write_weights: Callable[[Path, Mapping[str, tuple[int, ...]]], None]
) -> tuple[Shapes, dict[str, str], np.ndarray]:
    """Return a twin's figures.

    These are the shapes of its weights by their names in a checkpoint, the digests of those that can have an adapter, and of
    routers, by the names of their layers, and the log-probs of the probe, (PROBE - 1,).

    Args:
        folder: has the twin's config.json; `write_weights` writes weights of the given shapes beside it.

    Raises:
        Misfit: transformers cannot build or run it, with the reason.
    """
    with _quietly():
        shapes = foreign(_shapes, folder, trust_remote_code)
        write_weights(folder, shapes)
        return shapes, *foreign(_layers_and_logps, folder, trust_remote_code)


def _shapes(folder: Path, code: bool) -> Shapes:
    """Return the shapes of the weights that the text model needs."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=code)
    model = auto_class(config).from_config(config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=code)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    needed = {
        id(weight) for part in (decoder, head) if part is not None for weight in part.state_dict(keep_vars=True).values()
    }
    for weight in model.state_dict(keep_vars=True).values():
        if id(weight) not in needed and weight.is_floating_point():
            weight.data.fill_(math.nan)  # marks it, whatever its name becomes in the checkpoint
    with files.work_folder(folder / "empty") as saved:
        model.save_pretrained(saved)
        stored = {name: one for file in saved.glob("*.safetensors") for name, one in tensors.read_floats(file).items()}
        return {name: one.shape for name, one in sorted(stored.items()) if not np.isnan(one.float32()).all()}


def _layers_and_logps(folder: Path, code: bool) -> tuple[dict[str, str], np.ndarray]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=code)
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "trust_remote_code": code}
    model = auto_class(config).from_pretrained(folder, **options).eval()
    ids = torch.from_numpy(probe())[None]
    with torch.no_grad():
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    modules = dict(model.named_modules())
    names = [*adaptable(model, decoder_of(model), linear_layers(model), model.device), *_routers(modules)]
    layers = {name: weight_digest(modules[name].weight.detach().numpy()) for name in names}
    return layers, logps.gather(-1, ids[0, 1:, None])[:, 0].numpy()


def _routers(modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the modules with a matrix that are neither linear layers nor tables: transformers has routers as such."""
    kinds = (nn.Linear, nn.Embedding)
    matrices = {name: getattr(module, "weight", None) for name, module in modules.items() if not isinstance(module, kinds)}
    return [name for name, weight in matrices.items() if isinstance(weight, nn.Parameter) and weight.ndim == 2]


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers' remarks, and torch's random numbers, from a run."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
