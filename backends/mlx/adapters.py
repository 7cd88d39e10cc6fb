"""Named adapters on one frozen model. The active adapter's modules are in the model; the others are kept outside it.

So with adapters off it is exactly the bare model, inactive adapters take no part in a pass, and the model's trainable
parameters are those of the active adapter, under mlx-lm's own names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.nn as nn
import numpy as np
from mlx.optimizers import Optimizer

from lite_dil.backends.mlx.load import output_head
from lite_dil.backends.mlx.lora import LoRALinear, Shared, linear_layers, shape_of
from lite_dil.backends.mlx.score_head import ScoreHead
from lite_dil.backends.types import POLICY, REFERENCE, Head
from lite_dil.base.streams import dropout_key, named
from lite_dil.models.adapters import Adapter
from lite_dil.models.spelling import hf_layer

SCORE_HEAD = "score_head"  # a head's name in the model


@dataclass
class Named:
    """An adapter with its state.

    Attributes:
        layers: its layers, by transformers' names, which seeds, files in PEFT's format and the other backend go by.
        settings: mlx-lm's adapter_config.json.
        passes: how many passes have drawn dropout masks.
        loaded: whether it is from files of its own, so that it is no part of a training's state.
    """

    name: str
    layers: dict[str, LoRALinear]
    shared: Shared
    settings: dict[str, Any]
    optimizer: Optimizer
    head: ScoreHead | None = None
    passes: int = 0
    loaded: bool = False

    def draw(self, seed: int) -> int:
        """Return the seed of the next pass's dropout masks."""
        self.passes += 1
        if self.name == POLICY:
            return dropout_key(seed, self.passes)
        # 64 bits, so that it equals one of the policy's 32-bit keys only once in four billion.
        return int(named("dropout", seed, self.name, str(self.passes)).integers(2**64, dtype=np.uint64))

    @property
    def scores(self) -> ScoreHead:
        """Its head. Raises ValueError if it has none."""
        if self.head is None:
            raise ValueError(f"adapter {self.name!r} has no head")
        return self.head


class _Site(NamedTuple):
    """The place of a linear layer in the model."""

    parent: Any
    key: Any
    bare: nn.Module


class Adapters:
    """The adapters of a model, which this class freezes; the policy must be added before the model runs.

    Args:
        base: the model's name, for adapter_config.json.
        optimizer: makes an optimiser without state.
        alone: the result of `spelling.text_only`; it decides the layers' names.
    """

    def __init__(self, model: Any, base: str, optimizer: Callable[[], Optimizer], alone: bool = False) -> None:
        self.model, self.base, self.make_optimizer = model, base, optimizer
        model.freeze()
        shapes, self.on = linear_layers(model), REFERENCE
        paths = {hf_layer(path, alone): path for path in shapes}
        self.shapes = {name: shapes[path] for name, path in paths.items()}
        self.width = shape_of(output_head(model)[1])[1]
        self._sites = {name: _site(model, path) for name, path in paths.items()}
        # mlx-lm's adapter_config.json needs the layers' names within a block.
        blocks = next(name for name, module in model.named_modules() if module is model.layers[0]).rpartition("0")[0]
        self._short = {name: path.removeprefix(blocks).partition(".")[2] for name, path in paths.items()}
        self._named = {REFERENCE: Named(REFERENCE, {}, Shared(), {}, optimizer())}

    def __getitem__(self, name: str) -> Named:
        if name not in self._named:
            raise KeyError(f"no adapter {name!r}; there are {', '.join(map(repr, self._named))}")
        return self._named[name]

    @property
    def names(self) -> list[str]:
        """The names of all adapters, including the reference."""
        return list(self._named)

    def is_trained(self, name: str) -> bool:
        """Return whether an adapter can be trained: the reference is frozen, and one without layers is the bare base."""
        return name != REFERENCE and bool(self[name].layers)

    def trainable(self) -> list[Named]:
        """Return those of a training's state: all but the reference, and those loaded from their own files."""
        return [each for name, each in self._named.items() if name != REFERENCE and not each.loaded]

    def add(self, name: str, adapter: Adapter, dropout: float = 0.0, head: Head | None = None) -> None:
        """Add an adapter; one named as the reference is frozen (without one the reference is the bare model)."""
        shared = Shared()
        layers = {
            path: LoRALinear(self._sites[path].bare, a, b, adapter.scale, dropout, shared, index)
            for index, (path, (a, b)) in enumerate(adapter.weights.items())
        }
        if name == REFERENCE:
            for layer in layers.values():
                layer.freeze()
        settings = {
            "fine_tune_type": "lora",
            "num_layers": len(self.model.layers),
            "lora_parameters": {
                "rank": adapter.rank,
                "scale": adapter.scale,
                "dropout": dropout,
                "keys": sorted({self._short[path] for path in layers}),
            },
            "model": self.base,
        }
        made = None if head is None else ScoreHead(head, self.width)
        self._named[name] = Named(name, layers, shared, settings, self.make_optimizer(), made)

    def set_head(self, head: Head | None) -> None:
        """Give the policy a head at zero, or none, with a new optimiser. Raises ValueError if it is the bare base."""
        policy = self[POLICY]
        if not policy.layers:
            raise ValueError("the policy is the bare base; it has no adapter that a head could belong to")
        policy.head = None if head is None else ScoreHead(head, self.width)
        policy.optimizer = self.make_optimizer()
        self.switch_to(self.on)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Activate `name` inside the block, and the previous adapter after it."""
        named, before = self[name], self[self.on]
        try:
            self.switch_to(named.name)
            yield
        finally:
            self.switch_to(before.name)

    def switch_to(self, name: str) -> None:
        """Put an adapter into the model. Calling it again repairs a state that an exception left half done."""
        named = self[name]
        for path, site in self._sites.items():
            site.parent[site.key] = named.layers.get(path, site.bare)
        if named.head is not None:
            self.model[SCORE_HEAD] = named.head
        else:
            self.model.pop(SCORE_HEAD, None)
        self.on = name


def _site(model: Any, path: str) -> _Site:
    *above, last = (int(part) if part.isdigit() else part for part in path.split("."))
    parent = model
    for part in above:
        parent = parent[part]
    return _Site(parent, last, parent[last])
