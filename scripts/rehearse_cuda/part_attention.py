"""Packed attention on the card: FlexAttention's forward and backward kernels compile and fit, or why not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rehearse_cuda.cases import Case
from rehearse_cuda.failed import Failed
from rehearse_cuda.stand_in import Doors

from lite_dil.backends.limits import FLEX_BLOCK
from lite_dil.backends.torch import packed_attention
from lite_dil.base.errors import first_line
from lite_dil.batching.batch import Batch
from lite_dil.batching.layouts import packed


def run(case: Case, folder: Path) -> tuple[str, dict[str, Any]]:
    """Attend over a row, forward and backward; return what was seen."""
    doors = Doors()
    before = doors.work()["launch"]
    try:
        text = attend(case.settings)
    except packed_attention.Unsupported as error:
        return f"falls back: {first_line(error)}", {"fits": False}
    except (RuntimeError, ImportError) as error:  # of dynamo, Inductor and Triton, which have many
        raise Failed(_reason(error)) from None
    launches = doors.work()["launch"] - before
    return text, {"fits": True, "launches": launches}


def attend(settings: Mapping[str, Any]) -> str:
    """Compute packed attention as the layers of a model do, and its gradients; return a few words on what was compiled.

    The one place here that knows how the product computes it.

    Args:
        settings: width, heads, kv_heads, dtype, tokens; window and cap where there are any.
    """
    row = _row(settings["tokens"])
    tokens, dtype = row.position_ids.shape[1], getattr(torch, settings["dtype"])

    def heads(count: int) -> torch.Tensor:
        return torch.zeros(1, count, tokens, settings["width"], dtype=dtype, device="cuda", requires_grad=True)

    q, k, v = heads(settings["heads"]), heads(settings["kv_heads"]), heads(settings["kv_heads"])
    config: Any = SimpleNamespace(_attn_implementation="sdpa")
    with packed_attention.computing(config, row):
        out, _ = packed_attention.attention(
            torch.nn.Identity(), q, k, v, None, softcap=settings.get("cap"), sliding_window=settings.get("window")
        )
        out.sum().backward()
    torch.cuda.synchronize()
    return "forward and backward fit"


def _row(tokens: int) -> packed_attention.PackedRow:
    """Return a row of one pair, in which every sequence is longer than the windows of the table."""
    ids = np.zeros(tokens // 3, np.int64)
    batch = Batch([ids], [ids, ids], np.array([0, 0]), np.array([1, -1]))
    return packed_attention.PackedRow.of(packed(batch, multiple=FLEX_BLOCK), torch.device("cuda"))


def _reason(error: BaseException) -> str:
    """Return the line of a long error that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "shared memory" in line or "out of resource" in line]
    return (telling or [first_line(error)])[0][:200]
