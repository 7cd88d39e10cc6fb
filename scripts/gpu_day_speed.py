"""scripts/gpu_day.py: pairs per second beside the libraries that people use today, on the same model and the same pairs."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import benchmark
import benchmark_cases as cases
from benchmark_cases import Job
from gpu_day_attention import LONG, attend, batch_of
from gpu_day_costs import COMPILE, LOAD, MAKE, RATE, START, step
from gpu_day_models import NotRun, Place, bytes_in_4_bits, scratch
from gpu_day_record import Check, Finding, Record, at_most, between

from lite_dil.batching.layouts import packed
from lite_dil.batching.schedule import layout_tokens

PAIRS, MATMUL = "pairs/s", "matrix products"
# Half of the measured rate of one large product is what training is to reach; below half of that something is wrong.
REACHED, LEAST = 0.5, 0.5


class Case(NamedTuple):
    """The pairs of a measurement, and how they are trained."""

    name: str
    batch: int
    checkpointing: str

    def job(self, place: Place, contestant: str) -> Job:
        """Return the measurement: a round to warm up, and three that are timed."""
        if self.name == "HH":
            pairs = self.batch if place.tiny else 2 * self.batch
            lengths = tuple(cases.HH[:pairs])
            if place.tiny:
                lengths = tuple((p // 8 + 2, c // 8 + 2, r // 8 + 2) for p, c, r in lengths)
        else:
            half = 512 // (16 if place.tiny else 1)
            lengths = ((half, half, half),)
        rounds = 1 if place.tiny else 3
        model = place.large
        return Job(self.name, contestant, place.device, model, lengths, self.batch, 4, self.checkpointing, rounds, "full")  # type: ignore[arg-type]

    def key(self, contestant: str) -> str:
        """Return the name of the check in the record."""
        return f"speed: {self.of(contestant)}"

    def of(self, contestant: str) -> str:
        """Return the name of the check."""
        return f"{self.name}, {self.batch} a step, checkpointing {self.checkpointing}: {contestant}"


HH, LONG_PAIR, KEPT = Case("HH", 8, "full"), Case("2 x 1,024", 1, "full"), Case("HH", 8, "off")
OURS, FIRST = "lite-dil-cached", "lite-dil"


def run(job: Job, place: Place) -> dict[str, Any]:
    """Measure in a process of the contestant's own. Raises NotRun if it is not installed here."""
    options = argparse.Namespace(threads=os.cpu_count(), python=place.python, timeout=max(1, int(0.9 * place.limit)))
    result = benchmark.run(job, options)
    if result["status"] == "not run":
        raise NotRun(result["reason"])
    if result["status"] != "ok":
        print(result.get("log", ""))  # into what is kept of a failed check
    return result


def matmul(place: Place) -> list[Finding]:
    """Measure the product that the model is mostly made of."""
    result = run(Job(MATMUL, "matmul", place.device, place.large, ((1, 1, 1),), 1), place)
    if result["status"] != "ok":
        return [broken("FLOP/s", result)]
    flops = result["flops"]
    text = f"{flops / 1e12:.3g} TFLOP/s ({result['description']})"
    # 990 is what NVIDIA names for an H200, 790 what was measured on one; 3000 is beyond every card of 2026.
    said = "0 to 3000 TFLOP/s; an H200 700 to 990 in 16 bits"
    return [Finding("FLOP/s", text, said, 0 < flops < 3e15, flops)]


def ours(case: Case, place: Place) -> Iterator[Finding]:
    """Measure lite-dil, its reference known, as the peers' is."""
    job = case.job(place, OURS)
    result = run(job, place)
    if result["status"] != "ok":
        yield broken(PAIRS, result)
        return
    rate = (known(place, f"speed: {MATMUL}", "FLOP/s") or RATE / REACHED) * REACHED
    yield pairs_a_second(job, result, expected(job, rate, False), place)
    yield memory(job, result, place, 2.0)


def expected(job: Job, rate: float, reference: bool) -> float:
    """Return pairs per second by arithmetic, in packed rows of one pass."""
    steps = [job.lengths[i : i + job.batch] for i in range(0, len(job.lengths), job.batch)]
    return len(job.lengths) / sum(step(one, reference, job.checkpointing == "full", rate) for one in steps)


