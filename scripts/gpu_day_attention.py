"""scripts/gpu_day.py: the attention of a packed row, FlexAttention on a GPU, against the textbook in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from gpu_day_costs import COMPILE, START
from gpu_day_models import Place
from gpu_day_record import Check, Finding

from lite_dil.batching.batch import Batch
from lite_dil.batching.layouts import Packed, packed

WINDOW, CAP = 100, 3.0  # of tokens and of scores, small enough to matter in each row but the shortest
HEADS, KEYS = 4, 2
SHORT, MIDDLE, LONG = ((5, 9, 3), (30, 1, 17)), ((150, 60, 90),), ((700, 400, 300), (500, 100, 200))
WIDTHS = (128, 64, 256, 96, 80, 192, 512)  # by how many models have them
SECONDS = START + 2 * COMPILE + 6  # without and with a soft cap; windows are data. The textbook on the CPU: a few GFLOP a row


def checks(dtype: str, cuda: bool) -> list[Check]:
    """Return a check for each width in this type, "" for the device's own 16-bit one."""
    return [
        Check(
            f"attention {width}, {dtype or '16 bits'}", partial(of_width, width, dtype), SECONDS, cuda, gib=2.0, models=False
        )
        for width in WIDTHS
    ]


def of_width(width: int, dtype: str, place: Place) -> Iterator[Finding]:
    """Compare result and gradients of each kind of attention, on rows from 33 to 2,200 tokens."""
    from lite_dil.backends.torch.row import Unsupported

    for cap in (None, CAP):
        for window in (None, WINDOW):
            of = f"{f'window {window}' if window else 'no window'}, {f'soft cap {cap:g}' if cap else 'no soft cap'}"
            try:
                yield kind(width, dtype, (window, cap), of, place)
            except Unsupported as error:  # training goes on in the plain layout, which is right, and slower
                yield Finding(of, str(error), "it is compiled for this GPU", False)


def kind(width: int, dtype: str, of: tuple[int | None, float | None], name: str, place: Place) -> Finding:
    """Compare one kind of attention with the textbook in float32."""
    import torch

    number = getattr(torch, dtype or place.dtype)
    forward, backward, lengths = [0.0], [0.0], []
    for row in (SHORT, MIDDLE) if place.tiny else (SHORT, MIDDLE, LONG):
        layout = packed(batch_of(row), multiple=128)
        lengths.append(layout.input_ids.shape[1])
        draw = torch.Generator().manual_seed(lengths[-1])
        tokens = sum(map(sum, row))
        given = [torch.randn(1, heads, lengths[-1], width, generator=draw).to(number) for heads in (HEADS, KEYS, KEYS, HEADS)]
        grad = given.pop().transpose(1, 2)
        grad[:, tokens:] = 0  # nothing reads what fills the row up
        here = differentiated(partial(attend, layout=layout, place=place, of=of), given, grad, place.device)
        book = differentiated(partial(textbook, layout=layout, of=of), [x.float() for x in given], grad.float(), "cpu")
        forward.append(distance(here[0][:, :tokens], book[0][:, :tokens]))
        backward += [distance(one, other) for one, other in zip(here[1:], book[1:], strict=True)]
    eps, result, gradients = torch.finfo(number).eps, np.max(forward), np.max(backward)  # which keep NaN
    what = f"{name}, rows of {', '.join(map(str, lengths))}: result, gradients of q, k and v"
    expected = f"at most {eps:.2g}, {2 * eps:.2g}: {str(number).removeprefix('torch.')}'s eps, forward and back"
    return Finding(what, f"{result:.2g}, {gradients:.2g}", expected, bool(result <= eps and gradients <= 2 * eps))


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
