"""A LoRA layer for MLX, and the layers that can have one."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np


class Shared:
    """State shared by all layers of an adapter.

    `strength` multiplies the adapter. `key` is the key of a pass's dropout masks: an array, so that a layer recomputed for the
    backward pass drops the same values, and a compiled step does not drop the same values every time. None drops nothing.
    """

    def __init__(self) -> None:
        self.strength = 1.0
        self.key: mx.array | None = None


class LoRALinear(nn.Module):
    """``W x + scale x A B``.

    Parameters are named and laid out as in mlx-lm: lora_a (in, rank), lora_b (rank, out).
    """

    def __init__(
        self, linear: nn.Module, a: np.ndarray, b: np.ndarray, scale: float, dropout: float, shared: Shared, index: int
    ) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a, self.lora_b = mx.array(a.T), mx.array(b.T)
        self.scale, self.dropout, self.shared, self.index = scale, dropout, shared, index

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the layer."""
        y, strength = self.linear(x), self.shared.strength
        if not strength:
            return y  # not y + 0 * z, which costs as much and lets the adapter's inf or NaN through
        z = times(self._dropped(x), self.lora_a) @ self.lora_b
        return y + (self.scale * strength * z).astype(x.dtype)

    def _dropped(self, x: mx.array) -> mx.array:
        if self.shared.key is None or not self.dropout:
            return x
        keep = 1 - self.dropout
        # A layer runs on prompts and responses separately: their sizes give them different masks.
        key = self.shared.key + mx.array([x.size, self.index], mx.uint32)
        mask = mx.random.bernoulli(keep, x.shape, key=key)
        return mask * x / keep


def times(x: mx.array, a: mx.array) -> mx.array:
    """Return ``x A`` in float32, and keep x for the backward pass in its own type.

    MLX by itself would keep the float32 copy that it multiplies, one per adapter, besides an x that is kept anyway.
    """
    return x @ a if x.dtype == mx.float32 else _widened_times(x, a)


@mx.custom_function
def _widened_times(x: mx.array, a: mx.array) -> mx.array:
    return x.astype(mx.float32) @ a


@_widened_times.vjp
def _widened_times_vjp(primals: tuple[mx.array, mx.array], slope: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    x, a = primals
    (late,) = mx.depends([x], [slope])  # else mx.compile uses, and so keeps, the forward pass's copy
    wide = late.astype(mx.float32).reshape(-1, x.shape[-1])
    return (slope @ a.T).astype(x.dtype), wide.T @ slope.reshape(-1, slope.shape[-1])


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Return the (out, in) shape of a linear layer or an embedding table, quantised or not."""
    outputs, inputs = module.weight.shape
    return outputs, inputs * 32 // module.bits if "scales" in module else inputs  # packed into 32-bit words


# Of a Mamba layer: torch's GPU kernels read these weights themselves, and adapters are the same on both backends.
_READ_BY_KERNELS = ("out_proj", "dt_proj")


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the (out, in) shape of each linear layer of the decoder's blocks that can have an adapter, by its name there."""
    inside = {id(module): module for layer in model.layers for module in layer.modules()}
    mambas = [module for module in inside.values() if "A_log" in module and "D" in module]
    left_out = {id(module[name]) for module in mambas for name in _READ_BY_KERNELS if name in module}
    return {
        name: shape_of(module)
        for name, module in model.named_modules()
        if id(module) in inside.keys() - left_out and isinstance(module, (nn.Linear, nn.QuantizedLinear))
    }
