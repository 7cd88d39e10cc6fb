"""A LoRA layer for MLX that can be switched off exactly."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from lite_dil.models.adapters import Adapter


class Switch:
    """What all the adapted layers of a model share.

    `reference`: whether the model is the reference just now. `strength`: what the policy's adapter is multiplied by. `key`: of
    this pass's dropout masks, an array, so that a layer that is computed again for the backward pass drops the same, and a
    compiled step does not drop the same every time.
    """

    def __init__(self) -> None:
        self.reference, self.strength = False, 1.0
        self.key: mx.array | None = None


class LoRALinear(nn.Module):
    """``W x + scale x A B``, or what the switch asks for: the bare ``W x``, or the frozen initial A and B.

    Parameters are named and laid out as in mlx-lm: lora_a (in, rank), lora_b (rank, out).
    """

    def __init__(
        self, linear: nn.Module, a: np.ndarray, b: np.ndarray, scale: float, dropout: float, switch: Switch, index: int
    ) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a, self.lora_b = mx.array(a.T), mx.array(b.T)
        self.scale, self.dropout, self.switch, self.index = scale, dropout, switch, index
        self._initial: list[mx.array] = []  # a leading underscore keeps it out of the parameters

    def freeze_initial(self) -> None:
        """Keep today's A and B as the reference."""
        self._initial = [self.lora_a, self.lora_b]

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the layer."""
        y, strength = self.linear(x), self.switch.strength
        if not self.switch.reference and strength:
            z = _times(self._dropped(x), self.lora_a) @ self.lora_b
        elif self.switch.reference and self._initial:
            z, strength = _times(x, self._initial[0]) @ self._initial[1], 1.0
        else:
            return y  # not y + 0 * z: that would cost as much, and let an inf or NaN of the adapter through
        return y + (self.scale * strength * z).astype(x.dtype)

    def _dropped(self, x: mx.array) -> mx.array:
        if not (self.training and self.dropout):
            return x
        keep = 1 - self.dropout
        # A layer runs on prompts and responses apart: their sizes keep the two from dropping alike.
        key = self.switch.key + mx.array([x.size, self.index], mx.uint32)
        mask = mx.random.bernoulli(keep, x.shape, key=key)
        return mask * x / keep


def _times(x: mx.array, a: mx.array) -> mx.array:
    """Return ``x A`` in float32, and keep x for the backward pass in the type that it has.

    MLX alone would keep the float32 copy that it multiplies, one for each adapter, beside an x that is kept anyway.
    """
    return x @ a if x.dtype == mx.float32 else _widened_times(x, a)


@mx.custom_function
def _widened_times(x: mx.array, a: mx.array) -> mx.array:
    return x.astype(mx.float32) @ a


@_widened_times.vjp
def _widened_times_vjp(primals: tuple[mx.array, mx.array], slope: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    x, a = primals
    (late,) = mx.depends([x], [slope])  # else mx.compile takes the forward pass's copy, and so keeps it
    wide = late.astype(mx.float32).reshape(-1, x.shape[-1])
    return (slope @ a.T).astype(x.dtype), wide.T @ slope.reshape(-1, slope.shape[-1])


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the (out, in) shape of each linear layer of the decoder's blocks, by its name in the model."""
    blocks = {id(module) for layer in model.layers for _, module in layer.named_modules()}
    shapes = {}
    for name, module in model.named_modules():
        if id(module) in blocks and isinstance(module, (nn.Linear, nn.QuantizedLinear)):
            outputs, inputs = module.weight.shape
            if isinstance(module, nn.QuantizedLinear):
                inputs = inputs * 32 // module.bits  # packed into 32-bit words
            shapes[name] = (outputs, inputs)
    return shapes


def add_lora(model: nn.Module, adapter: Adapter, dropout: float, keep_initial: bool) -> Switch:
    """Freeze the model, put the adapter on its named layers and return the switch of them all."""
    switch = Switch()
    model.freeze()
    modules = dict(model.named_modules())
    adapted = []
    for index, (name, (a, b)) in enumerate(adapter.weights.items()):
        layer = LoRALinear(modules[name], a, b, adapter.scale, dropout, switch, index)
        if keep_initial:
            layer.freeze_initial()
        adapted.append((name, layer))
    model.update_modules(tree_unflatten(adapted))
    return switch
