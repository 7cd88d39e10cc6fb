"""adapter_config.json in PEFT's and mlx-lm's formats, read and checked: the one reader of what an adapter computes with."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lite_dil.base.checked import read_object
from lite_dil.base.errors import UserError

_MOST = 65536  # of a rank
_LARGEST = 1e30  # of a scale, so that a product with weights of ordinary size stays finite in float32
# Fields of PEFT's LoRA that decide nothing about what an adapter on linear layers computes, whatever their values.
_PEFT_FREE = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules"),
    *(
        "inference_mode",
        "layers_pattern",
        "loftq_config",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
    ),
    *("fan_in_fan_out", "layers_to_transform", "qalora_group_size", "revision", "runtime_config", "task_type"),
}
_PEFT_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "target_parameters", "bias"),
    "init_lora_weights",
}
# With these an adapter is more than W x + scale B A x on linear layers.
_PEFT_VARIANTS = {
    *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "kasa_config", "layer_replication", "lora_bias"),
    *("modules_to_save", "monteclora_config", "rank_pattern", "trainable_token_indices", "use_dora"),
    *("use_bdlora", "use_qalora", "velora_config"),
}


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter_config.json says: ``scale`` multiplies B A x; `model` is the base's name, "" if none is given."""

    peft: bool
    rank: int
    scale: float
    dropout: float
    model: str


def read_config(folder: Path) -> AdapterConfig:
    """Read and check an adapter's adapter_config.json.

    Raises UserError if it is missing, has a field of a wrong type or out of range, or describes more than plain LoRA.
    """
    where = f"adapter {folder}: adapter_config.json"
    if not os.path.exists(path := folder / "adapter_config.json"):
        raise UserError(f"adapter {folder}: no adapter_config.json there; give a folder that holds an adapter")
    content = read_object(path, where)
    fields = _Fields(content, where)
    return _peft(fields) if "peft_type" in content else _mlx(fields)


@dataclass(frozen=True)
class _Fields:
    """The fields of a JSON object; each method returns one after a check of its type and range."""

    content: dict[str, Any]
    where: str
    inside: str = ""

    def wrong(self, name: str, expected: str) -> UserError:
        shown = repr(self.content.get(name, "missing"))
        return UserError(f"{self.where}: {self.inside}{name} is {shown[:80]}; expected {expected}")

    def whole(self, name: str) -> int:
        value = self.content.get(name)
        if type(value) is not int or not 0 < value <= _MOST:
            raise self.wrong(name, f"a whole number from 1 to {_MOST}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self.content.get(name, default)
        value = default if value is None else value
        # Compared as it is: a whole number may be too large for a float.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.content.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return bool(value)

    def text(self, name: str) -> str:
        value = self.content.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "text")
        return value or ""

    def names(self, name: str) -> None:
        value = self.content.get(name)
        names = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(each, str) for each in names):
            raise self.wrong(name, "names of layers")

    def only(self, known: set[str], variants: set[str]) -> None:
        """Raise UserError for a field that is set and not known, which may change what the adapter computes."""
        for name, value in self.content.items():
            if name not in known and value not in (None, False, [], {}, ""):
                what = "is not supported" if name in variants else "is not known"
                raise UserError(f"{self.where}: {self.inside}{name} = {repr(value)[:80]} {what}; only plain LoRA is supported")


def _peft(fields: _Fields) -> AdapterConfig:
    content = fields.content
    if content["peft_type"] != "LORA":
        raise UserError(f"{fields.where}: peft_type = {content['peft_type']!r} is not supported; only plain LoRA is")
    if content.get("bias") not in (None, "none"):
        raise UserError(f"{fields.where}: bias = {content['bias']!r} is not supported; only plain LoRA is")
    # Others (pissa, olora, ...) change the base weights, so that "adapter off" would not be the base model.
    if content.get("init_lora_weights") not in (None, True, False, "gaussian", "eva", "orthogonal"):
        raise UserError(
            f"{fields.where}: init_lora_weights = {content['init_lora_weights']!r} is not supported; only plain LoRA is"
        )
    fields.only(_PEFT_READ | _PEFT_FREE, _PEFT_VARIANTS)
    fields.names("target_modules")
    fields.names("target_parameters")
    # A linear layer may be selected by its weight, where PEFT would take its name for a part of an expert.
    if any(not name.endswith(".weight") for name in content.get("target_parameters") or ()):
        raise fields.wrong("target_parameters", "the weights of linear layers: experts' parameters are not supported")
    rank = fields.whole("r")
    alpha = fields.number("lora_alpha", -_LARGEST, _LARGEST)
    scale = alpha / (math.sqrt(rank) if fields.flag("use_rslora") else rank)
    return AdapterConfig(True, rank, scale, fields.number("lora_dropout", 0, 1, 0.0), fields.text("base_model_name_or_path"))


def _mlx(fields: _Fields) -> AdapterConfig:
    content = fields.content
    if content.get("fine_tune_type", "lora") != "lora":
        raise UserError(f"{fields.where}: fine_tune_type = {content['fine_tune_type']!r} is not supported; lora is")
    if content.get("use_dora"):
        raise UserError(f"{fields.where}: use_dora = {content['use_dora']!r} is not supported; only plain LoRA is")
    if not isinstance(content.get("lora_parameters"), dict):
        raise fields.wrong("lora_parameters", "rank, scale, dropout and keys")
    inner = _Fields(content["lora_parameters"], fields.where, "lora_parameters.")
    inner.only({"rank", "scale", "dropout", "keys", "alpha"}, set())
    inner.names("keys")
    scale = inner.number("scale", -_LARGEST, _LARGEST)
    return AdapterConfig(False, inner.whole("rank"), scale, inner.number("dropout", 0, 1, 0.0), fields.text("model"))
