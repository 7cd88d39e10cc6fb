"""Memory that runs out in a step: OutOfMemory is raised, all bytes are freed, and the next step is unaffected."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rehearse_cuda.cases import CAPACITIES, Case
from rehearse_cuda.checkpoints import tiny
from rehearse_cuda.failed import Failed, require
from rehearse_cuda.stand_in import GIB, Doors, Kind
from rehearse_cuda.stepping import Stepper, Work, held, loaded, resolved

from lite_dil.backends.types import POLICY
from lite_dil.base.errors import OutOfMemory, first_line
from lite_dil.config.train_config import ResolvedConfig

PLENTY = 24 * GIB
# By resource: the parts of a step in which it must have run out.
EXPECTED = {
    "device": {"forward", "backward"},
    "first step": {"optimiser"},
    "pinned": {"forward"},
    "product": {"forward", "backward"},
    "launch": {"forward", "backward"},
}


class Place:
    """The current part of a step, tracked by the step's calls: the loss, then the optimiser."""

    def __init__(self, backend: Any, stepper: Stepper) -> None:
        self.now = "forward"
        loss, trained = stepper.loss, backend.adapters[POLICY]
        update = trained.update

        class Loss:
            """The loss, which is called between the forward and the backward pass."""

            reads, reference, token_inputs = loss.reads, loss.reference, loss.token_inputs

            def __call__(_, *args: Any) -> Any:  # noqa: N805
                self.now = "backward"
                return loss(*args)

        def updating(*args: Any) -> Any:
            self.now = "optimiser"
            return update(*args)

        stepper.loss, trained.update = Loss(), updating


def run(case: Case, folder: Path) -> tuple[str, dict[str, Any]]:
    """Run out of memory at many capacities; return what was seen."""
    options = dict(case.settings)
    where = options.pop("where")
    model = tiny(folder / "model")
    rehearsal = Rehearsal(resolved(model, {"dtype": "bfloat16", **options}), where)
    seen = rehearsal.all()
    parts = ", ".join(f"{part} {count}" for part, count in sorted(seen.items()))
    figures = {"seen": dict(seen), "work": rehearsal.work.counts}
    missing = EXPECTED[where] - set(seen)
    require(not missing, f"memory never ran out in {' and '.join(sorted(missing))}; in {parts or 'nothing'}", figures)
    return f"ran out {sum(seen.values())} times of {CAPACITIES}: {parts}; the next step is the same", figures


class Rehearsal:
    """Steps of one config with too little of one resource."""

    def __init__(self, config: ResolvedConfig, where: str) -> None:
        self.config, self.where, self.doors = config, where, Doors()
        self.first = where == "first step"
        self.backend, self.stepper, self.place = self._fresh()
        if self.first:  # a process's first step also makes cuBLAS' workspace
            self.stepper.step(self.backend)
            self._start_anew()
        self._free()
        self.rest = self.doors.device_used, self.doors.pinned_used
        self.doors.reset_peaks()
        self.work = self.stepper.counted(self.backend)
        self.peak = self.doors.device_peak, self.doors.pinned_peak

    def _fresh(self) -> tuple[Any, Stepper, Place]:
        backend, stepper = loaded(self.config), Stepper(self.config)
        place = Place(backend, stepper)
        if not self.first:
            for _ in range(2):  # compiles, and creates the optimiser's state
                stepper.step(backend)
        return backend, stepper, place

    def _start_anew(self) -> None:
        """Load a new model, since a finished step has created the optimiser's state."""
        del self.backend, self.stepper, self.place
        gc.collect()
        self.backend, self.stepper, self.place = self._fresh()

    def _free(self) -> None:
        """Free caches and offloaded activations' chunks, so that the next step allocates again."""
        if self.backend.store is not None:
            self.backend.store.clear(0)
        held()
        torch.cuda.empty_cache()

    def all(self) -> Counter[str]:
        """Run out at each capacity; return how often in each part of a step."""
        found: Counter[str] = Counter()
        for number, limit in enumerate(self._limits(), 1):
            if self.first:
                self._start_anew()
            self._free()
            before = held()
            limit()
            try:
                part = self._runs_out()
            finally:
                self._plenty()
            if part is not None:
                found[part] += 1
            self._is_as_before(f"try {number}, out of memory in {part}", before, part is not None)
        return found

    def _limits(self) -> list[Callable[[], None]]:
        """Return what makes the resource scarce in each try: a capacity between rest and peak, or a failing call."""
        shares = [(i + 0.5) / CAPACITIES for i in range(CAPACITIES)]
        if self.where in ("product", "launch"):
            kind = Kind.PRODUCT if self.where == "product" else Kind.LAUNCH
            calls = [int(share * self.work.counts[self.where]) + 1 for share in shares]
            return [partial(self.doors.fail, kind, nth) for nth in calls]
        pinned = self.where == "pinned"
        low, high = self.rest[pinned], self.peak[pinned]
        require(high > low, f"a step takes no more than it holds: {low:,} bytes")
        sizes = [int(low + share * (high - low)) for share in shares]
        if pinned:
            return [partial(self.doors.set_capacity, PLENTY, size) for size in sizes]
        return [partial(self.doors.set_capacity, size) for size in sizes]

    def _plenty(self) -> None:
        self.doors.set_capacity(PLENTY)
        for kind in Kind:
            self.doors.fail(kind, 0)

    def _runs_out(self) -> str | None:
        """Take a step; return the part in which memory ran out, or None."""
        self.place.now = "forward"
        try:
            self.stepper.step(self.backend)
        except OutOfMemory as error:
            self._advises(str(error).partition("What helps: ")[2].split(", "))
            return self.place.now
        except RuntimeError as error:  # torch's own, which the backend must convert
            raise Failed(f"{type(error).__name__} in {self.place.now}: {first_line(error)[:160]}") from None
        return None

    def _advises(self, helps: list[str]) -> None:
        """Require that the remedies match the memory that ran out."""
        offloads = self.config.offload_activations
        require(("--offload-activations" in helps) != offloads, f"what helps: {helps}, offloading is on: {offloads}")
        if self.place.now == "forward":  # later it is a scalar's pinned memory, reported as any other
            require(("--no-offload-activations" in helps) == (self.where == "pinned"), f"what helps: {helps}")

    def _is_as_before(self, when: str, before: tuple[int, int], failed: bool) -> None:
        """Require that no more memory is held than before, and that the next step does the usual work."""
        after = held()
        if failed:
            more = [int(number) for number in np.subtract(after, before)]
            require(more == [0, 0], f"{when}: {more[0]:,} bytes of the card and {more[1]:,} pinned ones are still held")
        if failed or not self.first:
            work = self.stepper.counted(self.backend)
            require(work == self.work, f"{when}: the next step did {differing(work, self.work)}")


def differing(work: Work, expected: Work) -> str:
    """Return what two steps did differently."""
    found = {name: (count, expected.counts[name]) for name, count in work.counts.items() if count != expected.counts[name]}
    found |= {
        name: (getattr(work, name), getattr(expected, name))
        for name in ("allocations", "allocated_bytes")
        if getattr(work, name) != getattr(expected, name)
    }
    return ", ".join(f"{was:,} {name} instead of {wanted:,}" for name, (was, wanted) in found.items())
