"""The models of scripts/gpu_day.py, and what is measured of them: log-probs and gradients under given options."""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from benchmark_cases import HH, Job, read_config, steps_of
from benchmark_models import LLAMA_8B, TINY, make_llama
from benchmark_worker import NotRun, sixteen_bit
from gpu_day_record import Finding, between

from lite_dil.backends import registry
from lite_dil.base.errors import UserError
from lite_dil.base.start import quiet_bars
from lite_dil.batching.batch import Batch
from lite_dil.config.train_config import ResolvedConfig, TrainConfig
from lite_dil.data.encoder import Example
from lite_dil.objectives.criterion import Criterion
from lite_dil.training.step import micro_batches

__all__ = ["NotRun", "Place"]

# A model of real widths that is compared with itself in float32: small enough to be loaded often.
SLICE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32768,
    "max_position_embeddings": 8192,
}
STOCK: dict[str, Any] = {"layout": "plain", "fused_layers": False, "gradient_checkpointing": "off"}


class Measured(NamedTuple):
    """What a step read, (tokens,) and (responses,), and the adapter's gradients before clipping, float32 on the CPU."""

    logps: np.ndarray
    result: Any
    gradients: dict[str, np.ndarray]

    def vector(self) -> np.ndarray:
        """Return all gradients in one."""
        return np.concatenate([self.gradients[name].ravel() for name in sorted(self.gradients)])


class Place:
    """Where checks run: a device, the models, earlier results."""

    def __init__(self, options: argparse.Namespace) -> None:
        from lite_dil.models.find import cache_dir

        self.device, self.tiny = options.device, options.tiny
        self.folder = Path(options.folder) if options.folder else cache_dir()
        self.python = dict(pair.split("=", 1) for pair in options.python)
        self.record = Path(options.json)
        self.limit = float(options.worker[2]) if options.worker else 0.0
        self._measured: dict[str, Measured] = {}

    @cached_property
    def dtype(self) -> str:
        """The 16-bit type that this device computes in; bfloat16 on a CPU, which is slow there and right."""
        return sixteen_bit("cuda") if self.device == "cuda" else "bfloat16"

    @property
    def small(self) -> str:
        """A float32 model."""
        return self._made(self._small)

    @property
    def large(self) -> str:
        """A model of Llama 3.1 8B's shape, in 4 bits."""
        return self._made(self._large)

    @property
    def adapter(self) -> str:
        """A folder with an adapter of the small model that changes something: three steps were taken."""
        return self._made(self._small / "adapter", "adapter_config.json")

    @property
    def _small(self) -> Path:
        return self.folder / f"gpu-day-{'tiny' if self.tiny else 'slice'}"

    @property
    def _large(self) -> Path:
        return self.folder / f"benchmark-{'tiny' if self.tiny else 'llama-8b'}-nf4"

    def _made(self, folder: Path, last: str = "config.json") -> str:
        if not (folder / last).is_file():
            raise UserError(f"{folder} is not there: the check that makes the models failed")
        return str(folder)

    def has_large(self) -> bool:
        """Return whether the large model is there."""
        return (self._large / "config.json").is_file()

    def has_all(self) -> bool:
        """Return whether all models are there."""
        return self.has_large() and (self._small / "adapter" / "adapter_config.json").is_file()

    def make_large(self) -> list[Finding]:
        """Make the large model on the device."""
        shape = TINY if self.tiny else LLAMA_8B
        make_llama(self._large, shape, nf4=True, device=self.device)
        size = sum(file.stat().st_size for file in self._large.glob("*.safetensors"))
        expected = bytes_in_4_bits(shape)
        if self.tiny:
            return [Finding("size of its files", f"{size / 1e6:.1f} MB", "of 8B alone: a toy's are headers")]
        return [between("size of its files", size / 1e9, expected / 1e9, 1.02 * expected / 1e9, "by its shape", " GB")]

    def make_all(self) -> Iterator[Finding]:
        """Make the large model, the small one and its adapter."""
        yield from self.make_large()
        make_llama(self._small, TINY if self.tiny else SLICE, nf4=False)
        folder = self._small / "adapter"
        backend = self.load(**STOCK)
        losses = [self.step(backend, self.pairs(seed=1), 0.01).loss for _ in range(3)]
        folder.mkdir(exist_ok=True)
        backend.save_adapter(folder)
        less = losses[0] - losses[2]
        yield Finding("two steps on the same pairs, lsif", f"the loss is {less:.3g} less", "it is less", less > 0)

    def vocabulary(self, model: str) -> int:
        """Return how many tokens a model knows."""
        return int(read_config(model)["vocab_size"])

    def config(self, **changes: Any) -> ResolvedConfig:
        """Return the options of a training on the small model, float32 and with an adapter that is not fresh unless said."""
        if "model" not in changes:
            changes["model"] = self.small
        options = {"backend": self.device, "dtype": "float32", "max_length": 2048, "optim": "adamw"}
        config = TrainConfig(**{**options, **changes})
        config.check()
        return config.resolved()

    def load(self, **changes: Any) -> Any:
        """Load a backend with these options."""
        return self.open(self.config(**changes))

    def open(self, config: ResolvedConfig) -> Any:
        """Load a backend as in a new process: torch keeps eight variants of a compiled function, and one run has fewer."""
        import torch

        quiet_bars()
        torch.compiler.reset()
        self.free()
        return registry.load(self.device, config, config.model, config, config)

    def free(self) -> None:
        """Free memory that nothing uses."""
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()

    def pairs(self, count: int = 8, seed: int = 0) -> list[Example]:
        """Return pairs of random tokens: on toys short, else as long as those of HH helpful."""
        draw = np.random.default_rng(seed)
        lengths = [tuple(int(n) for n in draw.integers(3, 24, 3)) for _ in range(count)] if self.tiny else HH[:count]
        job = Job("hh", "", self.device, self.small, tuple(lengths), count)  # type: ignore[arg-type]
        return steps_of(job, self.vocabulary(self.small))[0][-1]

    def step(self, backend: Any, examples: Sequence[Example], rate: float) -> Any:
        """Take a step of lsif, all examples in one pass."""
        criterion = Criterion(self.config(), examples)
        return backend.step(micro_batches([Batch.of(examples)], criterion), criterion, rate)

    def measured(self, **changes: Any) -> Measured:
        """Return log-probs and gradients on the trained adapter under these options; computed once a process."""
        key = repr(sorted(changes.items()))
        if key not in self._measured:
            backend = self.load(init_adapter=self.adapter, reference="base", **changes)
            examples = self.pairs()
            logps = backend.token_logps(Batch.of(examples))
            with gradients(backend) as taken:
                result = self.step(backend, examples, 0.0)
            self._measured[key] = Measured(logps, result, taken)
        return self._measured[key]


