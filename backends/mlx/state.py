"""Save and load adapters, heads, optimisers and random state."""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from lite_dil.backends.head_files import HEAD_WEIGHTS, check_config, has_head, read_head, write_config
from lite_dil.backends.mlx.adapters import SCORE_HEAD, Adapters
from lite_dil.backends.types import POLICY
from lite_dil.base.errors import UserError
from lite_dil.base.files import create, make_folder, write
from lite_dil.models.adapter_files import read_adapter
from lite_dil.models.adapters import match

_OLD = "state.safetensors"  # the policy's adapter, optimiser and passes in runs from when there was only one adapter


def save_adapter(folder: Path, adapters: Adapters, name: str) -> None:
    """Write an adapter in mlx-lm's format, with its head."""
    named = adapters[name]
    if not adapters.is_trained(name):
        raise ValueError(f"{name!r} is frozen: it has no adapter to train or save, and no head")
    with adapters.using(name):
        weights = adapters.model.trainable_parameters()
    head = weights.pop(SCORE_HEAD, None)
    make_folder(folder)
    _write(folder / "adapters.safetensors", weights)
    _write_json(folder / "adapter_config.json", named.settings)
    if named.head is not None:
        _write(folder / HEAD_WEIGHTS, head)
        write_config(folder, named.head)


def save_state(folder: Path, adapters: Adapters) -> None:
    """Write all adapters with their optimisers, and how many passes of each drew dropout masks."""
    for named in adapters.trainable():
        own = folder / "adapters" / named.name
        save_adapter(own, adapters, named.name)
        _write(own / "optimizer.safetensors", named.optimizer.state)
    _write_json(folder / "random.json", {"passes": {each.name: each.passes for each in adapters.trainable()}})


def load_state(folder: Path, adapters: Adapters) -> None:
    """Restore the state of `save_state`: `adapters` must have the same adapters and heads.

    Raises UserError if it has others.
    """
    if (folder / _OLD).is_file():
        state = _read(folder / _OLD)
        saved = {POLICY: (state["adapter"], state["optimizer"], state["passes"].item())}
    else:
        passes = json.loads((folder / "random.json").read_text(encoding="utf-8"))["passes"]
        saved = {name: (*_read_adapter(folder / "adapters" / name), number) for name, number in passes.items()}
    here = {each.name for each in adapters.trainable()}
    if saved.keys() != here:
        raise UserError(f"{folder} holds the adapters {', '.join(sorted(saved))}; this model has {', '.join(sorted(here))}")
    for name, (weights, optimizer, number) in saved.items():
        named = adapters[name]
        check_config(folder / "adapters" / name, named.head)
        with adapters.using(name):
            _check(folder, name, adapters.model.trainable_parameters(), weights)
            adapters.model.update(weights)
        named.optimizer.state, named.passes = optimizer, number


def load_adapter(folder: Path, adapters: Adapters, name: str, alone: bool) -> None:
    """Add an adapter from its files, with its head if it has one; `alone` is that of `adapter_files.read_adapter`.

    Raises UserError if it cannot be read, or is not of this model's layers.
    """
    adapter, head = read_adapter(str(folder), alone=alone), read_head(folder)
    adapters.add(name, match(adapter, adapters.shapes, str(folder)), 0.0, head)
    adapters[name].loaded = True
    if (made := adapters[name].head) is None:
        return
    check_config(folder, made)
    try:
        made.load_weights(str(folder / HEAD_WEIGHTS))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder / HEAD_WEIGHTS} cannot be read ({error})") from None


def _read_adapter(folder: Path) -> tuple[Any, Any]:
    """Return the trainable parameters, including a head's, and the optimiser's state."""
    weights = _read(folder / "adapters.safetensors")
    if has_head(folder):
        weights[SCORE_HEAD] = _read(folder / HEAD_WEIGHTS)
    return weights, _read(folder / "optimizer.safetensors")


def _check(folder: Path, name: str, here: Any, saved: Any) -> None:
    """Raise UserError unless the saved arrays match the adapter's: MLX itself accepts any shape and missing arrays."""
    shapes = [{path: value.shape for path, value in tree_flatten(tree)} for tree in (here, saved)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{folder}: adapter {name!r} differs there in rank, targets or head")


def _read(path: Path) -> Any:
    return tree_unflatten(list(mx.load(str(path)).items()))


def _write(path: Path, tree: Any) -> None:
    with create(path) as file:
        # Sorted: the order of the arrays in the file follows it, and a resumed run has another one.
        mx.save_safetensors(file, dict(sorted(tree_flatten(tree), key=itemgetter(0))))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write(path, json.dumps(values, indent=2) + "\n")
