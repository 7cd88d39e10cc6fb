"""Load models for MLX: mlx-lm's models, quantised on request, with checks of windows and memory limits."""

from __future__ import annotations

import contextlib
import inspect
import io
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model

from lite_dil.backends.foreign import Misfit, foreign
from lite_dil.backends.limits import BITS, GROUP_SIZE
from lite_dil.backends.mlx.device import auto_dtype
from lite_dil.backends.mlx.rope import mend_ropes
from lite_dil.backends.mlx.weights import classes
from lite_dil.base.errors import UserError
from lite_dil.models.hub import needs_code
from lite_dil.models.model_config import read_config
from lite_dil.models.options import ModelOptions
from lite_dil.models.spelling import known_config, mlx_config

TABLES = (nn.Embedding, nn.QuantizedEmbedding)  # a head of one of these is tied
_CACHE_LIMIT = 4 * 2**30


def load(folder: Path, name: str, config: ModelOptions) -> tuple[Any, dict[str, Any], int]:
    """Return the model, its config and the bits that the checkpoint is quantised to (0 if it is not)."""
    raw = read_config(folder / "config.json", f"--model {name}")
    method = (raw.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "mxfp4") and "quantization" not in raw:  # where mlx-lm has packed it itself
        raise UserError(
            f"--model {name}: its weights are packed by {method}, on which this backend cannot train; give the model in "
            "16 bits, with --4bit to save memory"
        )
    if not any(folder.glob("model*.safetensors")):
        raise UserError(f"--model {name}: no model*.safetensors in {folder}; MLX reads no other weights")
    code = config.trust_remote_code
    try:
        known = foreign(known_config, folder, code)
    except Misfit:  # mlx-lm may know the model all the same
        known = {}
    try:
        model, loaded = foreign(_build, folder, mlx_config(raw, known), code)
    except Misfit as error:
        raise UserError(f"--model {name}: mlx-lm cannot load it ({_why(error)}); take another --backend") from None
    except SystemExit:  # as mlx-lm's OLMo does without its package
        raise UserError(f"--model {name}: mlx-lm needs another package for it; take another --backend") from None
    if not hasattr(model, "_no_grad"):  # mlx-lm's RecurrentGemma does not start as a module does
        nn.Module.__init__(model)
    mend_ropes(model, loaded)
    bits = int((loaded.get("quantization") or {}).get("bits", 0))
    if config.load_in_4bit and bits not in (0, BITS):
        raise UserError(f"--4bit: {name} is quantised to {bits} bits already; leave --4bit out")
    return model, loaded, bits


def _build(folder: Path, added: dict[str, Any], code: bool) -> tuple[Any, dict[str, Any]]:
    """Build the model; if its code demands settings that the config does not have, with neutral ones."""
    options: dict[str, Any] = {"lazy": True, "get_model_classes": classes, "trust_remote_code": code}
    try:
        return load_model(folder, model_config=added, **options)
    except (TypeError, AttributeError):
        return load_model(folder, model_config=added, **options | {"get_model_classes": partial(classes, complete=True)})


def _why(error: Misfit) -> str:
    """Return what the error in mlx-lm's code was; MLX lists the weights that do not fit below the first line."""
    cause = error.__cause__ or error
    return needs_code(cause) or " ".join(str(cause).split("\n")[:2]).strip() or repr(cause)


def set_dtype(model: Any, name: str, pre_quantised: bool) -> mx.Dtype:
    """Cast the floating-point weights (lazily) and return the compute dtype."""
    if name == "auto":
        # On a CPU, MLX multiplies in bfloat16 up to ten times slower than in float32.
        dtype = getattr(mx, auto_dtype())
        if pre_quantised:
            own = next(value.dtype for key, value in tree_flatten(model.parameters()) if key.endswith("scales"))
            # A quantised checkpoint keeps its scales, since rounding them would change the model. float32 holds them exactly;
            # float16 would need loss scaling.
            dtype = dtype if own == mx.bfloat16 else mx.float32
    else:
        dtype = getattr(mx, name)
    model.set_dtype(dtype)
    return dtype


