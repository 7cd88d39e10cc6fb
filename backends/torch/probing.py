"""Testing a model on a few tokens before training, which shows what no config tells."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lite_dil.backends.options import EngineOptions
from lite_dil.backends.probes import compare_head, head_probe, layout_probe, tolerance
from lite_dil.backends.torch import out_of_memory, packed_attention
from lite_dil.backends.torch.head import vocabulary
from lite_dil.backends.torch.load import read_by_kernels
from lite_dil.backends.torch.peft_names import reloadable
from lite_dil.backends.torch.reading import StateReader
from lite_dil.backends.torch.row import Unsupported
from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.objectives.loss import SUMS

Logps = Callable[[Batch], np.ndarray]
REPEATED = "plain layout, each prompt computed for each of its answers"


def check_head(base: Any, reader: StateReader, logps: Logps, model: str, dtype_name: str) -> None:
    """Compare with the model's own logits, so that an unknown architecture is not trained wrongly.

    Args:
        logps: computes the log-probs of a batch's tokens with the reader.
    """
    batch = head_probe(vocabulary(reader.head))
    ids = np.concatenate([*batch.prompts, *batch.responses])
    here = logps(batch)
    with torch.no_grad():
        logits = base(input_ids=reader.tensor(ids[None, :-1]), use_cache=False).logits[0].float()
    own = logits.log_softmax(-1).gather(-1, reader.tensor(ids[1:, None]))[:, 0].cpu().numpy()
    compare_head(model, own, here, dtype_name)


def adaptable(base: Any, decoder: Any, linear: dict[str, tuple[int, int]], device: torch.device) -> dict[str, tuple[int, int]]:
    """Return those of the linear layers on which an adapter learns, and is found again once saved.

    The first is seen on a few tokens. Left out are layers whose weight the model reads itself (Jamba's `dt_proj`), routers
    that return more than one tensor (Llama 4), and layers on which the result does not depend (some of Gemma 3n's last ones):
    there an adapter gets no gradient. Of experts kept as separate layers a few tokens call only some: a layer that is not
    called stays if one with the same name but for its numbers is.
    """
    factors: dict[str, Tensor] = {}

    def weigh(name: str, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output
        factor = factors.setdefault(name, torch.zeros((), device=device, requires_grad=True))
        # Not the same for all channels: a norm behind the layer would take that back.
        channels = torch.arange(output.shape[-1], device=device, dtype=torch.float32).sin()
        return output * (1 + factor * channels).to(output.dtype)

    linear = {name: shape for name, shape in linear.items() if name not in read_by_kernels(base)}
    modules = {name: module for name, module in base.named_modules() if name in linear}
    hooks = [m.register_forward_hook(lambda module, args, out, name=name: weigh(name, out)) for name, m in modules.items()]
    ids = torch.arange(_TOKENS, device=device)[None]
    try:
        hidden = decoder.eval()(input_ids=ids, use_cache=False).last_hidden_state
        slopes = torch.autograd.grad(hidden.float().sin().sum(), list(factors.values()), allow_unused=True) if factors else ()
    finally:
        for hook in hooks:
            hook.remove()
    useless = {
        name for name, slope in zip(factors, slopes, strict=True) if slope is None or not (slope.is_meta or slope.item())
    }
    if len(useless) == len(factors):  # nothing was computed, as on a GPU that only stands in for one
        useless = set()
    seen = {_NUMBER.sub("#", name) for name in factors}
    kept = {name: shape for name, shape in linear.items() if _NUMBER.sub("#", name) in seen and name not in useless}
    return reloadable(base, kept)


_NUMBER, _TOKENS = re.compile(r"\d+"), 8


def choose_layout(
    base: Any,
    reader: StateReader,
    logps: Logps,
    training: EngineOptions,
    model: str,
    dtype_name: str,
    say: Callable[[str], None],
) -> str:
    """Choose the packed layout if it is right for this model, which is tested, not assumed.

    On CUDA its kernels are compiled here, which `say` announces. Returns a message if auto could not choose
    it, else "".
    """
    if training.unsloth:
        return f"{REPEATED}: unsloth's kernels support no other"
    if training.layout == "plain":
        return ""
    windowed = packed_attention.has_window(base.config.get_text_config(), training.max_length)
    reason = packed_attention.why_not(base, training.max_length)
    reason = reason or _packed_differs(reader, logps, dtype_name, say, windowed)
    if not reason:
        reader.layout = "packed"
    elif training.layout == "packed":
        raise UserError(f"--layout packed: not for {model}: {reason}; leave out --layout")
    return f"{REPEATED}: {reason}" if reason else ""


def _packed_differs(reader: StateReader, logps: Logps, dtype_name: str, say: Callable[[str], None], windowed: bool) -> str:
    """Compare log-probs and gradients of both layouts on a few tokens; return how they differ, or "".

    Args:
        windowed: whether some attention looks back less far than a sequence may be long, which a few tokens do not show.
    """
    if reader.last_layer < 0:
        return "its layers are unknown"
    batch = layout_probe(vocabulary(reader.head))
    expected, slopes = logps(batch), _gradient(reader, batch)
    reader.layout = "packed"
    packed_attention.windows.clear()
    try:
        if reader.device.type == "cuda":
            say("compiling FlexAttention for this GPU, which may take minutes the first time")
        difference = float(np.abs(logps(batch) - expected).max())
        turned = float((_gradient(reader, batch) - slopes).norm() / slopes.norm().clamp_min(1e-30))
    except Unsupported as error:
        return str(error)
    finally:
        reader.layout = "plain"
    if windowed and not packed_attention.windows - {None}:
        return "its attention does not say how far it looks back"
    if not difference < tolerance(dtype_name):
        return f"its log-probs differ from the plain layout's by {difference:.3g} nats"
    if not turned < tolerance(dtype_name):
        return f"its gradients differ from the plain layout's by {turned:.3g} of their norm"
    return ""


def _gradient(reader: StateReader, batch: Batch) -> Tensor:
    """Return the gradient of the sum of all log-probs by all trainable weights, as one float32 array on the CPU."""
    weights = [weight for weight in reader.decoder.parameters() if weight.requires_grad]

    def run() -> Tensor:
        if weights:
            reader.logps(batch, SUMS).sum().backward()
        found = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        return torch.cat([torch.zeros(0), *(x.flatten().float().cpu() for x in found)])

    try:
        return out_of_memory.whole("the comparison of layouts", reader.device, run)
    finally:
        for weight in weights:
            weight.grad = None
