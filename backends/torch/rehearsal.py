"""Rehearsing a training step on torch's device "meta": the code of the real step, on tensors that have no memory but a size.

The live bytes of their storages are counted, as an allocator would. Of a decoder's layers the first of each kind is computed,
and the others are stood in for by it. What numbers decide is decided as for ordinary ones: no row has padding, and of
grouped experts all tokens are computed.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lite_dil.backends.limits import NORM_TILE
from lite_dil.backends.torch import packed_attention
from lite_dil.backends.torch.arrange import arrange
from lite_dil.backends.torch.layers import layers_of
from lite_dil.backends.torch.load import decoder_of, keeps_float32, linear_layers
from lite_dil.backends.torch.lora import Switch, add_lora
from lite_dil.backends.torch.probing import adaptable
from lite_dil.backends.torch.reading import StateReader, ends_of
from lite_dil.backends.torch.row import PackedRow, Scores, Unsupported
from lite_dil.backends.types import POLICY
from lite_dil.batching.batch import Batch
from lite_dil.data.encoder import Example
from lite_dil.models.adapters import Adapter
from lite_dil.models.listing import LayerTurn, Rehearsal, StepProfile, layer_number
from lite_dil.models.logits import LogitTransform

_META = torch.device("meta")
_NAME = "lite_dil_rehearsed"


class Gauge(TorchDispatchMode):
    """Counts the live bytes of storages made on the device "meta" inside the block; `peak` may be set back.

    Args:
        model: its weights are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = self.operations = 0
        tensors = [*model.parameters(), *model.buffers()]
        self._weights = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return True  # no padding, no second sequence in a row
        if func is torch.ops.aten._grouped_mm.default:  # whose own "meta" wants bfloat16
            return self._counted(args[0].new_empty(args[0].shape[0], args[1].shape[-1]))
        return self._counted(func(*args, **(kwargs or {})))

    def _counted(self, result: Any) -> Any:
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or not tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._seen or key in self._weights:
                continue
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size).atexit = False
        return result

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class _Fused(torch.autograd.Function):
    """Attention by a GPU's kernels: keeps queries, keys, values, the result and a float32 for each query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *kept: Tensor) -> Tensor:
        result = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, result, q.new_empty(q.shape[:3], dtype=torch.float32), *kept)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, row, *kept = ctx.saved_tensors
        delta = torch.empty_like(row)
        made = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del delta
        return *made, *(None for _ in kept)


def _attend(q: Tensor, k: Tensor, v: Tensor, row: PackedRow, scores: Scores) -> Tensor:
    return _Fused.apply(q, k, v).transpose(1, 2)


class _Kernel(TorchFunctionMode):
    """Takes the attention that torch would take on the device; on "meta" it takes the one with the whole score matrix."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None and attn_mask.requires_grad:  # Doge's; torch then keeps more than is known here
            raise Unsupported("its attention computes a mask with a gradient")
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)  # torch makes one of numbers
        if self.device == "cuda":
            return _Fused.apply(q, k, v, *(() if attn_mask is None else (attn_mask,)))
        if q.shape[-1] == v.shape[-1]:
            causal = {"attn_mask": attn_mask, "scale": scale}
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, **causal)[0]
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


@contextmanager
def _plain_attention(config: Any, device: str) -> Iterator[None]:
    """Let a model that attends by SDPA do so as on `device` inside the block; a rehearsal's backward pass leaves all modes."""

    def attend(*args: Any, **kwargs: Any) -> Any:
        with _Kernel(device):
            return sdpa_attention_forward(*args, **kwargs)

    if config._attn_implementation != "sdpa":
        yield
        return
    ALL_ATTENTION_FUNCTIONS.register(_NAME, attend)  # for all objects of the class: Doge's code has one of its own
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, sdpa_mask)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
        del ALL_ATTENTION_FUNCTIONS._global_mapping[_NAME], ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[_NAME]


@contextmanager
def _on(device: str, model: nn.Module, config: Any) -> Iterator[Gauge]:
    """Compute on "meta" as on `device` inside the block."""
    NORM_TILE["meta"] = NORM_TILE[device]
    if device == "cuda":
        packed_attention.kernels["meta"] = _attend
    try:
        with _plain_attention(config, device), Gauge(model) as gauge:
            yield gauge
    finally:
        del NORM_TILE["meta"]
        packed_attention.kernels.pop("meta", None)


