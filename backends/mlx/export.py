"""What an export needs of MLX: dequantised weights, model folders in mlx-lm's format, and the exported files' log-probs."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import stream_generate
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load as load_folder
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from lite_dil.backends.limits import GROUP_SIZE
from lite_dil.backends.mlx.load import load, quantise, set_dtype
from lite_dil.backends.types import DenseWeight, Sequences
from lite_dil.base.errors import UserError, first_line
from lite_dil.base.files import copy
from lite_dil.data.rendering import library_prompt
from lite_dil.models.find import folder_of
from lite_dil.models.options import ModelOptions
from lite_dil.models.spelling import hf_layer, text_only


def dense(backend: Any) -> dict[str, DenseWeight]:
    """Return the quantised weights of the backend's model, dequantised, by layer name."""
    found: dict[str, DenseWeight] = {}
    for name, module in backend.model.named_modules():
        if "scales" in module:
            rows, words = module.weight.shape[-2:]
            shape = (*module.weight.shape[:-2], rows, words * 32 // module.bits)
            found[hf_layer(name.removesuffix(".linear"), text_only(backend.config))] = DenseWeight(
                shape, functools.partial(_unpack, module)
            )
    return found


def _unpack(module: Any) -> np.ndarray:
    # In the scales' 16-bit type the weights would be rounded before the adapter is added, and again afterwards.
    scales = module.scales if module.mode != "affine" else module.scales.astype(mx.float32)
    biases = module.get("biases")
    weight = mx.dequantize(
        module.weight,
        scales,
        None if biases is None else biases.astype(scales.dtype),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )
    return np.array(weight.astype(mx.float32))


def write_model(merged: Path, target: Path, bits: int | None) -> None:
    """Write a merged Hugging Face folder as an mlx-lm folder, quantised to `bits` bits if given.

    Raises:
        UserError: mlx-lm does not know the architecture.
    """
    try:
        model, config = load_model(merged, lazy=True, trust_remote_code=False)
        if bits:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints the bits per weight
                model, config = quantize_model(model, config, GROUP_SIZE, bits)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"--format mlx: mlx-lm cannot load this model ({first_line(error)})") from None
    for path in merged.iterdir():  # the tokenizer and other files
        if path.is_dir() or not (path.name.startswith("model") or path.name == "config.json"):
            copy(path, target / path.name)
    save_model(target, model, donate_model=True)
    save_config(config, target / "config.json")


class Exported:
    """A folder as plain mlx-lm loads it; see `lite_dil.export.runtime.Runtime`."""

    name = "mlx-lm"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def logps(self, sequences: Sequences) -> list[np.ndarray]:
        """Return each response's log-probs, by the model's own logits."""
        return _logps(self.model, sequences)

    def prompt(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Return the tokens of a text or a conversation."""
        if isinstance(prompt, str):
            return list(self.tokenizer.encode(prompt))
        if self.tokenizer._chat_template is not None:  # a function of mlx-lm's in place of the template
            return list(self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True))
        thinking = {self.tokenizer._thinking_kwarg: self.tokenizer.has_thinking}
        text = library_prompt(self.tokenizer._tokenizer, prompt, **thinking)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def end_ids(self) -> set[int]:
        """Return the tokens that end a generation."""
        return set(self.tokenizer.eos_token_ids)

    def ends_after(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        """Return whether a generation in which `tokens` are forced ends with the last of them."""
        left = iter(tokens)

        def force(_: mx.array, logits: mx.array) -> mx.array:
            token = next(left, None)
            return logits if token is None else mx.where(mx.arange(logits.shape[-1]) == token, 0.0, -mx.inf)[None]

        found = list(
            stream_generate(self.model, self.tokenizer, list(prompt), max_tokens=len(tokens) + 2, logits_processors=[force])
        )
        return [each.token for each in found] == list(tokens) and found[-1].finish_reason == "stop"


@contextlib.contextmanager
def exported(folder: Path) -> Iterator[Exported]:
    """Load a folder by plain mlx-lm."""
    try:
        model, tokenizer, *_ = load_folder(str(folder), {"trust_remote_code": False}, lazy=True)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"mlx-lm cannot load the export ({first_line(error)})") from None
    if not mx.metal.is_available():
        model.set_dtype(mx.float32)  # the same numbers; on a CPU, quantised weights in bfloat16 are many times slower
    yield Exported(model, tokenizer)


def adapter_logps(model: str, folder: Path, config: ModelOptions, sequences: Sequences) -> list[np.ndarray]:
    """Return the log-probs of each response under the base, quantised by `config`, with an adapter loaded by plain mlx-lm."""
    base, loaded, bits = load(folder_of(model), model, config)
    set_dtype(base, config.dtype, pre_quantised=bool(bits))
    base, _ = quantise(base, loaded, config, model, bits)
    try:
        return _logps(load_adapters(base, str(folder)), sequences)
    except (ValueError, KeyError) as error:
        raise UserError(f"mlx-lm cannot load the export ({first_line(error)})") from None


def _logps(model: Any, sequences: Sequences) -> list[np.ndarray]:
    """Compute from the model's own logits, one response at a time, independently of training's code."""
    model.eval()
    found = []
    for prompt, response in sequences:
        ids = mx.array([[*prompt, *response]])
        logits = model(ids)[0, len(prompt) - 1 : -1].astype(mx.float32)
        logps = logits - mx.logsumexp(logits, -1, keepdims=True)
        found.append(np.array(mx.take_along_axis(logps, ids[0, len(prompt) :, None], -1)[:, 0]))
    return found
