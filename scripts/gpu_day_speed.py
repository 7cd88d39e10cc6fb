"""scripts/gpu_day.py: pairs a second beside the libraries that people use today, on the same model and the same pairs."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import benchmark
import benchmark_cases as cases
from benchmark_cases import Job
from gpu_day_attention import LONG, attend, batch_of
from gpu_day_models import NotRun, Place, scratch
from gpu_day_record import Check, Finding, at_most

from lite_dil.batching.layouts import packed
from lite_dil.batching.schedule import layout_tokens

PEERS = ("trl-best", "unsloth-best")
REPEATS = 2  # A B C A B C: a card that slows down slows everyone
PROCESS = 40.0  # seconds of a process that loads, warms up and measures
Result = dict[str, Any]


def job_of(place: Place, case: str, batch: int, checkpointing: str) -> Job:
    """Return lite-dil's measurement, its reference known, as the peers' is."""
    if case == "hh":
        pairs = batch if place.tiny else 2 * batch
        lengths = tuple(tuple(n // 8 + 2 for n in one) for one in cases.HH[:pairs]) if place.tiny else tuple(cases.HH[:pairs])
    else:
        tokens = int(case.split()[-1]) // (16 if place.tiny else 1)
        lengths = ((tokens // 2, tokens - tokens // 2, tokens - tokens // 2),)
    rounds = 1 if place.tiny else 3
    return Job(case, "lite-dil-cached", place.device, place.large, lengths, batch, 4, checkpointing, rounds, "full")  # type: ignore[arg-type]


def alternating(place: Place, jobs: Sequence[Job], repeats: int = REPEATS) -> dict[str, list[Result]]:
    """Measure these in turn, each in a fresh process, as often as time allows; return the results by the jobs' keys."""
    options = argparse.Namespace(threads=os.cpu_count(), python=place.python, timeout=0)
    results: dict[str, list[Result]] = {job.key: [] for job in jobs}
    needed = place.needs(PROCESS)
    for _ in range(repeats):
        for job in jobs:
            found = results[job.key]
            if found and found[-1]["status"] != "ok":
                continue
            left = place.left() - 5  # in which what was measured is written down
            if left < needed:
                found += [] if found else [{"status": "left out", "reason": f"{left:.0f} s were left"}]
                continue
            options.timeout = int(left)
            found.append(benchmark.run(job, options))
            needed = max(needed, found[-1].get("process_seconds", 0.0))
    return results


def rate(results: Sequence[Result]) -> float | None:
    """Return the median pairs a second, or None where there are none."""
    good = [result["pairs_per_second"] for result in results if result["status"] == "ok"]
    return median(good) if good else None


def beside(case: str, batch: int, checkpointing: str, place: Place) -> list[Finding]:
    """Measure lite-dil beside TRL and Unsloth at their best: 16 bits or fused, with the reference precomputed."""
    ours = job_of(place, case, batch, checkpointing)
    matmul = Job("matmul", "matmul", place.device, place.large, ((1, 1, 1),), 1)
    jobs = [ours, *(replace(ours, contestant=name) for name in PEERS), replace(ours, contestant="lite-dil")]
    peak = alternating(place, [matmul], 1)[matmul.key][0]
    results = alternating(place, jobs)
    findings = [own(job, results[job.key], peak) for job in (ours, jobs[-1])]
    here = rate(results[ours.key])
    for job in jobs[1:-1]:
        there, last = rate(results[job.key]), results[job.key][-1]
        what = f"lite-dil-cached by {job.contestant}, pairs/s"
        if here is None or there is None:
            findings.append(Finding(what, f"not run: {last.get('reason', 'lite-dil has no figure')}"))
            continue
        expected = f"at least 1; by tokens computed {fewer(job):.2f}"
        text = f"{here / there:.2f} ({here:.2f} / {there:.2f}; {last['description']})"
        findings.append(Finding(what, text, expected if not place.tiny else "of 8B alone", place.tiny or here >= there))
    return findings