class Rehearser:
    """Rehearses steps of a model on "meta".

    Args:
        base: the model, without towers. `stem` is the name of its list of layers.
    """

    def __init__(self, base: Any) -> None:
        self.base, self.decoder = base, decoder_of(base)
        listed = layers_of(self.decoder)
        self.layers, self.stem = list(listed or ()), next((name for name, m in base.named_modules() if m is listed), "")
        self._kinds: list[Any] = [None] * len(self.layers)
        self._tuples: list[bool] = [False] * len(self.layers)
        self._acts: dict[Rehearsal, _Act] = {}
        self._found: dict[Rehearsal, StepProfile] = {}

    def adaptable(self) -> dict[str, tuple[int, int]]:
        """Return the linear layers that may have an adapter, as training finds them; what layers are alike is seen here."""
        before: dict[int, Any] = {}
        types = getattr(self.decoder.config, "layer_types", None) or [None] * len(self.layers)

        def shared(args: Any, kwargs: Any) -> list[Any]:
            mappings = [value for value in (*args, *kwargs.values()) if isinstance(value, MutableMapping)]
            return [(key, id(value)) for mapping in mappings for key, value in mapping.items()]

        def enter(number: int, layer: Any, args: Any, kwargs: Any) -> None:
            before[number] = shared(args, kwargs)

        def leave(number: int, layer: Any, args: Any, kwargs: Any, out: Any) -> None:
            parts = tuple((name, type(part).__name__) for name, part in layer.named_modules())
            sizes = tuple(tuple(weight.shape) for weight in layer.parameters())
            writes = shared(args, kwargs) != before[number]  # keys and values for later layers (Gemma 4)
            self._kinds[number] = parts, sizes, types[number] if number < len(types) else None, writes
            self._tuples[number] = isinstance(out, tuple)

        hooks = []
        for number, layer in enumerate(self.layers):
            hooks.append(layer.register_forward_pre_hook(partial(enter, number), with_kwargs=True))
            hooks.append(layer.register_forward_hook(partial(leave, number), with_kwargs=True))
        try:
            with _on("cuda", self.base, self.decoder.config):
                return adaptable(self.base, self.decoder, linear_layers(self.base), _META)
        finally:
            for hook in hooks:
                hook.remove()

    def packs_rows(self) -> bool:
        """Return whether a packed row passes through the model's attention."""
        reader = StateReader(self.decoder, None, LogitTransform(), _META)
        reader.layout = "packed"
        packed_attention.windows.clear()
        try:
            with _on("cuda", self.base, self.decoder.config), torch.no_grad():
                reader.states(_batch((2, 2), ((2, 3), (2, 2))), lambda layout: layout.hidden_index)
        except Unsupported:
            return False
        windowed = packed_attention.has_window(self.base.config.get_text_config(), 2**62)
        return bool(packed_attention.windows) and (not windowed or bool(packed_attention.windows - {None}))

    def rehearse(self, of: Rehearsal) -> StepProfile:
        """Return the decoder's memory in a step."""
        if of not in self._found:
            setting = replace(of, prompts=(), responses=())
            if setting not in self._acts:
                self._acts = {setting: _Act(self, setting)}
            self._found[of] = self._acts[setting].play(of)
        return self._found[of]

    def alike(self, targets: tuple[str, ...]) -> tuple[int, ...]:
        """Return for each layer the number of the one that stands for it."""
        adapted: dict[int, list[str]] = {}
        for name in targets:
            number = layer_number(name, self.stem)
            adapted.setdefault(number, []).append(name.removeprefix(f"{self.stem}.{number}."))
        first: dict[Any, int] = {}
        found = []
        for number in range(len(self.layers)):
            kind = self._kinds[number], tuple(sorted(adapted.get(number, ())))
            ends = number in (0, len(self.layers) - 1)  # the first layer's input has no gradient, the last one skips positions
            found.append(number if ends else first.setdefault(kind, number))
        return tuple(found)

    def returns_tuple(self, number: int) -> bool:
        """Return whether a layer returns a tuple."""
        return self._tuples[number]


