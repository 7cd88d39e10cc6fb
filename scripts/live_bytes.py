"""Compare the peak of live tensor bytes in training steps with the estimate of `lite_dil.planning.estimate`.

    python scripts/live_bytes.py --model smollm2-135m --max-length 256 --gradient-checkpointing full

Takes the flags of `lite-dil train`. The pass is the largest that --max-length, --row-tokens and --batch-size allow, of random
tokens, or given by --lengths. A process's resident set would say little: importing torch and transformers alone costs
400 MB. With --backend cpu all allocations and frees of torch's allocator are counted; with cuda and mlx it is the
allocator's own peak.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from lite_dil.backends import registry
from lite_dil.backends.types import Head
from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.config.options import add_flags, build
from lite_dil.config.train_config import FIELDS, ResolvedConfig
from lite_dil.data.encoder import Example
from lite_dil.models.find import resolve_model
from lite_dil.models.listing import ListedModel
from lite_dil.objectives.criterion import Criterion
from lite_dil.objectives.reward_criterion import RewardCriterion
from lite_dil.objectives.reward_table import is_reward
from lite_dil.planning.estimate import Estimate, Load
from lite_dil.planning.estimate_mlx import MLXStep
from lite_dil.planning.known import read_model
from lite_dil.planning.peak import estimate
from lite_dil.training.step import micro_batches

SLACK = 2**16  # bytes of small tensors on which the two ways of counting may differ


def live_bytes() -> int:
    """Return the bytes of all tensors that Python can see now, counting each storage once."""
    gc.collect()
    found = (x for x in gc.get_objects() if issubclass(type(x), torch.Tensor))
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values())


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the peak of live CPU tensor bytes while `run` runs, including tensors that existed before.

    Raises:
        RuntimeError: the count is inconsistent: the bytes live afterwards are not those before plus the changes.
    """
    before = live_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    totals = np.cumsum([0, *(event.nbytes() for event in events)])
    after = live_bytes()
    if abs(int(totals[-1]) - (after - before)) > SLACK:
        raise RuntimeError(f"{totals[-1]} bytes by the allocator's count, {after - before} by the tensors that are left")
    return before + int(totals.max())


class Measured(NamedTuple):
    """Peaks of live bytes of the first step and of a later one, when the optimiser has its state, and the estimate.

    Memory that the process held before loading the model, such as an earlier model, is not counted.
    """

    first: int
    later: int
    estimate: Estimate


def cuda_peak_bytes(run: Callable[[], Any]) -> int:
    """Return the same as `peak_bytes`, from torch's allocator on the GPU."""
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def mlx_peak_bytes(run: Callable[[], Any]) -> int:
    """Return the same, from MLX's allocator."""
    import mlx.core as mx

    mx.clear_cache()  # a reused buffer counts with its full size
    mx.reset_peak_memory()
    run()
    return max(mx.get_peak_memory(), mx.get_active_memory())  # the first is 0 if nothing was allocated


def nothing() -> None:
    """Do nothing, so that the peak is the memory in use."""


def measure(config: ResolvedConfig, load: Load) -> Measured:
    """Take two steps of random tokens with these lengths."""
    name = registry.resolve(config.backend)
    peak = {"cpu": peak_bytes, "cuda": cuda_peak_bytes, "mlx": mlx_peak_bytes}[name]
    gc.collect()
    before = peak(nothing)
    backend = registry.load(name, config, resolve_model(config.model), config, config)
    shape, resolved = read_model(config.model), replace(config, layout=backend.layout)
    shape = replace(shape, exact=True) if isinstance(shape, ListedModel) else shape
    if name == "mlx":
        if isinstance(shape, ListedModel):
            raise UserError(f"--model {config.model}: on mlx plan knows dense models alone")
        of_step = MLXStep(resolved, shape, backend.dtype_name, load, metal=platform.system() == "Darwin")
        said = of_step.estimate()
    else:
        said = estimate(resolved, shape, name, backend.dtype_name, load)
    examples = random_examples(load, shape.vocabulary)
    criterion = RewardCriterion(config, examples) if is_reward(config.loss) else Criterion(config, examples)
    if isinstance(criterion, RewardCriterion):
        backend.set_head(Head(criterion.outputs))
    batches = [Batch.of(examples)] * config.gradient_accumulation_steps

    def step() -> None:
        backend.step(micro_batches(batches, criterion), criterion, 1e-5)

    return Measured(peak(step) - before, peak(step) - before, said)


def random_examples(load: Load, vocabulary: int) -> list[Example]:
    """Return examples of the load's lengths, alternately chosen and rejected."""
    draw = np.random.default_rng(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.integers(3, vocabulary, length).tolist())

    return [
        Example(ids(prompt), tuple(map(ids, answers)), tuple(1 - 2 * (i % 2) for i in range(len(answers))))
        for prompt, answers in zip(load.prompts, load.responses, strict=True)
    ]


def lengths(text: str) -> Load:
    """Parse ``300:100:80,20:5:7``: tokens of each pair's prompt and responses."""
    try:
        pairs = [tuple(map(int, pair.split(":"))) for pair in text.split(",")]
    except ValueError:
        pairs = []
    if not pairs or any(len(pair) < 2 or min(pair) < 1 for pair in pairs):
        raise UserError(f"--lengths is {text!r}; expected prompt:chosen:rejected in tokens, such as 300:100:80,20:5:7")
    return Load(tuple(pair[0] for pair in pairs), tuple(pair[1:] for pair in pairs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--lengths", help="prompt:chosen:rejected tokens of the pass's pairs, such as 300:100:80,20:5:7")
    args = parser.parse_args()
    try:
        config = build({name: value for name, value in vars(args).items() if name in FIELDS}, {"backend": "cpu"})
        load = lengths(args.lengths) if args.lengths else Load.worst(config)
        measured = measure(config, load)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    said = measured.estimate
    print(f"pass: prompts {load.prompts}, answers {load.responses} tokens; peak in phase: {said.phase}")
    for name, size in said.components.items():
        print(f"  {name:12}{size / 2**20:10.1f} MiB")
    for name, size, expected in (
        ("first step", measured.first, said.total - said.optimizer),
        ("later step", measured.later, said.total),
    ):
        print(f"{name}: measured {size / 2**20:.1f} MiB, estimated {expected / 2**20:.1f} MiB, ratio {expected / size:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