def pairs_a_second(job: Job, result: dict[str, Any], by_arithmetic: float, place: Place) -> Finding:
    """Return pairs and tokens per second beside what arithmetic says."""
    found = result[PAIRS_KEY]
    tokens = sum(prompt * 2 + chosen + rejected for prompt, chosen, rejected in job.lengths) / len(job.lengths)
    text = f"{found:.2f} ({tokens * found:,.0f} tokens/s)"
    if place.tiny:
        return Finding(PAIRS, text, "above 0; more of 8B alone", found > 0, found)
    top = 1 / REACHED
    said = f"{by_arithmetic:.2f} at {REACHED:g} of the matrix products' rate; {LEAST:g} to {top:g} times that"
    return Finding(PAIRS, text, said, LEAST <= found / by_arithmetic <= top, found)


PAIRS_KEY = "pairs_per_second"


def memory(job: Job, result: dict[str, Any], place: Place, head: float) -> Finding:
    """Return what model, adapter and optimiser take when the first step begins; `head` is bytes a weight of the head."""
    what, found = "model and adapter, GB", result["base_bytes"] / 1e9
    if place.tiny:
        return Finding(what, f"{found:.3f}", "of 8B alone", None, found)
    config = cases.read_config(job.model)
    adapter = 4 * job.rank * config["num_hidden_layers"] * widths(config)
    said = (bytes_in_4_bits(config) + (head - 2) * config["vocab_size"] * config["hidden_size"] + adapter) / 1e9
    return between(what, found, 0.98 * said, 1.03 * said, "by its shape; the optimiser's state is paged")