class _Act:
    """A copy of the model, adapted and arranged for one setting."""

    def __init__(self, rehearser: Rehearser, of: Rehearsal) -> None:
        _leave_graph(rehearser.base)
        base, dtype = copy.deepcopy(rehearser.base), getattr(torch, of.dtype)
        for name, weight in base.named_parameters():
            if not keeps_float32(base, name, dtype):
                weight.data = weight.data.to(dtype)
        self.stands_for = rehearser.alike(of.targets)
        self.shown = sorted(set(self.stands_for))
        shapes = linear_layers(base)
        made = {
            name: (np.zeros((of.rank, shapes[name][1]), np.float32), np.zeros((shapes[name][0], of.rank), np.float32))
            for name in of.targets
            if layer_number(name, rehearser.stem) in (*self.shown, -1)
        }
        with _META:
            model: Any = add_lora(base, POLICY, Adapter(of.rank, 1.0, made), of.dropout)
        self.model, self.decoder, self.layers = model, decoder_of(base), layers_of(decoder_of(base)) or ()
        self.weights = [weight for name, weight in model.named_parameters() if "lora_" in name]
        model.requires_grad_(False)
        for weight in self.weights:
            weight.requires_grad_()
        switch = Switch()
        switch.add(model, POLICY)
        mode = "off" if of.mode == "none" else of.mode
        last, _ = arrange(self.decoder, type(base).__name__, mode, dtype if of.fused else None, switch)
        switch.training_mode(model, everything=False)
        self.reader = StateReader(self.decoder, None, LogitTransform(), _META)
        self.reader.layout, self.reader.last_layer = of.layout, last
        for number, layer in enumerate(self.layers):
            if number not in self.shown:
                layer.forward = partial(_pass, rehearser.returns_tuple(number))

    def play(self, of: Rehearsal) -> StepProfile:
        """Compute a step over random tokens of these lengths."""
        batch, grads = _batch(of.prompts, of.responses), torch.no_grad() if of.mode == "none" else nullcontext()
        with _on(of.device, self.model, self.decoder.config) as gauge, grads:
            record = _Record(gauge, self.weights)
            hooks = [hook for number in self.shown for hook in record.watch(number, self.layers[number])]
            try:
                hidden = self.reader.states(batch, ends_of if of.scores else lambda layout: layout.hidden_index)[0]
                record.forward_done()
                if of.mode != "none":
                    total = hidden.sum()
                    del hidden
                    total.backward()
                    record.close()
            finally:
                for hook in hooks:
                    hook.remove()
                for weight in self.weights:
                    weight.grad = None
        if of.mode == "none":
            return StepProfile(max(record.forward.values()), (), gauge.operations)
        turns = {
            number: LayerTurn(record.keeps[number], record.forward[number], record.over.get(number, 0))
            for number in self.shown
        }
        return StepProfile(record.around, tuple(turns[number] for number in self.stands_for), gauge.operations)


class _Record:
    """Live bytes at the borders of layers.

    Attributes:
        keeps: what each layer's forward pass leaves.
        forward: the peak during each layer's forward pass, less what the layers before it keep.
        around: what is live after the forward pass besides that.
        over: the peak during each layer's backward pass, less what it and the layers before it keep, `around`, and gradients.
    """

    def __init__(self, gauge: Gauge, weights: list[Tensor]) -> None:
        self.gauge, self.weights = gauge, weights
        self.keeps: dict[int, int] = {}
        self.forward: dict[int, int] = {}
        self.over: dict[int, int] = {}
        self.around = 0
        self._open: int | None = None
        self._floor = 0

    def watch(self, number: int, layer: nn.Module) -> list[Any]:
        """Register hooks on a layer and return them."""

        def enter(*_: Any) -> None:
            self.forward[number] = -sum(self.keeps.values())
            self.keeps[number], self.gauge.peak = -self.gauge.live, self.gauge.live

        def leave(_: Any, args: Any, out: Any) -> None:
            self.keeps[number] += self.gauge.live
            self.forward[number] += self.gauge.peak
            result = out[0] if isinstance(out, tuple) else out
            if result.requires_grad:
                result.register_hook(partial(self._begin, number))

        return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]

    def forward_done(self) -> None:
        """Note what the forward pass leaves."""
        self.around = self.gauge.live - sum(self.keeps.values())

    def _begin(self, number: int, _: Tensor) -> None:
        """Begin a layer's backward pass, which ends the one before."""
        self.close()
        self._open, self.gauge.peak = number, self.gauge.live
        gradients = sum(weight.grad.nbytes for weight in self.weights if weight.grad is not None)
        self._floor = self.around + sum(size for other, size in self.keeps.items() if other <= number) + gradients

    def close(self) -> None:
        """End the current layer's backward pass."""
        if self._open is not None:
            self.over[self._open] = self.gauge.peak - self._floor


def _leave_graph(model: nn.Module) -> None:
    """Detach what modules keep of an earlier pass, as RecurrentGemma's do their state: a part of a graph cannot be copied."""
    for module in model.modules():
        own = vars(module)
        own.update({name: v.detach() for name, v in own.items() if isinstance(v, Tensor) and not v.is_leaf})


def _pass(as_tuple: bool, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return (x,) if as_tuple else x


def _batch(prompts: tuple[int, ...], responses: tuple[tuple[int, ...], ...]) -> Batch:
    examples = [
        Example((0,) * prompt, tuple((0,) * length for length in lengths), tuple(1 - 2 * (i % 2) for i in range(len(lengths))))
        for prompt, lengths in zip(prompts, responses, strict=True)
    ]
    return Batch.of(examples)