@contextmanager
def gradients(backend: Any) -> Iterator[dict[str, np.ndarray]]:
    """Record the gradients of the policy's weights that a step in this block accumulates, divided by the loss scale."""
    policy, taken, hooks = backend.adapters["policy"], {}, []
    scale = policy.scaler.get_scale()

    def keep(name: str) -> Any:
        def hook(parameter: Any) -> None:
            taken[name] = parameter.grad.float().cpu().numpy() / scale

        return hook

    try:
        for name, parameter in policy.weights.items():
            hooks.append(parameter.register_post_accumulate_grad_hook(keep(name)))
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a folder that is deleted after the block."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def saved_adapter(backend: Any) -> dict[str, np.ndarray]:
    """Return the policy's weights, as they would be saved."""
    return {name: weight.detach().float().cpu().numpy().copy() for name, weight in backend.adapters["policy"].weights.items()}


def bytes_in_4_bits(shape: dict[str, Any]) -> float:
    """Return the bytes of a Llama's weights in NF4: table, head and norms have two each."""
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    linear = layers * hidden * (2 * hidden + 2 * keys + 3 * inner)
    # Half a byte, a byte of scale for 64 weights, and four of that scale's own for 256 of these.
    return linear * (1 / 2 + 1 / 64 + 4 / 64 / 256) + 2 * hidden * (2 * shape["vocab_size"] + 2 * layers + 1)


def worst(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Return the largest difference between arrays of the same names."""
    if one.keys() != other.keys():
        return float("inf")
    return max(float(np.abs(value - other[name]).max()) for name, value in one.items())
