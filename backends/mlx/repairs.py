"""What some of mlx-lm's models compute otherwise: the form of GELU, constants in 16 bits, attention windows, tied heads.

What comes of it is not taken for granted: `lite_dil.backends.mlx.twin` compares it with transformers.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Set
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask

from lite_dil.backends.mlx.load import windows
from lite_dil.backends.mlx.prefix import applied_windows, wrap_layers
from lite_dil.models.logits import logit_transform

# What transformers computes by each name of GELU: with erf, or its approximation with tanh.
_GELUS = {"gelu": nn.gelu, "gelu_python": nn.gelu} | dict.fromkeys(
    ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh"), nn.gelu_approx
)
_NAMES = {"gelu", "gelu_approx"}


def wrap(model: nn.Module, config: dict[str, Any], checkpointing: str) -> None:
    """Wrap the layers as `wrap_layers` does, and mend what the model does not read of its config."""
    mend_gelu(model, config.get("text_config") or config)
    mend_constants(model, str(config.get("model_type")))
    mend_tied_head(model, config)
    wrap_layers(model, checkpointing)
    mend_windows(model, config)


def mend_gelu(model: nn.Module, config: dict[str, Any]) -> None:
    """Compute GELU in the form that the config names, where a module's own code has one form or the other built in."""
    wanted = _GELUS.get(str(config.get("hidden_activation") or config.get("hidden_act")))
    if wanted is None:
        return
    _rebind(model, _NAMES, {"nn": types.SimpleNamespace(**vars(nn) | dict.fromkeys(_NAMES, wanted))})


def mend_constants(model: nn.Module, kind: str) -> None:
    """Have constants in transformers' type.

    In float32 Gemma 3's embeddings are not multiplied by a root in 16 bits, but RecurrentGemma's (`kind`) are.
    """
    if kind == "recurrent_gemma":
        root = types.SimpleNamespace(sqrt=lambda width: mx.array(width**0.5, mx.bfloat16).item())
        _rebind(model, {"scale_by_sqrt_dim"}, {"math": root})
    _rebind(model, {"bfloat16"}, {"mx": types.SimpleNamespace(**vars(mx) | {"bfloat16": mx.float32})})


def mend_tied_head(model: nn.Module, config: dict[str, Any]) -> None:
    """Scale the logits of a tied MiniCPM 3 as transformers does; mlx-lm scales only those of a head of its own."""
    if not config.get("dim_model_base") or not config.get("tie_word_embeddings"):
        return
    scale, kind = logit_transform(config).scale, type(model)

    def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        return kind.__call__(self, *args, **kwargs) * scale

    model.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def _rebind(model: nn.Module, used: Set[str], libraries: dict[str, Any]) -> None:
    """Let the code of modules that uses one of these names find other libraries."""
    for module in model.modules():
        call: Any = type(module).__call__
        if getattr(call, "__code__", None) is None:  # a class that is only its parts: its owner computes with them
            continue
        if not used.isdisjoint(call.__code__.co_names) and libraries.keys() <= call.__globals__.keys():
            names = call.__globals__ | libraries
            call = types.FunctionType(call.__code__, names, "__call__", call.__defaults__, call.__closure__)
            module.__class__ = type(type(module).__name__, (type(module),), {"__call__": call})


def mend_windows(model: nn.Module, config: dict[str, Any]) -> None:
    """Apply the config's windows in layers to which mlx-lm gives none; the layers must be wrapped."""
    applied = applied_windows(model)
    if applied is None:  # the model's own loop decides
        return
    for layer, meant, found in zip(model.layers, windows(config), applied, strict=True):
        if meant and found is None:
            layer.__class__ = _windowed(type(layer), meant)


def _windowed(kind: type, size: int) -> type:
    own = next(base for base in kind.__mro__ if base.__module__.startswith("mlx_lm."))
    parameters = inspect.signature(own.__call__)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(self, *args, **kwargs)
        whole = isinstance(given.arguments["mask"], mx.array)  # Gemma 2's code takes no other
        mask = create_attention_mask(args[0], given.arguments.get("cache"), window_size=size, return_array=whole)
        given.arguments["mask"] = mask
        return kind.__call__(*given.args, **given.kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})
