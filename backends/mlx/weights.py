"""What mlx-lm's models do not read themselves, whatever the family: some layouts of experts, configs without a setting."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import MISSING
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes as mlx_classes

Weights = dict[str, mx.array]


def classes(config: dict[str, Any], complete: bool = False) -> tuple[Any, Any]:
    """Return mlx-lm's classes of a model and its arguments; the model reads these layouts too.

    Args:
        complete: put neutral settings into the config where it has none that the arguments demand.
    """
    base, arguments = mlx_classes(config)
    if complete:
        config |= _neutral(arguments, config)
    period, kind = config.get("sliding_window_pattern"), inspect.signature(arguments).parameters.get("sliding_window_pattern")
    if isinstance(period, int) and kind is not None and "str" in str(kind.annotation):
        config["sliding_window_pattern"] = "L" * (period - 1) + "G"  # EXAONE 4, of local and global layers

    def sanitize(self: Any, weights: Weights) -> Weights:
        known = _transposed(weights)
        return _stacked(self, base.sanitize(self, known) if hasattr(base, "sanitize") else known)

    return type(base.__name__, (base,), {"sanitize": sanitize}), arguments


def _neutral(arguments: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Return settings that change nothing, for those that the config lacks. What they do is compared with transformers."""
    fields = {one.name: one for one in dataclasses.fields(arguments)}
    missing = [one for one in fields.values() if one.default is one.default_factory is MISSING and one.name not in config]
    found: dict[str, Any] = {}
    for one in missing:
        if one.type in (bool, "bool"):
            found[one.name] = False  # a bias, or a norm, whose weights are then not in the files either
        elif one.type in (int, "int"):
            found[one.name] = config.get("head_dim") if one.name == "rotary_dim" else 0
    if "rope_theta" in fields and config.get("rope_theta") is None:
        found["rope_theta"] = 10000.0  # of a model without rope
    if "rope_scaling" in fields and config.get("rope_scaling") is None:
        found["rope_scaling"] = {"type": "default", "rope_type": "default", "factor": 1.0}
    return found


def _transposed(weights: Weights) -> Weights:
    """Turn experts' (in, out) weights beside biases of their own, gpt-oss in 16 bits, into (out, in), as in 4 bits."""
    return {
        f"{name}.weight" if f"{name}_bias" in weights else name: value.swapaxes(-1, -2) if f"{name}_bias" in weights else value
        for name, value in weights.items()
    }


def _stacked(model: Any, weights: Weights) -> Weights:
    """Put the weights of single experts together that the model has as one."""
    here = {name for name, _ in tree_flatten(model.parameters())}
    groups: dict[str, dict[int, str]] = {}
    for name in weights:
        found = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", name)
        if found and name not in here and (target := f"{found[1]}.switch_mlp.{found[3]}.weight") in here:
            groups.setdefault(target, {})[int(found[2])] = name
    taken = {name for group in groups.values() for name in group.values()}
    made = {target: mx.stack([weights[group[number]] for number in sorted(group)]) for target, group in groups.items()}
    return {name: value for name, value in weights.items() if name not in taken} | made