def widths(config: dict[str, Any]) -> int:
    """Return the sum of the widths in and out of a layer's linear parts, for each of which LoRA has a row of its rank."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    return 2 * (2 * hidden) + 2 * (hidden + keys) + 3 * (hidden + inner)


def first_epoch(case: Case, place: Place) -> list[Finding]:
    """Measure lite-dil with the reference computed in each step."""
    job = case.job(place, FIRST)
    result, cached = run(job, place), known(place, case.key(OURS), PAIRS)
    if result["status"] != "ok":
        return [broken(PAIRS, result)]
    found = result[PAIRS_KEY]
    if cached is None or place.tiny:
        return [Finding(PAIRS, f"{found:.2f}", "above 0; more of 8B alone, beside lite-dil-cached", found > 0, found)]
    by_arithmetic = cached * expected(job, RATE, True) / expected(job, RATE, False)
    said = f"{by_arithmetic:.2f} by the reference's operations and {OURS}'s; 0.8 to 1.2 times that"
    return [Finding(PAIRS, f"{found:.2f}", said, 0.8 <= found / by_arithmetic <= 1.2, found)]


def peer(case: Case, contestant: str, place: Place) -> list[Finding]:
    """Measure TRL or Unsloth at its best: 16 bits or fused, with the reference precomputed."""
    job, here = case.job(place, contestant), known(place, case.key(OURS), PAIRS)
    result = run(job, place)
    if result["status"] != "ok":  # what a peer cannot do here is no failure of this library's
        return [Finding(PAIRS, f"{result['status']}: {result['reason']}", f"at most {OURS}'s", None)]
    found, padded = result[PAIRS_KEY], fewer(job)
    ratio = f"; {OURS} has {here / found:.2f} times as many" if here else ""
    text = f"{found:.2f} ({result['description']}){ratio}"
    if here is None:
        return [Finding(PAIRS, text, f"at most {OURS}'s, which is not there", None, found)]
    said = f"at most {OURS}'s {here:.2f}; by tokens computed {here / padded:.2f}"
    return [Finding(PAIRS, text, "of 8B alone" if place.tiny else said, None if place.tiny else found <= here, found)]


def fewer(job: Job) -> float:
    """Return how many times the tokens of a packed step the padded steps of a peer have."""
    parts = [job.lengths[i : i + job.batch] for i in range(0, len(job.lengths), job.batch)]
    plain, packed_tokens = (
        sum(layout_tokens([one[0] for one in part], [list(one[1:]) for one in part], layout) for part in parts)
        for layout in ("plain", "packed")
    )
    return plain / packed_tokens


def head(case: Case, place: Place) -> Iterator[Finding]:
    """Measure what an 8-bit output head costs in time and saves in memory."""
    job = replace(case.job(place, OURS), head_bits=8)
    result, whole = run(job, place), known(place, case.key(OURS), PAIRS)
    if result["status"] != "ok":
        yield broken(PAIRS, result)
        return
    found = result[PAIRS_KEY]
    if whole is None or place.tiny:
        yield Finding(PAIRS, f"{found:.2f}", f"above 0; more of 8B alone, beside {OURS}", found > 0, found)
    else:
        said = f"at least {whole / 1.1:.2f}, a tenth less than with 16 bits: unpacking moves 3 bytes a weight a chunk"
        yield Finding(PAIRS, f"{found:.2f}", said, found >= whole / 1.1, found)
    yield memory(job, result, place, 1 + 4 / 64)


def broken(what: str, result: dict[str, Any]) -> Finding:
    """Return the finding of a measurement that failed."""
    return Finding(what, f"{result['status']}: {result['reason']}", "a figure", False)


def known(place: Place, key: str, what: str) -> float | None:
    """Return a figure of an earlier check, or None."""
    return Record(place.record, {}).read().value(key, what) if place.record.exists() else None


def cold(place: Place) -> list[Finding]:
    """Time the first call of FlexAttention, forward and backward, with nothing compiled before."""
    with scratch() as folder:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
        import torch

        layout = packed(batch_of(LONG), multiple=128)
        tokens = layout.input_ids.shape[1]
        draw = [torch.randn(1, heads, tokens, 128, device="cuda", dtype=getattr(torch, place.dtype)) for heads in (32, 8, 8)]

        def call() -> None:
            leaves = [x.requires_grad_() for x in draw]
            attend(*leaves, layout=layout, place=place, of=(None, None)).float().sum().backward()
            torch.cuda.synchronize()

        first, second = timed(call), timed(call)
    # 2 d operations for each of two products forward and five backward, of half of all queries and keys or fewer.
    least = 7 * 2 * 128 * 32 * tokens**2 / 2 / 1e15
    return [
        at_most(
            "first call less the second", first - second, 4 * COMPILE, "four times what it took on a core without a GPU", " s"
        ),
        at_most("second call", 1000 * second, 50.0, f"launches, and {1000 * least:.2f} ms at the card's peak at most", " ms"),
    ]


COLD = 60.0


def timed(call: Callable[[], None]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


# A measurement: a process that starts another, the model, its attention compiled or found compiled, and the steps, of which 8
# of HH take 0.3 s each by arithmetic. TRL's and Unsloth's have 3 times the tokens, pairs to tokenise, imports of their own.
LITE_DIL = 2 + START + LOAD + COMPILE + 8
TRL, UNSLOTH = 2 + 2 * START + LOAD + 20, 2 + 3 * START + LOAD + 30


def beside(case: Case) -> list[Check]:
    """Return the measurements of a case: lite-dil, then its peers."""
    return [
        Check(case.of(OURS), partial(ours, case), LITE_DIL),
        Check(case.of("trl-best"), partial(peer, case, "trl-best"), TRL),
        Check(case.of("unsloth-best"), partial(peer, case, "unsloth-best"), UNSLOTH),
    ]


CHECKS = [
    Check("the model", Place.make_large, START + MAKE, gib=12.0, first=True, there=Place.has_large),
    Check("FlexAttention compiled cold", cold, START + COLD / 2, cuda=True, models=False),
    Check(MATMUL, matmul, START + 4),
    *beside(HH),
    Check(HH.of(f"{OURS}, 8-bit head"), partial(head, HH), LITE_DIL),
    Check(HH.of(FIRST), partial(first_epoch, HH), LITE_DIL),
    *beside(LONG_PAIR),
    *beside(KEPT),
]