def own(job: Job, results: Sequence[Result], peak: Result) -> Finding:
    """Return lite-dil's pairs and tokens a second, as a part of what the machine's matrix products could do."""
    what, found = f"{job.contestant}, pairs/s", rate(results)
    if found is None or peak["status"] != "ok":
        failed = results[-1] if found is None else peak
        return Finding(
            what, f"{failed['status']}: {failed['reason']}", passed=None if failed["status"] == "left out" else False
        )
    tokens = sum(prompt * 2 + chosen + rejected for prompt, chosen, rejected in job.lengths) / len(job.lengths)
    needed = cases.operations(cases.read_config(job.model), job.lengths, job.rank, job.contestant == "lite-dil")
    share = needed * found / peak["flops"]
    text = f"{found:.2f} ({tokens * found:,.0f} tokens/s, {100 * share:.0f} % of the matrix products' rate)"
    return Finding(what, text, "above 0, at most 100 %", 0 < share <= 1)


def fewer(job: Job) -> float:
    """Return how many times the tokens of a packed step the padded steps of a peer have."""
    parts = [job.lengths[i : i + job.batch] for i in range(0, len(job.lengths), job.batch)]
    plain, packed_tokens = (
        sum(layout_tokens([one[0] for one in part], [list(one[1:]) for one in part], layout) for part in parts)
        for layout in ("plain", "packed")
    )
    return plain / packed_tokens


def head(place: Place) -> list[Finding]:
    """Measure what an 8-bit output head costs in time and saves in memory."""
    whole = job_of(place, "hh", 8, "full")
    eight = replace(whole, head_bits=8)
    results = alternating(place, [whole, eight])
    fast, slow = rate(results[whole.key]), rate(results[eight.key])
    if fast is None or slow is None:
        last = results[whole.key if fast is None else eight.key][-1]
        if last["status"] == "left out":
            raise NotRun(last["reason"])
        return [Finding("pairs/s, 16 bits by 8 bits", f"{last['status']}: {last['reason']}", passed=False)]
    config = cases.read_config(place.large)
    elements = config["vocab_size"] * config["hidden_size"]
    saved = (results[whole.key][-1]["base_bytes"] - results[eight.key][-1]["base_bytes"]) / elements
    findings = [Finding("pairs/s, 16 bits by 8 bits", f"{fast / slow:.3f} ({fast:.2f} / {slow:.2f})", "of 8B alone", True)]
    if not place.tiny:
        findings = [
            at_most("pairs/s, 16 bits by 8 bits", fast / slow, 1.1, "unpacking reads and writes 3 bytes a weight a chunk")
        ]
        text = f"{saved:.3f}"
        findings.append(
            Finding("bytes saved a weight of the head", text, "0.94: 2, less 1 and 4/64", abs(saved - 0.9375) < 0.05)
        )
    return findings


def cold(place: Place) -> list[Finding]:
    """Time the first call of FlexAttention, forward and backward, with nothing compiled before."""
    import torch

    layout = packed(batch_of(LONG), multiple=128)
    tokens = layout.input_ids.shape[1]
    with scratch() as folder:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
        draw = [torch.randn(1, heads, tokens, 128, device="cuda", dtype=getattr(torch, place.dtype)) for heads in (32, 8, 8)]

        def run() -> None:
            leaves = [x.requires_grad_() for x in draw]
            attend(*leaves, layout=layout, place=place, of=(None, None)).float().sum().backward()
            torch.cuda.synchronize()

        first, second = timed(run), timed(run)
    return [
        at_most("first call less the second", first - second, COLD, "a start of training that nobody minds", " s"),
        Finding("second call", f"{1000 * second:.1f} ms", "for comparison", True),
    ]


COLD = 60.0


def timed(run: Callable[[], None]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


CHECKS = [
    Check("FlexAttention compiled cold", cold, 30, cuda=True, alone=True),
    Check("HH, batches of 8, full checkpointing", partial(beside, "hh", 8, "full"), 220, alone=True),
    Check("8-bit head", head, 100, alone=True),
    Check("2 x 1,024, full checkpointing", partial(beside, "2 x 1024", 1, "full"), 220, alone=True),
    Check("HH, batches of 8, no checkpointing", partial(beside, "hh", 8, "off"), 220, alone=True),
]
