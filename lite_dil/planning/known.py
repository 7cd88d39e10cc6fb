"""What is known of a model before it is loaded: a dense family by formula, any other by transformers' own class."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from lite_dil.backends import registry
from lite_dil.base.errors import UserError
from lite_dil.base.install import install
from lite_dil.models.adapters import experts_of
from lite_dil.models.find import EMBEDDED_MODEL
from lite_dil.models.listing import ListedModel
from lite_dil.models.model_config import read_config
from lite_dil.models.shape import FAMILIES, ModelShape, config_file, read_quantization, read_shape
from lite_dil.planning.estimate import AnyModel

_LISTS = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")  # one for each layer, in some models


def read_model(model: str, trust_remote_code: bool = False) -> AnyModel:
    """Return what planning needs to know of a model: a folder, a config.json, a hub id, or the embedded model.

    Only its config.json is read. For a family that is not dense or not in the table torch and transformers are imported.

    Raises:
        UserError: it cannot be found, read, or made by transformers.
    """
    if model == EMBEDDED_MODEL:
        return read_shape(model)
    where, path = f"--model {model}", config_file(model)
    config = read_config(path, where)
    if is_dense(config):
        return ModelShape.of(config, where)
    if missing := [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]:
        kind = (config.get("text_config") or config).get("model_type")
        raise UserError(
            f"{where}: model_type is {kind!r}; plan itself knows dense models of {', '.join(FAMILIES)}, and asks transformers "
            f"about others, for which {' and '.join(missing)} is missing: {install('cpu')}"
        )
    read_quantization(config, where)
    return _listed(model, path, path.stat().st_mtime_ns, trust_remote_code)


def is_dense(config: dict[str, Any]) -> bool:
    """Return whether a config.json is of a dense family whose layers are all alike and known."""
    text = {**config, **(config.get("text_config") or {})}
    if text.get("model_type") not in FAMILIES or any(isinstance(text.get(name), list) for name in _LISTS):
        return False
    return config.get("vision_config") is None or config.get("model_type") == "gemma3"


def has_experts(model: str) -> bool:
    """Return whether a model's config.json counts experts."""
    if model == EMBEDDED_MODEL:
        return False
    config = read_config(config_file(model), f"--model {model}")
    return experts_of(config.get("text_config") or config) > 0


@cache
def _listed(model: str, path: Path, changed: int, trust_remote_code: bool) -> ListedModel:
    quantization = read_quantization(read_config(path, f"--model {model}"), f"--model {model}")
    found: ListedModel = registry.module("cpu", "listing").listed(model, path, quantization, trust_remote_code)
    return found
