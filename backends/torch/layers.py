"""Changes to a decoder's layers: checkpointing, offloading, and skipping positions that are not read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lite_dil.backends.torch import packed_attention
from lite_dil.backends.torch.lora import Switch
from lite_dil.backends.torch.offload import ActivationOffload
from lite_dil.base.errors import UserError


class _Again(torch.autograd.Function):
    """Runs a function keeping only its input, and runs it again, with gradients, in the backward pass.

    Gradients of parameters go directly to their ``.grad``. Unlike torch's own checkpoint, the input can be offloaded, and the
    packed row and the active adapter of the forward pass are restored.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor | None,
        run: Callable[[Tensor], Tensor],
        config: Any,
        switch: Switch,
        store: ActivationOffload | None,
    ) -> Tensor:
        ctx.run, ctx.config, ctx.row, ctx.store = run, config, packed_attention.active(), store
        ctx.switch, ctx.adapter = switch, switch.on
        ctx.random = torch.get_rng_state(), torch.cuda.get_rng_state() if x.is_cuda else None
        if store is None:
            ctx.save_for_backward(x)
        else:
            ctx.number = store.put(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0] if ctx.store is None else ctx.store.get(ctx.number)
        x = x.detach().requires_grad_()
        devices = [x.device] if x.is_cuda else []
        computing, using = packed_attention.computing(ctx.config, ctx.row), ctx.switch.using(ctx.adapter)
        with torch.random.fork_rng(devices), computing, using, torch.enable_grad():
            host, device = ctx.random  # for the same dropout
            torch.set_rng_state(host)
            if device is not None:
                torch.cuda.set_rng_state(device)
            out = ctx.run(x)
        torch.autograd.backward(out, grads[0])
        return (x.grad if ctx.needs_input_grad[0] else None), None, None, None, None, None


def checkpoint(module: Any, config: Any, switch: Switch, store: ActivationOffload | None = None) -> None:
    """Make `module` keep only its first argument for the backward pass; `config` is the decoder's."""
    forward = module.forward

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(x, *args, **kwargs)
        rest: list[Any] | None = None  # older models return a tuple, of which the decoder uses only the first

        def run(x: Tensor) -> Tensor:
            nonlocal rest
            out = forward(x, *args, **kwargs)
            if isinstance(out, tuple):
                out, *rest = out
            return out

        if any(isinstance(other, Tensor) and other.requires_grad for other in (*args, *kwargs.values())):
            # Only the first argument's gradient would be returned.
            raise UserError(f"--gradient-checkpointing: {type(module).__name__} takes more than one input with a gradient")
        # The first layer's input comes from a frozen table and needs no gradient, so there would be no backward pass. An empty
        # tensor that needs one stands in: as a leaf of the graph, the input would stay on the GPU, offloaded or not.
        anchor = None if x.requires_grad else torch.empty(0, device=x.device, requires_grad=True)
        out = _Again.apply(x, anchor, run, config, switch, store)
        return out if rest is None else (out, *rest)

    module.forward = call


def layers_of(decoder: nn.Module) -> nn.ModuleList | None:
    """Return the decoder's layers, which transformers keeps in a list."""
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child)]
    same = [layers for layers in lists if len({type(layer) for layer in layers}) == 1]
    return same[0] if len(same) == 1 else None


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


def offload_embeddings(embedding: Any, device: torch.device) -> None:
    """Keep the embedding table in the computer's memory; only the rows looked up go to the device."""
    forward = embedding.forward

    def call(ids: Tensor) -> Tensor:
        return forward(ids.cpu()).to(device)

    embedding.forward = call