def quantise(model: Any, config: dict[str, Any], options: ModelOptions, name: str, bits: int) -> tuple[Any, str]:
    """Quantise by --4bit and --head-bits; return the model and a description.

    A tied head is the embedding table: it is quantised once for both, and no 16-bit copy is kept.

    Args:
        bits: the bits that the checkpoint is already quantised to, or 0.
    """
    if decoder_of(model) is None or not hasattr(model, "layers") or output_head(model)[1] is None:
        raise UserError(
            f"--model {name}: mlx-lm builds this architecture in a way that lite-dil does not know; take another --backend"
        )
    path, head = output_head(model)
    own = getattr(head, "bits", None)
    wanted = options.head_bits
    if wanted and own not in (None, wanted):
        raise UserError(f"--head-bits {wanted}: the head of {name} is quantised to {own} bits already; leave --head-bits out")
    if wanted and not own and head.weight.shape[-1] % GROUP_SIZE:
        raise UserError(f"--head-bits: the model's width {head.weight.shape[-1]} is not a multiple of {GROUP_SIZE}")
    group = (config.get("quantization") or {}).get("group_size", GROUP_SIZE)
    if options.load_in_4bit and not bits:
        bits = BITS
        # A model's own predicate is for mixed precision, as for MoE gates.
        base = getattr(model, "quant_predicate", None) or (lambda path, module: True)
        special = {"group_size": GROUP_SIZE, "bits": wanted or BITS}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the bits per weight
            model, _ = quantize_model(
                model, config, GROUP_SIZE, BITS, quant_predicate=lambda p, m: special if p == path and wanted else base(p, m)
            )
    elif wanted and not own:
        nn.quantize(model, GROUP_SIZE, wanted, class_predicate=lambda p, _: p == path)
    words = f"{bits}-bit group {group}" if bits else ""
    after = getattr(output_head(model)[1], "bits", 16)
    return model, f"{words} head {after}".strip() if after != (bits or 16) else words


def causal_lm(model: Any) -> Any:
    """Return the text model, which mlx-lm wraps once more in multimodal checkpoints."""
    return getattr(model, "language_model", model)


def decoder_of(model: Any) -> Any:
    """Return the part of the model that gives hidden states, or None if it is not known."""
    inner = causal_lm(model)
    return next((inner[name] for name in ("model", "backbone", "transformer") if name in inner), None)


def decode(model: Any, ids: mx.array, cache: Any = None) -> Any:
    """Return what the decoder returns for rows of ids; each layer gets `cache`."""
    decoder = decoder_of(model)
    asked = inspect.signature(type(decoder).__call__).parameters.get("cache")
    demanded = asked is not None and asked.default is inspect.Parameter.empty
    handed = {"cache": [cache] * len(model.layers)} if cache is not None or demanded else {}
    return foreign(decoder, ids, **handed)


def output_head(model: Any) -> tuple[str, Any]:
    """Return the name and module of the output head, or of the embedding table if they are tied; None if there is neither."""
    inner, decoder = causal_lm(model), decoder_of(model)
    tables = (decoder[name] for name in ("embed_tokens", "embeddings", "wte") if name in decoder)
    head = inner.lm_head if "lm_head" in inner else next(tables, None)
    return next((name for name, module in model.named_modules() if module is head), ""), head


def windows(config: dict[str, Any]) -> list[int | None]:
    """Return each layer's attention window in tokens, from a config.json; None for unlimited."""
    config = config.get("text_config") or config
    layers, window = int(config.get("num_hidden_layers") or 0), config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return [None] * layers
    if kinds := config.get("layer_types"):
        return [window if "sliding" in kind else None for kind in kinds]
    kind = config.get("model_type", "")
    if kind == "gemma2":
        return [None if i % 2 else window for i in range(layers)]
    if pattern := config.get("sliding_window_pattern") or {"gemma3_text": 6, "cohere2": 4}.get(kind):
        return [window if (i + 1) % pattern else None for i in range(layers)]
    first = config.get("max_window_layers") if config.get("use_sliding_window") else 0
    return [window if i >= (first or 0) else None for i in range(layers)]


def check_windows(config: dict[str, Any], applied: list[int | None] | None, max_length: int, name: str) -> None:
    """Raise UserError if a row may exceed an attention window that mlx-lm does not apply.

    Args:
        applied: each layer's window in mlx-lm, or None if unknown.
    """
    meant = windows(config)
    wrong = [w for i, w in enumerate(meant) if w and (applied is None or i >= len(applied) or applied[i] != w)]
    if wrong and min(wrong) < max_length:
        raise UserError(
            f"--model {name}: its attention window is {min(wrong)} tokens, which mlx-lm does not apply to this model; "
            f"take --max-length {min(wrong)} or less, or another --backend"
        )


def memory_limits(info: dict[str, Any]) -> tuple[int, int]:
    """Return the limits of wired and of cached memory in bytes, from mx.device_info().

    Wired: macOS's recommendation, at most three quarters of the memory, which leaves the system 2 of 8, 4 of 16, 6 of 24 GB.
    Cached (freed buffers): a sixteenth, at most 4 GiB; batches of changing shapes would otherwise fill memory with useless
    buffers.
    """
    memory = int(info["memory_size"])
    wired = min(int(info.get("max_recommended_working_set_size") or memory), memory * 3 // 4)
    return wired, min(memory // 16, _CACHE_LIMIT)


def limit_memory() -> None:
    """Set the limits of `memory_limits` if there is Metal."""
    if mx.metal.is_available():
        wired, cache = memory_limits(mx.device_info())
        mx.set_wired_limit(wired)
        mx.set_cache_limit(cache)
