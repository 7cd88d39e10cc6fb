"""Changes to a decoder's layers: checkpointing, offloading, and skipping positions that are not read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from lite_dil.backends.torch import packed_attention
from lite_dil.backends.torch.lora import Switch
from lite_dil.backends.torch.offload import ActivationOffload
from lite_dil.base.errors import UserError


class _Again(torch.autograd.Function):
    """Runs a function keeping only its inputs, and runs it again, with gradients, in the backward pass.

    Gradients of parameters go directly to their ``.grad``. Unlike torch's own checkpoint, the first input can be offloaded,
    and the packed row and the active adapter of the forward pass are restored.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor | None,
        run: Callable[..., Tensor],
        config: Any,
        switch: Switch,
        store: ActivationOffload | None,
        *others: Tensor,
    ) -> Tensor:
        ctx.run, ctx.config, ctx.row, ctx.store = run, config, packed_attention.active(), store
        ctx.switch, ctx.adapter = switch, switch.on
        ctx.random = torch.get_rng_state(), torch.cuda.get_rng_state() if x.is_cuda else None
        if store is None:
            ctx.save_for_backward(x, *others)
        else:
            ctx.save_for_backward(*others)
            ctx.number = store.put(x)
        return run(x, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors if ctx.store is None else (ctx.store.get(ctx.number), *ctx.saved_tensors)
        x, *others = (value.detach().requires_grad_() for value in (x, *others))
        devices = [x.device] if x.is_cuda else []
        computing, using = packed_attention.computing(ctx.config, ctx.row), ctx.switch.using(ctx.adapter)
        with torch.random.fork_rng(devices), computing, using, torch.enable_grad():
            host, device = ctx.random  # for the same dropout
            torch.set_rng_state(host)
            if device is not None:
                torch.cuda.set_rng_state(device)
            out = ctx.run(x, *others)
        torch.autograd.backward(out, grads[0])
        first = x.grad if ctx.needs_input_grad[0] else None
        return first, None, None, None, None, None, *(other.grad for other in others)


def checkpoint(module: Any, config: Any, switch: Switch, store: ActivationOffload | None = None) -> None:
    """Make `module` keep only its arguments for the backward pass; `config` is the decoder's."""
    forward = module.forward

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(x, *args, **kwargs)
        if any(isinstance(value, MutableMapping) for value in (*args, *kwargs.values())):
            if store is not None:
                raise UserError("--offload-activations: this model's layers share keys and values; leave it out")
            return _shared(forward, config, switch, x, *args, **kwargs)
        rest: list[Any] | None = None  # older models return a tuple, of which the decoder uses only the first
        # Besides its input, a layer may have others with a gradient, as Gemma 4's with their part of the embeddings.
        others = {
            place: value
            for place, value in (*enumerate(args), *kwargs.items())
            if isinstance(value, Tensor) and value.requires_grad
        }

        def run(x: Tensor, *given: Tensor) -> Tensor:
            nonlocal rest
            now = dict(zip(others, given, strict=True))
            out = forward(
                x,
                *(now.get(i, value) for i, value in enumerate(args)),
                **{name: now.get(name, value) for name, value in kwargs.items()},
            )
            if isinstance(out, tuple):
                out, *rest = out
            return out

        # The first layer's input comes from a frozen table and needs no gradient, so there would be no backward pass. An empty
        # tensor that needs one stands in: as a leaf of the graph, the input would stay on the GPU, offloaded or not.
        anchor = None if x.requires_grad else torch.empty(0, device=x.device, requires_grad=True)
        out = _Again.apply(x, anchor, run, config, switch, store, *others.values())
        return out if rest is None else (out, *rest)

    module.forward = call


def _shared(forward: Callable[..., Any], config: Any, switch: Switch, *args: Any, **kwargs: Any) -> Any:
    """Compute a layer that passes tensors to later ones in a dictionary (Gemma 4's keys and values), by torch's checkpoint.

    Such tensors must be part of the graph, which they are only there.
    """
    row, adapter = packed_attention.active(), switch.on

    @contextmanager
    def again() -> Iterator[None]:
        with packed_attention.computing(config, row), switch.using(adapter):
            yield

    return torch_checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()), **kwargs)


def layers_of(decoder: nn.Module) -> nn.ModuleList | None:
    """Return the decoder's layers, which transformers keeps in a list; those of a hybrid are of several kinds."""
    lists = {name: child for name, child in decoder.named_children() if isinstance(child, nn.ModuleList) and len(child)}
    if len(lists) == 1:
        return next(iter(lists.values()))
    return next((lists[name] for name in ("layers", "h", "blocks") if name in lists), None)


def skip_unread(decoder: Any, last_layer: Any) -> None:
    """In packed rows, compute the last layer's MLP and the last norm only for positions that are read.

    The MLP's unread rows become 0, and the decoder returns (1, n, width), the hidden states of the row's `index`.
    """
    mlp: Any = getattr(last_layer, "mlp", None)
    if isinstance(mlp, nn.Module):
        forward = mlp.forward

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            row = packed_attention.active()
            if row is None:
                return forward(x, *args, **kwargs)
            out = forward(x[:, row.read], *args, **kwargs)
            return x.new_zeros(x.shape).index_copy(1, row.read, out)

        mlp.forward = call
    norm = decoder.norm.forward
    reached = False  # a decoder may use its last norm elsewhere too, as NanoChat does on the embeddings

    def reach(*_: Any) -> None:
        nonlocal reached
        reached = True

    def normed(x: Tensor) -> Tensor:
        nonlocal reached
        row, last = packed_attention.active(), reached
        reached = False
        return norm(x[:, row.index] if row is not None and last else x)

    last_layer.register_forward_pre_hook(reach)
    decoder.norm.forward = normed


def offload_embeddings(base: Any, head: Any, device: torch.device) -> None:
    """Keep the embedding table in the computer's memory; only the rows looked up go to the device.

    Raises UserError if the table is the output head too, which the device needs.
    """
    embedding = base.get_input_embeddings()
    if getattr(head, "weight", None) is embedding.weight:
        raise UserError(
            "--offload-embeddings: the embedding table is also the output head, needed on the GPU: add --head-bits 8 or 4"
        )
    forward = embedding.forward

    def call(ids: Tensor) -> Tensor:
        return forward(ids.cpu()).to(device)

    embedding.forward = call
