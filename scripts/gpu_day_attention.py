"""scripts/gpu_day.py: the attention of a packed row, FlexAttention on a GPU, against the textbook in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from gpu_day_models import Place
from gpu_day_record import Check, Finding, at_most

from lite_dil.batching.batch import Batch
from lite_dil.batching.layouts import Packed, packed

WINDOW, CAP = 100, 3.0  # of tokens and of scores, small enough to matter in each row but the shortest
HEADS, KEYS = 4, 2
SHORT, MIDDLE, LONG = ((5, 9, 3), (30, 1, 17)), ((150, 60, 90),), ((700, 400, 300), (500, 100, 200))
Kind = tuple[int, bool, bool]  # head width, window, soft cap
# What shipped models have: Llama 3, Llama 3.2 1B, Gemma 2, Gemma 3, Mistral, Phi 3, Phi 2, DeepSeek, Gemma 4.
SHIPPED: list[Kind] = [
    *((128, False, False), (64, False, False), (256, True, True), (256, False, True), (256, True, False), (256, False, False)),
    *((128, True, False), (96, True, False), (80, False, False), (192, False, False), (512, False, False)),
]
ALL: list[Kind] = [
    (w, window, cap) for w in (64, 80, 96, 128, 192, 256, 512) for window in (False, True) for cap in (False, True)
]


def checks() -> tuple[list[Check], list[Check]]:
    """Return the checks of kinds that shipped models have, in the device's own type, and of all others."""
    shipped = [Check(name_of(kind, "16 bits"), partial(check, kind, "", (SHORT, MIDDLE, LONG)), 12) for kind in SHIPPED]
    others = [Check(name_of(kind, "16 bits"), partial(check, kind, "", (MIDDLE,)), 7) for kind in ALL if kind not in SHIPPED]
    half = [
        Check(name_of(kind, "fp16"), partial(check, kind, "float16", (MIDDLE,)), 7, cuda=True) for kind in (*SHIPPED, *ALL)
    ]
    return shipped, [*others, *{check.name: check for check in half}.values()]


def name_of(kind: Kind, dtype: str) -> str:
    width, window, cap = kind
    return f"attention {width}{', window' * window}{', soft cap' * cap}, {dtype}"


def check(kind: Kind, dtype: str, rows: Sequence[Sequence[tuple[int, int, int]]], place: Place) -> list[Finding]:
    """Compare result and gradients on rows of these lengths."""
    import torch

    torch.compiler.reset()  # as in a new process: torch keeps eight variants of a compiled function
    width, window, cap = kind
    of = (WINDOW if window else None, CAP if cap else None)
    number = getattr(torch, dtype or place.dtype)
    forward, backward, lengths = [0.0], [0.0], []
    for row in rows[:2] if place.tiny else rows:
        layout = packed(batch_of(row), multiple=128)
        lengths.append(layout.input_ids.shape[1])
        draw = torch.Generator().manual_seed(lengths[-1])
        tokens = sum(map(sum, row))
        given = [torch.randn(1, heads, lengths[-1], width, generator=draw).to(number) for heads in (HEADS, KEYS, KEYS, HEADS)]
        grad = given.pop().transpose(1, 2)
        grad[:, tokens:] = 0  # nothing reads what fills the row up
        here = differentiated(partial(attend, layout=layout, place=place, of=of), given, grad, place.device)
        book = differentiated(partial(textbook, layout=layout, of=of), [x.float() for x in given], grad.float(), "cpu")
        errors = [distance(one, other) for one, other in zip(here, book, strict=True)]
        forward.append(distance(here[0][:, :tokens], book[0][:, :tokens]))
        backward += errors[1:]
    eps, said = torch.finfo(number).eps, "rows of " + ", ".join(map(str, lengths))
    limits = f"{str(number).removeprefix('torch.')} has eps {eps:.2g}, and weights and result are rounded once"
    return [
        at_most(f"result, {said}", max(forward), eps, limits),
        at_most("gradients of q, k and v", max(backward), 2 * eps, "the same, forward and back"),
    ]


def batch_of(row: Sequence[tuple[int, int, int]]) -> Batch:
    """Return pairs of these lengths; no attention reads the tokens themselves."""
    prompts = [np.ones(lengths[0], np.int64) for lengths in row]
    responses = [np.ones(n, np.int64) for lengths in row for n in lengths[1:]]
    return Batch(prompts, responses, np.arange(len(row)).repeat(2), np.array([1, -1] * len(row)))


def differentiated(run: Any, given: Sequence[Any], grad: Any, device: str) -> list[Any]:
    """Return the result and the gradients of q, k and v, float32 on the CPU."""
    leaves = [x.detach().clone().to(device).requires_grad_() for x in given]
    out = run(*leaves)
    out.backward(grad.to(device))
    return [x.detach().float().cpu() for x in (out, *(leaf.grad for leaf in leaves))]


def attend(q: Any, k: Any, v: Any, layout: Packed, place: Place, of: tuple[int | None, float | None]) -> Any:
    """Compute as a layer of transformers does: by the function that the backend registered there."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from lite_dil.backends.torch import packed_attention

    window, cap = of
    row = packed_attention.PackedRow.of(layout, torch.device(place.device))
    with packed_attention.computing(SimpleNamespace(_attn_implementation="sdpa"), row):
        function = ALL_ATTENTION_FUNCTIONS[packed_attention.NAME]
        out, _ = function(torch.nn.Identity(), q, k, v, None, scaling=q.shape[-1] ** -0.5, softcap=cap, sliding_window=window)
    return out


def textbook(q: Any, k: Any, v: Any, layout: Packed, of: tuple[int | None, float | None]) -> Any:
    """Attend causally, one prompt with one response at a time, with whole score matrices."""
    import torch

    window, cap = of
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = torch.zeros(1, q.shape[2], q.shape[1], q.shape[3])
    for segment in layout.segments:
        at = segment.start + segment.prompt
        prompt = torch.arange(segment.start, at)
        for length in segment.responses:
            response = torch.arange(at, at + length)
            own = torch.cat((prompt, response))
            scores = q[0][:, own] @ k[0][:, own].mT * q.shape[-1] ** -0.5
            if cap:
                scores = cap * torch.tanh(scores / cap)
            far = torch.arange(len(own))[:, None] - torch.arange(len(own))
            hidden = (far < 0) | (far >= (window or len(own)))
            mixed = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[0][:, own]).transpose(0, 1)
            # Every response comes to the same prompt; its result is taken from the first.
            seen = own if at == segment.start + segment.prompt else response
            out = out.index_copy(1, seen, mixed[None, len(own) - len(seen) :])
            at += length
    return out


def distance(one: Any, other: Any) -> float:
    """Return the norm of the difference, relative to the second's."""
    return float((one - other).norm() / other.norm())
