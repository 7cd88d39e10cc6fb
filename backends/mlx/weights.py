"""Layouts of experts' weights that mlx-lm's models do not read themselves, whatever the family."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes as mlx_classes

Weights = dict[str, mx.array]


def classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """Return mlx-lm's classes of a model and its arguments; the model reads these layouts too."""
    base, arguments = mlx_classes(config)

    def sanitize(self: Any, weights: Weights) -> Weights:
        known = _transposed(weights)
        return _stacked(self, base.sanitize(self, known) if hasattr(base, "sanitize") else known)

    return type(base.__name__, (base,), {"sanitize": sanitize}), arguments


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
