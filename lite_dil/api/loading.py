"""Loading a model with its adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lite_dil.api.telling import tell
from lite_dil.backends.options import EngineOptions, LoadOptions
from lite_dil.base.errors import UserError, did_you_mean
from lite_dil.base.start import start
from lite_dil.config import adapter_source
from lite_dil.config.options import build
from lite_dil.config.train_config import FIELDS
from lite_dil.generation import policy
from lite_dil.generation.policy import AdapterSource, Policy
from lite_dil.models.options import MODEL_FIELDS

# The options that are fixed when a model is loaded.
LOADED = tuple(field.name for field in fields(LoadOptions))
_ENGINE = (*(field.name for field in fields(EngineOptions)), "head_bits")


def load(
    model: str | Path | None = None,
    *,
    bits: int | None = None,
    dtype: str | None = None,
    backend: str | None = None,
    lora_r: int | None = None,
    lora_alpha: float | None = None,
    target_modules: str | Sequence[str] | None = None,
    lora_dropout: float | None = None,
    seed: int = 0,
    adapter: str | Path | None = None,
    reference: str | None = None,
    trainable: bool = True,
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **engine: Any,
) -> Policy:
    """Load a model with a LoRA adapter, fresh or given; its reference is the model with the adapter off.

    Args:
        model: a folder or Hugging Face hub id; by default the adapter's own, and without one the embedded 135M model.
        bits: 4 quantises the frozen weights; None leaves them as they are.
        dtype: the frozen model's compute type: "bfloat16", "float16", "float32", or "auto", the default.
        backend: "cuda", "mlx", "cpu", or "auto", the default.
        lora_r, lora_alpha, target_modules, lora_dropout: for a fresh adapter (16, twice the rank, all linear layers, none).
        seed: for the adapter's initial weights, and in training for the data's order and dropout.
        adapter: a run, a checkpoint, or an adapter's folder, in PEFT's or mlx-lm's format; the model is then loaded as the run
            had it, unless other arguments are given.
        reference: the reference of an `adapter`: "base" or "initial-adapter"; required for training.
        trainable: False loads for inference only.
        trust_remote_code: run the Python files that the model brings, with all your rights.
        chat_template_kwargs: of the chat template, such as {"enable_thinking": False}; by default those of the adapter's run.
        **engine: how training computes, named as in ``lite-dil train --help``: layout, optim, max_length, compile, ...

    Raises:
        UserError: arguments do not go together, or something is not installed or not found.
        OutOfMemory: the device does not hold the model.
    """
    start(training=trainable)
    _check(engine, bits)
    if not isinstance(target_modules, str | None):
        target_modules = ",".join(target_modules)
    of_model = _given(
        model=model and str(model),
        load_in_4bit=True if bits else None,
        dtype=dtype,
        backend=backend,
        head_bits=engine.pop("head_bits", None),
        trust_remote_code=trust_remote_code or None,
        chat_template_kwargs=None if chat_template_kwargs is None else json.dumps(dict(chat_template_kwargs)),
    )
    shape = {"lora_r": lora_r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    of_adapter = _given(**shape, target_modules=target_modules, reference=reference)
    source = adapter_source.find(None if adapter is None else str(adapter), of_model)
    if not trainable:
        _only_for_training([*of_adapter, *engine])
        return policy.load(source, tell)
    return policy.load(source, tell, _options(source, of_adapter | engine | {"seed": seed}))


def _only_for_training(given: list[str]) -> None:
    if given:
        raise UserError(f"dil.load: {', '.join(given)}: only for training; leave out with trainable=False")


def _options(source: AdapterSource, given: dict[str, Any]) -> LoadOptions:
    """Return the options for loading a model for training, checked as on the command line."""
    values = {name: getattr(source.options, name) for name in MODEL_FIELDS} | given
    if source.adapter is not None:
        values |= {"init_adapter": str(source.adapter), "reference": given.get("reference", "base")}
    elif "reference" in given:
        raise UserError("dil.load: reference needs an adapter; without one the reference is the base")
    config = build(values, {})
    options = LoadOptions(**{name: getattr(config, name) for name in LOADED})
    if source.adapter is not None and "reference" not in given:
        return replace(options, reference="")  # not given, so training will ask for it
    return options


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _check(given: dict[str, Any], bits: int | None) -> None:
    """Raise UserError for an option that is not for loading, or another number of bits."""
    if bits not in (None, 4):
        raise UserError(f"dil.load: bits is {bits}; expected 4, or None for the weights as they are")
    for name in given:
        if name in _ENGINE:
            continue
        if name in FIELDS and name not in LOADED:
            raise UserError(f"dil.load: {name} is for training; give it to dil.train")
        raise UserError(f"dil.load: unknown option {name!r}{did_you_mean(name, _ENGINE)}")
