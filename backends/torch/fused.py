"""LoRA, gated MLP and RMS norm as single autograd functions that keep only what their backward passes need.

The base is frozen, so its weights never need gradients, and stock modules keep much that is cheap to recompute: float32
copies inside the norms, a second copy of each input for the adapter, the product of gate and up. `install` replaces the
forward pass of known modules, checks each kind against the stock module, and leaves all others unchanged.

Each forward pass looks up the active adapter and saves what the backward pass needs: by then another may be active.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from lite_dil.backends.limits import MLP_TILE, NORM_TILE, slices
from lite_dil.backends.torch.lora import PEFT_POLICY, PEFT_REFERENCE


@dataclass(frozen=True)
class Frozen:
    """A frozen linear layer, possibly packed to 4 bits, and the scale of its active adapter in this pass."""

    layer: Any
    scale: float = 0.0

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the (out, in) weight, unpacked."""
        weight = self.layer.weight
        if (state := getattr(weight, "quant_state", None)) is None:
            return weight
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state).to(dtype)


_Adapter = tuple[Tensor | None, Tensor | None]  # A (rank, in) and B (out, rank), or two None if it is off
_NONE: _Adapter = (None, None)


def _linear(x: Tensor, frozen: Frozen, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return ``W x + scale B A x`` and ``A x``, for x of shape (tokens, in)."""
    y = F.linear(x, frozen.weight(x.dtype), frozen.layer.bias)
    if a is None or b is None:
        return y, None
    low = F.linear(x, a.to(x.dtype))
    return y.addmm_(low, b.to(x.dtype).t(), alpha=frozen.scale), low


def _linear_backward(
    grad: Tensor, x: Tensor, low: Tensor | None, frozen: Frozen, a: Tensor | None, b: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x, A and B; `low` is ``A x``. A's and B's are None if A and B are."""
    grad_x = grad @ frozen.weight(grad.dtype)
    if a is None or b is None or low is None:
        return grad_x, None, None
    grad_low = (grad @ b.to(grad.dtype)).mul_(frozen.scale)
    grad_x.addmm_(grad_low, a.to(grad.dtype))
    return grad_x, (grad_low.t() @ x).to(a.dtype), (grad.t() @ low).mul_(frozen.scale).to(b.dtype)


class _LoRA(torch.autograd.Function):
    """``W x + scale B A x``; keeps x and A x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Frozen, a: Tensor | None, b: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, low = _linear(rows, frozen, a, b)
        ctx.save_for_backward(x, low, a, b)
        ctx.frozen = frozen
        # Not a view: some models (Gemma 3n) change a projection in place, which autograd forbids for a view made here.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        grad_x, grad_a, grad_b = _linear_backward(grad, rows, low, ctx.frozen, a, b)
        return grad_x.view(x.shape), None, grad_a, grad_b


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    ),
}


@dataclass(frozen=True)
class GatedMLP:
    """``down(act(gate x) * up x)``."""

    gate: Frozen
    up: Frozen
    down: Frozen
    activation: str
    keep: bool  # keep gate x, up x and the low-rank products; else only x, from which the backward pass recomputes them

    def tiles(self, tokens: int) -> list[slice]:
        """Return the pieces in which tokens are computed, so that only one piece of what is not kept exists at a time."""
        return list(slices(tokens, max(16, MLP_TILE // self.gate.layer.out_features)))


class _GatedMLP(torch.autograd.Function):
    """Keeps x, gate x, up x and the low-rank products, or only x; the activation and its product are always recomputed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: GatedMLP, *adapters: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        activation, inside = ACTIVATIONS[mlp.activation][0], _gate_and_up(rows, mlp, adapters) if mlp.keep else ()
        results, lows = [], []
        for tile in mlp.tiles(len(rows)):
            gate, _, up, _ = _part(inside, tile) if inside else _gate_and_up(rows[tile], mlp, adapters)
            y, low = _linear(activation(gate).mul_(up), mlp.down, *adapters[4:])
            del gate, up  # else they would live until the next ones are made
            results.append(y)
            lows.append(low)
        out = _joined(results)
        if inside:
            inside = (*inside, _joined(lows))
        ctx.save_for_backward(x, *adapters, *inside)
        ctx.mlp = mlp
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mlp: GatedMLP = ctx.mlp
        x, *rest = ctx.saved_tensors
        adapters, inside = rest[:6], rest[6:]
        activation, activation_backward = ACTIVATIONS[mlp.activation]
        rows, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        grad_x = torch.empty_like(rows)
        sums: list[Tensor | None] = [None] * 6
        for tile in mlp.tiles(len(rows)):
            part = rows[tile]
            gate, gate_low, up, up_low, *kept = _part(inside, tile) if inside else _gate_and_up(part, mlp, adapters)
            active = activation(gate)
            product = active * up
            down_low = kept[0] if kept else None
            if not inside and adapters[4] is not None:
                down_low = F.linear(product, adapters[4].to(product.dtype))
            grad_product, *grad_down = _linear_backward(grad[tile], product, down_low, mlp.down, *adapters[4:])
            del product
            grad_up = active.mul_(grad_product)
            grad_gate = activation_backward(grad_product.mul_(up), gate)
            part_x, *grad_g = _linear_backward(grad_gate, part, gate_low, mlp.gate, *adapters[:2])
            del grad_gate, grad_product
            other_x, *grad_u = _linear_backward(grad_up, part, up_low, mlp.up, *adapters[2:4])
            grad_x[tile] = part_x.add_(other_x)
            del gate, up, active, grad_up, part_x, other_x  # else they would live until the next ones are made
            for i, new in enumerate((*grad_g, *grad_u, *grad_down)):
                total = sums[i]
                sums[i] = new if total is None or new is None else total.add_(new)
        return grad_x.view(x.shape), None, *sums


def _gate_and_up(rows: Tensor, mlp: GatedMLP, adapters: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Return gate x, its low-rank product, up x, and its low-rank product."""
    return *_linear(rows, mlp.gate, *adapters[:2]), *_linear(rows, mlp.up, *adapters[2:4])


def _part(arrays: Sequence[Tensor | None], rows: slice) -> tuple[Any, ...]:
    return tuple(None if x is None else x[rows] for x in arrays)


def _joined(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)


class _RMSNorm(torch.autograd.Function):
    """``w * x / rms(x)``, rounded as in the stock modules; keeps x and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, gemma: bool) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, scale = torch.empty_like(rows), rows.new_empty(len(rows), 1, dtype=torch.float32)
        for part in _pieces(rows):
            wide = rows[part].float()
            scale[part] = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
            wide = wide * scale[part]
            out[part] = wide.mul_(1.0 + weight.float()) if gemma else weight * wide.to(x.dtype)
        ctx.save_for_backward(x, weight, scale)
        ctx.gemma = gemma
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        rows, back = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
        out = torch.empty_like(rows)
        factor = 1.0 + weight.float() if ctx.gemma else weight.float()
        for part in _pieces(rows):
            grad, normed = back[part].float() * factor, rows[part].float() * scale[part]
            # d (x / rms) / dx = (1 - n n^T / width) / rms, with n = x / rms
            out[part] = grad.addcmul_(normed, (grad * normed).mean(-1, keepdim=True), value=-1).mul_(scale[part])
        return out.view(x.shape), None, None, None


def _pieces(rows: Tensor) -> Iterator[slice]:
    """Yield pieces of the rows with small float32 copies."""
    return slices(len(rows), NORM_TILE[rows.device.type] // rows.shape[-1])


def _name_of(layer: LoraLayer) -> str | None:
    """Return the PEFT name of this layer's active adapter, or None."""
    name = layer._active_adapter[0]
    return None if layer._disable_adapters or name not in layer.lora_A else name


def _now(layer: Any) -> tuple[Frozen, _Adapter]:
    """Return a linear layer, adapted or not, and its active adapter."""
    if not isinstance(layer, LoraLayer):
        return Frozen(layer), _NONE
    name = _name_of(layer)
    if name is None:
        return Frozen(layer.base_layer), _NONE
    a: Any = layer.lora_A[name]
    b: Any = layer.lora_B[name]
    return Frozen(layer.base_layer, layer.scaling[name]), (a.weight, b.weight)


def _drops(layer: Any) -> bool:
    """Return whether the active adapter has dropout, which PEFT must compute.

    The base and the frozen initial adapter are computed as the policy is, so that their log-probs match to the bit.
    """
    if not isinstance(layer, LoraLayer):
        return False
    name = _name_of(layer)
    of = PEFT_POLICY if name in (None, PEFT_REFERENCE) else name
    return of in layer.lora_dropout and not isinstance(layer.lora_dropout[of], nn.Identity)


def _is_linear(layer: Any) -> bool:
    layer = layer.base_layer if isinstance(layer, LoraLayer) else layer
    if type(layer) is nn.Linear:
        return True
    return type(layer).__name__ == "Linear4bit" and type(layer).__module__.startswith("bitsandbytes")


def _lora_forward(layer: Any) -> Callable[..., Tensor]:
    stock = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _drops(layer):
            return stock(x, *args, **kwargs)
        if _name_of(layer) is None and PEFT_POLICY not in layer.lora_A:  # as before another adapter was added to this layer
            return layer.base_layer(x)
        frozen, adapter = _now(layer)
        return _LoRA.apply(x, frozen, *adapter)

    return forward


def _mlp_forward(module: Any, activation: str, recompute: bool) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        gate, up, down = map(_now, (module.gate_proj, module.up_proj, module.down_proj))
        keep = torch.is_grad_enabled() and not recompute
        return _GatedMLP.apply(x, GatedMLP(gate[0], up[0], down[0], activation, keep), *gate[1], *up[1], *down[1])

    return forward


def _or_stock(module: Any, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a forward that uses the MLP's own if the active adapter has dropout in it."""
    stock = module.forward

    def choose(x: Tensor) -> Tensor:
        drops = any(map(_drops, (module.gate_proj, module.up_proj, module.down_proj)))
        return stock(x) if drops else forward(x)

    return choose


def _norm_forward(module: Any, eps: float, gemma: bool) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, module.weight, eps, gemma)

    return forward


def _activation(module: Any) -> str | None:
    """Return the name of the activation that `module` computes, found by testing."""
    x = torch.linspace(-6, 6, 97)
    if isinstance(module, nn.Module) and not any(True for _ in module.parameters()):
        for name, (function, _) in ACTIVATIONS.items():
            if torch.equal(module(x), function(x)):
                return name
    return None


def _gated_activation(module: Any) -> str | None:
    """Return the activation of a gated MLP of plain linear layers, or None for other modules."""
    if [name for name, _ in module.named_children()] != ["gate_proj", "up_proj", "down_proj", "act_fn"]:
        return None
    linear = all(map(_is_linear, (module.gate_proj, module.up_proj, module.down_proj)))
    return _activation(module.act_fn) if linear else None


def _norm(module: Any) -> tuple[float, bool] | None:
    """Return an RMS norm's epsilon and whether its weight is stored minus one, found by testing."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weights = [name for name, _ in module.named_parameters()]
    if weights != ["weight"] or module.weight.ndim != 1 or not isinstance(eps, float) or any(True for _ in module.children()):
        return None
    module = _with_numbers(module)
    weight = module.weight
    x = torch.linspace(-3, 5, 4 * len(weight)).reshape(4, -1).to(weight)
    expected = module(x).cpu()
    for gemma in (False, True):
        if torch.equal(expected, _RMSNorm.apply(x, weight, eps, gemma).cpu()):
            return eps, gemma
    return None


@torch.no_grad()
def install(decoder: nn.Module, dtype: torch.dtype, recompute_mlp: bool) -> None:
    """Replace the forward pass of known modules in `decoder`, which computes in `dtype`.

    A module of an unknown kind, or one that computes something else than its kind does, keeps its own forward pass, and so
    does every module while an adapter with dropout in it is active.

    Args:
        recompute_mlp: keep only an MLP's input, and recompute the rest for the backward pass. If an MLP keeps its
            own forward pass, the caller does this.
    """
    decoder.eval()  # dropout would make them differ
    same: dict[type, bool] = {}  # layers of a model compute alike, and unpacking 4 bits is slow
    modules: list[Any] = list(decoder.modules())
    for module in modules:
        if hasattr(module, "gate_proj"):
            if (activation := _gated_activation(module)) is None:
                continue
            forward, kind = _mlp_forward(module, activation, recompute_mlp), type(module)
            if kind not in same:
                tested = _with_numbers(module)
                base = _now(tested.gate_proj)[0].layer
                same[kind] = _same(tested, _mlp_forward(tested, activation, recompute_mlp), base.in_features, dtype)
            if same[kind]:
                module.forward = _or_stock(module, forward)
        elif type(module).__name__.endswith("RMSNorm") and (norm := _norm(module)) is not None:
            module.forward = _norm_forward(module, *norm)
    install_lora(decoder)


def install_lora(decoder: nn.Module) -> None:
    """Replace the forward pass of the adapted layers that still have their own: all, or those that an adapter added."""
    layers: list[Any] = [module for module in decoder.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        if "forward" not in vars(layer) and _is_linear(layer):
            layer.forward = _lora_forward(layer)


def _with_numbers(module: Any) -> Any:
    """Return the module itself, or of one on the device "meta" a copy with numbers, in which linear layers are small."""
    if not next(module.parameters()).is_meta:
        return module
    made = copy.deepcopy(module)
    vars(made).pop("forward", None)  # checkpointed, it is the module's own
    for name, (outputs, inputs) in {"gate_proj": (8, 6), "up_proj": (8, 6), "down_proj": (6, 8)}.items():
        if hasattr(made, name):
            setattr(made, name, nn.Linear(inputs, outputs, dtype=next(module.parameters()).dtype))
    made.to_empty(device="cpu")
    for weight in made.parameters():
        weight.copy_(torch.linspace(-1, 2, weight.numel()).view(weight.shape))
    return made


def _same(module: Any, forward: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype) -> bool:
    """Return whether a replacement computes the same as the module, up to rounding."""
    device = next(module.parameters()).device
    x = torch.sin(torch.arange(3 * width, device=device)).reshape(1, 3, width).to(dtype)
    expected, got = module(x).float(), forward(x).float()
    scale, difference = (value.abs().max().item() for value in (expected, expected - got))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    return math.isfinite(scale) and difference <= tolerance * max(scale, 1e-6)
