"""A model's config.json, read and checked: the one reader of its sizes and factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lite_dil.base.checked import read_object
from lite_dil.base.errors import UserError

_LARGEST = 2**24  # of a size: larger ones are damage, and would be allocated
# Model types that split their width evenly into heads where head_dim does not say otherwise.
SPLIT_WIDTH = ("llama", "mistral", "qwen2", "phi3", "granite", "cohere", "olmo2", "smollm3")


def read_config(path: Path, where: str) -> dict[str, Any]:
    """Read a config.json; `where` names the model in messages.

    Raises UserError if it cannot be read, or if a field that is computed with has a wrong type or is out of range.
    """
    config = read_object(path, f"{where}: {path.name}")
    check(config, where)
    return config


def check(config: dict[str, Any], where: str) -> None:
    """Raise UserError for the first field that has a wrong type or is out of range, in the text model's part too."""
    for problem in _problems(config):
        raise UserError(f"{where}: config.json: {problem}")
    for name in ("text_config", "vision_config"):
        for problem in _problems(config.get(name) or {}):
            raise UserError(f"{where}: config.json: {name}.{problem}")


def _problems(config: dict[str, Any]) -> Iterator[str]:
    for expected, (holds, names) in _FIELDS.items():
        for name in names:
            value = config.get(name)
            if value is not None and not holds(value):
                yield f"{name} is {repr(value)[:80]}; expected {expected}"
    heads, shared, width = (config.get(name) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        yield f"num_attention_heads is {heads}; expected a multiple of num_key_value_heads, {shared}"
    split = config.get("model_type") in SPLIT_WIDTH and config.get("head_dim") is None
    if split and isinstance(heads, int) and isinstance(width, int) and width % heads:
        yield f"hidden_size is {width}; expected a multiple of num_attention_heads, {heads}"


def _size(value: Any) -> bool:
    """Whether a value is a size, or one for each layer."""
    if isinstance(value, list):
        return all(_size(each) for each in value if each is not None)
    return type(value) is int and 0 < value <= _LARGEST


def _number(low: float, included: bool = False) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and (low < value or (included and value == low)) and value < 1e30 and not math.isnan(value)

    return holds


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _quantised(value: Any) -> bool:
    """Whether a value is what mlx-lm writes of its quantisation, perhaps with others by layer."""
    if not isinstance(value, dict):
        return False
    return all(type(value.get(name)) is int and 0 < value[name] <= 1024 for name in ("bits", "group_size"))


def _rope(value: Any) -> bool:
    """Whether a value is a rope's parameters, perhaps by kind of layer, with numbers where there must be."""
    if not isinstance(value, dict):
        return False
    named = ("rope_theta", "factor", "original_max_position_embeddings")
    parts = [value, *(part for part in value.values() if isinstance(part, dict))]
    return all(part.get(name) is None or _number(0)(part[name]) for part in parts for name in named)


# What a field must be, by the words for it. None stands for a field that is left out.
_FIELDS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    f"a whole number from 1 to {_LARGEST}": (
        _size,
        (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "vocab_size", "patch_size", "image_size"),
        ),
    ),
    "a whole number above 0": (lambda value: type(value) is int and 0 < value < 2**62, ("max_position_embeddings",)),
    "a whole number of tokens, or false": (
        lambda value: (type(value) is int and value >= 0) or value is False,
        ("sliding_window",),
    ),
    "a number above 0": (
        _number(0),
        ("rope_theta", "logits_scaling", "final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar"),
    ),
    "a number, at least 0": (_number(0, included=True), ("rms_norm_eps", "layer_norm_eps", "norm_eps")),
    "a finite number": (
        lambda value: _number(-1e30)(value),
        ("logit_scale", "lm_head_multiplier", "embedding_multiplier", "residual_multiplier", "attention_multiplier"),
    ),
    "true or false": (_is(bool), ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_qk_norm")),
    "text": (_is(str), ("model_type", "dtype", "torch_dtype")),
    "an object": (_is(dict), ("text_config", "vision_config", "quantization_config")),
    "an object with bits and group_size": (_quantised, ("quantization",)),
    "an object with numbers above 0": (_rope, ("rope_parameters", "rope_scaling")),
    "a list of texts": (
        lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
        ("layer_types",),
    ),
}
