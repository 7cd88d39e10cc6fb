"""The process of one measurement of scripts/benchmark.py: the clock, the memory gauge, and lite-dil's own contestants."""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_cases import Job, read_config, steps_of

from lite_dil.base.memory import peak_rss_mb
from lite_dil.batching.batch import Batch
from lite_dil.batching.options import ResolvedSchedule
from lite_dil.batching.schedule import Schedule, plan
from lite_dil.data.encoder import Example


class NotRun(Exception):
    """A contestant does not run here; the reason is shown in the table."""


@dataclass(frozen=True)
class Contestant:
    """A contestant: `module.function` drives it, and it needs `packages` to be importable."""

    module: str
    function: str
    packages: tuple[str, ...] = ()
    install: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    reference_pass: bool = True  # whether its timed steps compute the reference
    about: str = ""


_TRL = ("trl", "datasets")
CONTESTANTS = {
    "lite-dil": Contestant("benchmark_worker", "lite_dil", (), "", ("cpu", "cuda", "mlx"), about="layout auto, first epoch"),
    "lite-dil-cached": Contestant(
        "benchmark_worker",
        "lite_dil",
        (),
        "",
        ("cpu", "cuda", "mlx"),
        False,
        "the same from the second epoch: reference known",
    ),
    "lite-dil-plain": Contestant(
        "benchmark_worker", "lite_dil", (), "", ("cpu", "cuda", "mlx"), about="layout plain, stock layers, first epoch"
    ),
    "lite-dil-lean": Contestant(
        "benchmark_worker",
        "lite_dil",
        (),
        "",
        ("cpu", "cuda"),
        about="full checkpointing, embeddings and activations offloaded",
    ),
    "trl": Contestant("benchmark_peers", "trl", _TRL, "trl datasets", about="DPOTrainer with its defaults"),
    "trl-best": Contestant(
        "benchmark_peers", "trl", _TRL, "trl datasets", reference_pass=False, about="16-bit weights, precomputed reference"
    ),
    "trl-sorted": Contestant(
        "benchmark_peers", "trl", _TRL, "trl datasets", reference_pass=False, about="trl-best on pairs sorted by length"
    ),
    "unsloth": Contestant("benchmark_peers", "unsloth", ("unsloth",), "unsloth", ("cuda",), about="DPOTrainer, its defaults"),
    "unsloth-best": Contestant(
        "benchmark_peers", "unsloth", ("unsloth",), "unsloth", ("cuda",), False, "fused loss, precomputed reference"
    ),
    "mlx-lm-lora": Contestant(
        "benchmark_peers", "mlx_lm_lora", ("mlx_lm_lora",), "mlx-lm-lora", ("mlx",), about="train_dpo with its defaults"
    ),
    "two-models": Contestant(
        "benchmark_peers",
        "two_models",
        ("mlx_lm",),
        "mlx-lm",
        ("mlx",),
        about="textbook MLX: padded, whole logits, second model",
    ),
    "unsloth-mlx": Contestant(
        "benchmark_peers", "unsloth_mlx", ("unsloth_zoo",), "unsloth", ("mlx",), about="MLXDPOTrainer with its defaults"
    ),
    "matmul": Contestant(
        "benchmark_worker", "matmul", (), "", ("cpu", "cuda", "mlx"), about="the machine's matrix-product rate"
    ),
}


