"""scripts/gpu_day.py: what an 8B model takes beside what `lite-dil plan` says, and how running out of memory ends."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from gpu_day_costs import COMPILE, LOAD, MAKE, START, step
from gpu_day_models import NotRun, Place, saved_adapter, scratch, worst
from gpu_day_record import Check, Finding, at_most, between, same
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

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of what a large step takes, at which memory ends
PROMISE = "what plan promises of the reserved peak"


class Fit(NamedTuple):
    """GiB that CUDA leaves of a card, and tokens of each answer of a pair that `plan` says it holds, with flags that it names.

    A T4 has float16, and in Colab a computer of 12.7 GB around it.
    """

    gib: float
    length: int
    t4: bool = False

    @property
    def name(self) -> str:
        return f"2 x {self.length:,} in {self.gib:g} GiB{', as a T4' if self.t4 else ''}"

    @property
    def seconds(self) -> float:
        """Seconds of three steps; offloaded activations are transferred while the step computes."""
        return START + LOAD + COMPILE + 3 * step([(1, self.length - 1, self.length - 1)])


# Cards of 6, 8, 12, 16 and 24 GB, and a T4. First the longest that each is to hold.
FITS = [Fit(5.4, 1024), Fit(7.4, 4096), Fit(15.4, 20000), Fit(14.0, 1024, True), Fit(14.0, 4096, True), Fit(11.4, 20000)]
FITS += [Fit(23.4, 20000), Fit(7.4, 1024), Fit(11.4, 4096), Fit(15.4, 4096), Fit(23.4, 4096)]
FITS += [Fit(11.4, 1024), Fit(15.4, 1024), Fit(23.4, 1024)]


def planned(place: Place, fit: Fit) -> plan.Plan:
    """Return the plan of a pair of 2 x `length` tokens, with the flags that it names where they are needed."""
    config = place.config(
        model=place.large,
        load_in_4bit=True,
        dtype="float16" if fit.t4 and place.device == "cuda" else place.dtype,
        optim="auto",
        max_length=min(fit.length, 512) if place.tiny else fit.length,
        batch_size=1,
        gradient_accumulation_steps=1,
    )
    size, host = fit.gib + CUDA_CONTEXT / GIB, 12.7 if fit.t4 else None
    made = plan.make(config, set(), size, host=host)
    if made.remedy is not None and made.remedy.fits and made.remedy.config.max_length == config.max_length:
        made = plan.make(made.remedy.config, set(), size, host=host)
    return made


def flags(config: ResolvedConfig) -> str:
    """Return the flags that save memory."""
    names = [f"--{name.replace('_', '-')}" for name in ("offload_activations", "offload_embeddings") if getattr(config, name)]
    names += [f"--head-bits {config.head_bits}"] if config.head_bits else []
    return " ".join(names) or "no flags"


def fits(fit: Fit, place: Place) -> Iterator[Finding]:
    """Take three steps in a part of the card's memory, and compare the peaks with the plan's."""
    import torch

    made = planned(place, fit)
    said, host = made.estimate.total, made.estimate.host
    text = f"{said / GIB:.2f} GiB, {host / GIB:.1f} of the computer's; {flags(made.config)}"
    yield Finding("plan", text, f"at most {fit.gib:g} GiB", made.fits)
    _, total = torch.cuda.mem_get_info()
    if total < fit.gib * GIB:
        raise NotRun(f"the card has {total / GIB:.1f} GiB")
    torch.cuda.set_per_process_memory_fraction(fit.gib * GIB / total)
    backend = place.open(made.config)
    yield Finding("layout", f"{backend.layout} {backend.layout_reason}".strip(), "packed", backend.layout == "packed")
    take, results = steps(place, backend, made.load), []
    for _ in range(3):
        results.append(take(1e-5))
    books = torch.cuda.memory_stats()
    reserved, allocated, retries = (books[name] for name in BOOKS)
    # The promise is of what is reserved; that the tensors come within 2 % of it says which part of an error is the reserve's.
    for what, size, planned_size, low in (
        ("plan by reserved", reserved, said, 0.99),
        ("plan without its reserve by allocated", allocated, said - made.estimate.reserve, 0.98),
    ):
        text, ratio = f"{what} ({planned_size / GIB:.2f} / {size / GIB:.2f} GiB)", planned_size / size
        why = "of 8B alone: a toy is smaller than the allocator's blocks"
        yield Finding(text, f"{ratio:.3f}", why) if place.tiny else between(text, ratio, low, 1.05, PROMISE)
    yield pinned(made)
    yield Finding("allocator's retries", str(retries), "0", retries == 0)
    far = float(np.abs(results[0].policy - results[0].reference).max())
    yield Finding("largest log-ratio of a fresh adapter", f"{far:.3g} nats", "0", far == 0)


def pinned(made: plan.Plan) -> Finding:
    """Compare the peak of pinned memory with what the plan has for what is offloaded."""
    import torch

    counted = sum(size for name, size in made.estimate.host_parts if name == "activations")
    books = getattr(torch.cuda, "host_memory_stats", None)  # of torch 2.7 and later
    if books is None:
        return Finding("pinned memory", "this torch keeps no books of it", f"at most {counted / GIB:.2f} GiB")
    return at_most("pinned memory", books()["allocated_bytes.peak"] / GIB, counted / GIB + 0.05, "plan's, and 0.05", " GiB")


CONTEXT = CUDA_CONTEXT / GIB
BOOKS = ("reserved_bytes.all.peak", "allocated_bytes.all.peak", "num_alloc_retries")


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
    """Run out of memory five times in a large step; expect all bytes back and an unchanged next step."""
    import torch

    length = 2048 if place.tiny else LENGTH
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


LENGTH = 4096  # of the pair at which memory ends
# A step that is whole and five that end somewhere in it; a state of 50 MB read and 170 MB compared six times.
OUT = START + LOAD + COMPILE + 6 * step([(1, LENGTH - 1, LENGTH - 1)]) + 10

CHECKS = [
    Check("the model", Place.make_large, START + MAKE, gib=12.0, first=True, there=Place.has_large),
    Check("estimate on a CPU", live, 40),
    *(Check(fit.name, partial(fits, fit), fit.seconds, cuda=True, gib=fit.gib + CONTEXT) for fit in FITS[:3]),
    Check("out of memory", runs_out, OUT, cuda=True, gib=14.0),
    *(Check(fit.name, partial(fits, fit), fit.seconds, cuda=True, gib=fit.gib + CONTEXT) for fit in FITS[3:7]),
    Check(
        "out of memory, offloads",
        partial(runs_out, offload_activations=True, offload_embeddings=True),
        OUT,
        cuda=True,
        gib=14.0,
    ),
    *(Check(fit.name, partial(fits, fit), fit.seconds, cuda=True, gib=fit.gib + CONTEXT) for fit in FITS[7:]),
]
