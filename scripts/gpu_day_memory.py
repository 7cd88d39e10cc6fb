"""scripts/gpu_day.py: what an 8B model takes beside what `lite-dil plan` says, and how running out of memory ends."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from gpu_day_models import NotRun, Place, saved_adapter, scratch, worst
from gpu_day_record import Check, Finding, between, same
from live_bytes import measure, random_examples

from lite_dil.base.errors import OutOfMemory
from lite_dil.base.memory import GIB
from lite_dil.batching.batch import Batch
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.objectives.criterion import Criterion
from lite_dil.planning import plan
from lite_dil.planning.estimate import Load
from lite_dil.planning.memory import CUDA_CONTEXT
from lite_dil.training.step import micro_batches

# What is left of cards of 6, 8, 12, 16 and 24 GB when CUDA has its share, and of a T4.
CAPACITIES = (5.4, 7.4, 11.4, 14.0, 15.4, 23.4)
LENGTHS = (1024, 4096, 20000)
# The longest that each is to hold first.
CASES = [(5.4, 1024), (7.4, 4096), (15.4, 20000), (11.4, 4096), (14.0, 20000), (23.4, 20000)]
CASES += [(size, length) for size in CAPACITIES for length in LENGTHS if (size, length) not in CASES]
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of what a large step takes, at which memory ends
PROMISE = "what plan promises of the reserved peak"


def planned(place: Place, gib: float, length: int) -> plan.Plan:
    """Return the plan of a pair of 2 x `length` tokens in `gib`, with the flags that it names where they are needed."""
    config = place.config(
        model=place.large,
        load_in_4bit=True,
        dtype=place.dtype,
        optim="auto",
        max_length=min(length, 512) if place.tiny else length,
        batch_size=1,
        gradient_accumulation_steps=1,
    )
    size = gib + CUDA_CONTEXT / GIB
    made = plan.make(config, set(), size)
    if made.remedy is not None and made.remedy.fits and made.remedy.config.max_length == config.max_length:
        made = plan.make(made.remedy.config, set(), size)
    if not made.fits:
        raise NotRun(f"plan: it does not fit ({made.estimate.total / GIB:.2f} GiB at least)")
    return made


def flags(config: ResolvedConfig) -> str:
    """Return the flags that save memory."""
    names = [f"--{name.replace('_', '-')}" for name in ("offload_activations", "offload_embeddings") if getattr(config, name)]
    names += [f"--head-bits {config.head_bits}"] if config.head_bits else []
    return " ".join(names) or "no flags"


def fits(gib: float, length: int, place: Place) -> list[Finding]:
    """Take three steps in a part of the card's memory, and compare the peaks with the plan's."""
    import torch

    made = planned(place, gib, length)
    _, total = torch.cuda.mem_get_info()
    if total < gib * GIB:
        raise NotRun(f"the card has {total / GIB:.1f} GiB")
    torch.cuda.set_per_process_memory_fraction(gib * GIB / total)
    backend = place.open(made.config)
    take, results = steps(place, backend, made.load), []
    for _ in range(3):
        results.append(take(1e-5))
    books = torch.cuda.memory_stats()
    reserved, allocated = books["reserved_bytes.all.peak"], books["allocated_bytes.all.peak"]
    said, retries = made.estimate.total, books["num_alloc_retries"]
    far = float(np.abs(results[0].policy - results[0].reference).max())
    sizes = (f"{name} {size / GIB:.2f}" for name, size in (("plan", said), ("reserved", reserved), ("allocated", allocated)))
    what = f"{flags(made.config)}: {', '.join(sizes)} GiB; plan by"
    findings = [
        Finding("allocator's retries", str(retries), "0", retries == 0),
        Finding("largest log-ratio of a fresh adapter", f"{far:.3g} nats", "0", far == 0),
    ]
    if place.tiny:
        why = "of 8B alone: a toy is smaller than the allocator's blocks"
        return [Finding(f"{what} reserved", f"{said / reserved:.3f}", why), *findings]
    return [
        between(f"{what} reserved", said / reserved, 0.99, 1.05, PROMISE),
        between("plan without its reserve by allocated", (said - made.estimate.reserve) / allocated, 0.99, 1.05, "the same"),
        *findings,
    ]


def steps(place: Place, backend: Any, load: Load) -> Callable[[float], Any]:
    """Return what takes a step of this size."""
    examples = random_examples(load, place.vocabulary(place.large))
    criterion = Criterion(place.config(model=place.large), examples)
    work = micro_batches([Batch.of(examples)], criterion)
    return lambda rate: backend.step(work, criterion, rate)


def live(place: Place) -> list[Finding]:
    """Compare the live tensors of a toy on a CPU with the estimate: what `fits` has no counterpart for."""
    if place.device != "cpu":
        raise NotRun("of a CPU, which has no allocator to ask; see the other checks")
    findings = []
    gc.freeze()  # tensors are searched for among Python's objects, of which the imported modules have a million
    for mode in ("off", "selective", "full"):
        config = place.config(gradient_accumulation_steps=1, batch_size=1, max_length=512, gradient_checkpointing=mode)
        found = measure(config, Load.worst(config))
        why = "what tests/planning/test_estimate.py allows"
        findings.append(between(f"estimate by live bytes, {mode}", found.estimate.total / found.later, 0.96, 1.04, why))
    gc.unfreeze()
    return findings


def runs_out(place: Place, **options: Any) -> list[Finding]:
    """Let memory end five times in a large step; expect the bytes back, and the next step to be as if nothing had been."""
    import torch

    length = 2048 if place.tiny else 4096
    backend = place.load(
        model=place.large, load_in_4bit=True, dtype=place.dtype, optim="auto", max_length=length,
        gradient_checkpointing="full", **options,
    )  # fmt: skip
    small, large = (steps(place, backend, Load((1,), ((n, n),))) for n in (64, length - 1))
    small(1e-4)
    _, total = torch.cuda.mem_get_info()
    with scratch() as folder:
        backend.save_state(folder)
        place.free()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        large(0.0)
        room = torch.cuda.max_memory_allocated() - before
        backend.load_state(folder)
        expected, adapter = small(1e-4), saved_adapter(backend)
        failed, differ, left, far = 0, 0, 0, 0.0
        for share in SHARES:
            backend.load_state(folder)
            place.free()
            held = torch.cuda.memory_allocated()
            torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + share * room) / total))
            failed += out_of_memory(large)
            torch.cuda.set_per_process_memory_fraction(1.0)
            left = max(left, torch.cuda.memory_allocated() - held)
            found = small(1e-4)
            differ += (found.loss, found.grad_norm) != (expected.loss, expected.grad_norm)
            far = max(far, worst(adapter, saved_adapter(backend)))
    return [
        Finding("out of memory", f"{failed} of {len(SHARES)} times", f"{len(SHARES)} times", failed == len(SHARES)),
        Finding("bytes not given back", str(left), "0", left <= 0),
        Finding("the next step", f"{differ} of {len(SHARES)} differ", "loss and gradient as before", differ == 0),
        same("the adapter after it", far == 0, far),
    ]


def out_of_memory(step: Callable[[float], Any]) -> bool:
    """Return whether a step runs out of memory."""
    try:
        step(1e-4)
    except OutOfMemory:
        return True
    return False


CHECKS = [
    Check("estimate on a CPU", live, 40),
    *(
        Check(f"2 x {length:,} in {size:g} GiB", partial(fits, size, length), 45, cuda=True, alone=True)
        for size, length in CASES[:3]
    ),
    Check("out of memory", runs_out, 60, cuda=True, alone=True),
    *(
        Check(f"2 x {length:,} in {size:g} GiB", partial(fits, size, length), 45, cuda=True, alone=True)
        for size, length in CASES[3:]
    ),
    Check(
        "out of memory, offloads",
        lambda place: runs_out(place, offload_activations=True, offload_embeddings=True),
        60,
        cuda=True,
        alone=True,
    ),
]
