"""Peaks of a pair on an 8B Llama compared with `lite-dil plan`'s estimate, with the flags that `plan` suggests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rehearse_cuda.cases import Case
from rehearse_cuda.checkpoints import llama_8b
from rehearse_cuda.failed import Failed, require
from rehearse_cuda.stand_in import GIB, Doors
from rehearse_cuda.stepping import Stepper, loaded, resolved

from lite_dil.base.errors import OutOfMemory, UserError, first_line
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.planning.memory import CUDA_CONTEXT
from lite_dil.planning.plan import make

STEPS = 3
LOW, HIGH = -0.01, 0.05  # allowed deviation of the plan from what is reserved


def run(case: Case, folder: Path) -> tuple[str, dict[str, Any]]:
    """Plan, load and take three steps; return what was seen."""
    config, flags, planned, host = plan(case, llama_8b(folder / "model"))
    where = f"with {flags or 'no flag more'}"
    figures: dict[str, Any] = {"plan": planned, "flags": flags, "plan_host": host}
    phase = "loading"
    try:
        backend = loaded(config)
        figures |= {"loading": torch.cuda.max_memory_reserved()}
        stepper = Stepper(config)
        for step in range(1, STEPS + 1):
            phase = f"step {step}"
            stepper.step(backend)
    except (OutOfMemory, UserError) as error:
        figures |= measured()
        text = f"plan {planned / GIB:.2f}, {phase}: {first_line(error)[:120]}; {shown(figures)}; {where}"
        raise Failed(text, figures) from None
    figures |= measured()
    off = planned / figures["reserved"] - 1
    text = f"plan {planned / GIB:.2f} ({off:+.1%}), {shown(figures)}; {backend.layout}, {where}"
    require(not figures["retries"], f"{figures['retries']} retries of the allocator; {text}", figures)
    require(LOW <= off <= HIGH, f"outside {LOW:.0%}..{HIGH:+.0%}: {text}", figures)
    require(figures["pinned"] <= host * (1 - LOW), f"more pinned memory than the plan counts on the host: {text}", figures)
    require(backend.layout == "packed", f"{backend.layout_reason}; {text}", figures)
    return text, figures


def plan(case: Case, model: Path) -> tuple[ResolvedConfig, str, int, int]:
    """Return a config that fits the card, the flags that `plan` suggests, and its bytes on the card and the host."""
    dtype = "float16" if case.card < 80 else "bfloat16"
    options = {"load_in_4bit": True, "max_length": case.settings["max_length"], "dtype": dtype}
    config = resolved(model, options)
    found = make(config, set(options), case.gib + CUDA_CONTEXT / GIB)
    if found.remedy is None:
        return found.config, "", found.estimate.total, found.estimate.host
    flags = found.remedy.flags()
    if not found.remedy.fits or "max_length" in found.remedy.changes:
        raise Failed(
            f"plan says that it does not fit {case.gib:g} GiB; it names {flags} ({found.remedy.estimate.total / GIB:.2f})"
        )
    estimate = found.model.estimate(found.remedy.config, found.load)
    return found.remedy.config, flags, estimate.total, estimate.host


def measured() -> dict[str, int]:
    """Return the peaks so far in bytes, and how often the allocator freed its cache and retried."""
    stats, doors = torch.cuda.memory_stats(), Doors()
    return {
        "allocated": stats["allocated_bytes.all.peak"],
        "reserved": doors.device_peak,
        "pinned": doors.pinned_peak,
        "retries": stats["num_alloc_retries"],
    }


def shown(figures: dict[str, Any]) -> str:
    """Return the figures for people, in GiB."""
    names = [name for name in ("loading", "allocated", "reserved", "pinned") if figures.get(name)]
    host = f" (plan's host {figures['plan_host'] / GIB:.1f})" if figures["plan_host"] else ""
    return ", ".join(f"{name} {figures[name] / GIB:.2f}" for name in names) + host
