"""Packed attention on the card: whether FlexAttention's forward and backward kernels compile and fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rehearse_cuda.cases import Case
from rehearse_cuda.failed import Failed, require
from rehearse_cuda.stand_in import Doors

from lite_dil.backends.limits import FLEX_BLOCK
from lite_dil.backends.torch import flex, packed_attention
from lite_dil.backends.torch.row import Unsupported
from lite_dil.base.errors import first_line
from lite_dil.batching.batch import Batch
from lite_dil.batching.layouts import packed


def run(case: Case, folder: Path) -> tuple[str, dict[str, Any]]:
    """Attend over rows, forward and backward; return what was seen."""
    doors, settings = Doors(), case.settings
    dtype, device, width = getattr(torch, settings["dtype"]), torch.device("cuda", 0), settings["width"]
    cap = settings.get("cap") or 0.0
    kind = flex.Kind(settings["heads"], settings["kv_heads"], width, width, width**-0.5, cap, dtype, device)
    try:
        blocks = flex.kernels(kind).blocks
    except Unsupported as error:
        return f"falls back: {first_line(error)}", {"fits": False}
    except (RuntimeError, ImportError) as error:  # from dynamo, Inductor and Triton, which raise many kinds
        raise Failed(_reason(error)) from None
    before, compiled = doors.work()["launch"], variants()
    for window in settings.get("windows", [None]):
        attend(kind, window)
    launches = doors.work()["launch"] - before
    require(launches > 0, "attention launched nothing")
    require(variants() == compiled, f"{variants() - compiled} variants were compiled after the first")
    sizes = [_size(blocks, "fwd_BLOCK_M", "fwd_BLOCK_N"), _size(blocks, "bwd_BLOCK_M1", "bwd_BLOCK_N1")]
    return f"fits, forward by {sizes[0]}, backward by {sizes[1]}", {"fits": True, "launches": launches, "blocks": blocks}


def attend(kind: flex.Kind, window: int | None) -> None:
    """Compute packed attention over rows of two lengths as a model's layers do, with and without gradients."""
    config: Any = SimpleNamespace(_attn_implementation="sdpa")
    for tokens in (512, 2 * window if window else 768):  # the second row's sequences are longer than the window
        row = _row(tokens)
        q, k, v = (
            torch.zeros(1, heads, row.position_ids.shape[1], kind.width, dtype=kind.dtype, device=kind.device).requires_grad_()
            for heads in (kind.heads, kind.key_heads, kind.key_heads)
        )
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), packed_attention.computing(config, row):
                out, _ = packed_attention.attention(
                    torch.nn.Identity(), q, k, v, None, softcap=kind.cap or None, sliding_window=window
                )
            if gradients:
                out.sum().backward()
    torch.cuda.synchronize()


def variants() -> int:
    """Return how many functions torch's compiler has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _size(blocks: Mapping[str, int], queries: str, keys: str) -> str:
    """Return blocks of queries and keys, in words."""
    return f"{blocks[queries]} x {blocks[keys]}" if queries in blocks else "torch's own blocks"


def _row(tokens: int) -> packed_attention.PackedRow:
    """Return a row of one pair: a prompt and two responses of equal length."""
    ids = np.zeros(tokens // 3, np.int64)
    batch = Batch([ids], [ids, ids], np.array([0, 0]), np.array([1, -1]))
    return packed_attention.PackedRow.of(packed(batch, multiple=FLEX_BLOCK), torch.device("cuda"))


def _reason(error: BaseException) -> str:
    """Return the line of a long error that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "shared memory" in line or "out of resource" in line]
    return (telling or [first_line(error)])[0][:200]