class Meter:
    """Times steps and measures the peak of memory above the memory in use when the first timed step begins.

    That is the model, the adapter, the optimiser and its state. Memory is the process's resident memory on a CPU
    (Linux's high-water mark, else getrusage's), and the allocator's on CUDA and MLX.
    """

    def __init__(self, device: str, warmup: int) -> None:
        self.device, self.warmup = device, warmup
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []  # of all threads: steadier on a busy machine
        self.began = 0
        self.base = self.top = 0.0
        self.gauge = _rss_gauge() if device == "cpu" else device

    def begin(self) -> None:
        """Start a step."""
        if self.began == self.warmup:
            self._baseline()
        self.began += 1
        self._synchronize()
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """End a step."""
        self._synchronize()
        if self.began > self.warmup:
            self.seconds.append(time.perf_counter() - self.start)
            self.cpu_seconds.append(time.process_time() - self.cpu_start)
            self.top = self.peak()

    def peak(self) -> float:
        """Return the total bytes in use at the peak since the first timed step."""
        if self.device == "cuda":
            import torch

            return float(torch.cuda.max_memory_allocated())
        if self.device == "mlx":
            import mlx.core as mx

            return float(mx.get_peak_memory())
        return _status("VmHWM") if self.gauge == "VmHWM" else peak_rss_mb() * 2**20

    def _baseline(self) -> None:
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = float(torch.cuda.memory_allocated())
        elif self.device == "mlx":
            import mlx.core as mx

            mx.clear_cache()
            mx.reset_peak_memory()
            self.base = float(mx.get_active_memory())
        else:
            with suppress(OSError, AttributeError):  # frees loading's garbage, which would hide the peak
                ctypes.CDLL("libc.so.6").malloc_trim(0)
            if self.gauge == "VmHWM":
                Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
                self.base = _status("VmRSS")
            else:
                self.base = peak_rss_mb() * 2**20

    def _synchronize(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()


def _rss_gauge() -> str:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return "VmHWM"
    return "getrusage"


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024.0 * int(line.split()[1])
    return 0.0


def measure(job: Job) -> dict[str, Any]:
    """Run a job in this process; return its result, ready for JSON."""
    who = CONTESTANTS[job.contestant]
    try:
        missing = [name for name in who.packages if importlib.util.find_spec(name) is None]
        if job.contestant == "unsloth-mlx" and platform.system() != "Darwin":
            command = "python scripts/benchmark.py --case mlx --contestant lite-dil unsloth-mlx"
            raise NotRun(f"needs a Mac; there: pip install unsloth; {command}")
        if job.device not in who.devices:
            raise NotRun("needs a GPU" if who.devices == ("cuda",) else f"runs on {', '.join(who.devices)} only")
        if missing:
            raise NotRun(f"not installed: pip install {who.install}")
        prepare(job)
        steps, warmup = steps_of(job, read_config(job.model)["vocab_size"])
        meter = Meter(job.device, warmup)
        driver = getattr(importlib.import_module(who.module), who.function)
        told = driver(job, steps, meter)
    except (NotRun, ImportError) as error:
        return {"status": "not run", "reason": str(error)}
    except (MemoryError, RuntimeError) as error:  # any other error ends the process, and its last line is the reason
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return {"status": "out of memory", "reason": str(error).strip().partition("\n")[0]}
    result: dict[str, Any] = {"status": "ok", **told}
    if meter.seconds:
        each = np.array(meter.seconds).reshape(job.rounds, -1)
        result["seconds"], result["cpu_seconds"] = each.tolist(), meter.cpu_seconds
        result["pairs_per_second"] = len(job.lengths) / float(np.median(each, axis=0).sum())
        result["base_bytes"], result["peak_bytes"] = meter.base, meter.top
        result["gauge"] = meter.gauge
    return result


def prepare(job: Job) -> None:
    """Make the settings that must precede loading a library, the same for all contestants."""
    if job.device == "mlx":
        with suppress(OSError):  # with it, if installed, MLX on a Linux CPU multiplies matrices 20 times faster
            ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    if job.device == "cuda" and job.memory_limit:
        import torch

        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.memory_limit * 2**30 / total))


def sixteen_bit(device: str) -> str:
    """Return the type of this machine's matrix units, which --dtype auto chooses."""
    if device == "mlx":
        import mlx.core as mx

        return "bfloat16" if mx.metal.is_available() else "float32"
    import torch

    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def lite_dil(job: Job, steps: Sequence[Sequence[Example]], meter: Meter) -> dict[str, Any]:
    """Take a training's own steps, without its data and files."""
    from lite_dil.backends import registry
    from lite_dil.config.train_config import TrainConfig
    from lite_dil.objectives.criterion import Criterion
    from lite_dil.training.passes import Passes
    from lite_dil.training.reference_cache import ReferenceCache
    from lite_dil.training.step import take_step

    longest = max(prompt + max(answers) for prompt, *answers in job.lengths)
    config = TrainConfig(
        model=job.model,
        backend=job.device,
        load_in_4bit=job.bits == 4,
        dtype=sixteen_bit(job.device),
        max_length=max(1024, longest, job.longest_cap),
        loss=job.loss,
        lora_r=job.rank,
        batch_size=job.batch,
        gradient_accumulation_steps=1,
        gradient_checkpointing=job.checkpointing,
        head_bits=job.head_bits,
        **_engine(job),
    ).resolved()
    backend = registry.load(job.device, config, job.model, config, config)
    criterion = Criterion(config, [example for step in steps for example in step])

    def take(schedule: Schedule, passes: Passes, step: int = 1) -> int:
        return len(take_step(passes, schedule, step, criterion, print, dropout=False).batches)

    def passes() -> Passes:
        return Passes(backend, config.logp_reduction, ReferenceCache(None, {}), print)

    if job.longest:
        found = _longest(job, lambda step: take(_Given(config, [step], backend.layout), passes()))
        return {"longest": found, "peak_bytes": meter.peak()}
    schedule, known = _Given(config, steps, backend.layout), passes()
    cached = job.contestant == "lite-dil-cached"
    for batch in [batch for step in range(len(steps)) for batch in schedule.batches(step + 1)] if cached else []:
        known.reference(batch)
    for step in range(len(steps)):
        fresh = known if cached else passes()  # a later round is a first epoch again
        meter.begin()
        count = take(schedule, fresh, step + 1)
        meter.end()
    return {"description": backend.description, "passes": count}


class _Given(Schedule):
    """A schedule of given steps, in their order, at one learning rate."""

    def __init__(self, options: ResolvedSchedule, steps: Sequence[Sequence[Example]], layout: str) -> None:
        super().__init__(options, [example for step in steps for example in step], layout)
        self.given = steps

    def batches(self, step: int) -> list[Batch]:
        return plan(self.given[step - 1], self.layout, *self.limits)

    def learning_rate(self, step: int) -> float:
        return self.options.learning_rate


def _engine(job: Job) -> dict[str, Any]:
    if job.contestant == "lite-dil-plain":
        return {"layout": "plain", "fused_layers": job.device == "mlx"}  # which has none to turn off
    if job.contestant == "lite-dil-lean" and job.device == "cuda":
        return {"offload_activations": True, "offload_embeddings": True}
    return {}


def _longest(job: Job, step: Any) -> int:
    """Return the tokens per sequence of the longest pair that trains, by doubling, then halving the gap to within 3%."""
    from lite_dil.base.errors import OutOfMemory

    def fits(tokens: int) -> bool:
        half = (tokens // 2, tokens - tokens // 2, tokens - tokens // 2)
        pair = replace(job, lengths=(half,), warmup="full", rounds=0)
        done = True
        try:
            step(steps_of(pair, 1000)[0][0])
        except (OutOfMemory, MemoryError):
            done = False
        if not done:  # only here the exception no longer holds its frames
            gc.collect()
            if job.device == "cuda":
                import torch

                torch.cuda.empty_cache()
        return done

    low, high = 0, 512 if job.longest_cap >= 1024 else 32
    while high <= job.longest_cap and fits(high):
        low, high = high, 2 * high
    if high > job.longest_cap:
        return low
    while high - low > max(16, low // 32):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def matmul(job: Job, steps: Any, meter: Meter) -> dict[str, Any]:
    """Time the model's dominant product: many tokens by the MLP's matrix, in training's type."""
    config, dtype = read_config(job.model), sixteen_bit(job.device)
    shape = (4096 if job.device == "cuda" else 1024, config["hidden_size"], config["intermediate_size"])
    if job.device == "mlx":
        import mlx.core as mx

        a, b = mx.random.normal(shape[:2]).astype(getattr(mx, dtype)), mx.random.normal(shape[1:]).astype(getattr(mx, dtype))

        def product() -> None:
            mx.eval(a @ b)
    else:
        import torch

        a, b = (torch.randn(size, dtype=getattr(torch, dtype), device=job.device) for size in (shape[:2], shape[1:]))

        def product() -> None:
            a @ b
            if job.device == "cuda":
                torch.cuda.synchronize()

    times: list[float] = []
    until = time.perf_counter() + 2
    while time.perf_counter() < until or len(times) < 10:
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    best = float(np.percentile(times, 10))  # the machine's rate, without the load of others
    return {"flops": 2.0 * shape[0] * shape[1] * shape[2] / best, "description": f"{' x '.join(map(str, shape))} {dtype}"}
