"""The backends: one small protocol, implemented on torch (``cuda``, ``cpu``) and on MLX (``mlx``).

Nothing here imports an array library; `load` imports the one that is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from lite_dil.base.errors import UserError, gather
from lite_dil.config.train_config import TrainConfig

if TYPE_CHECKING:  # the command line's help comes from here too, and numpy takes longer than the rest of it
    import numpy as np

    from lite_dil.batching.batch import Batch
    from lite_dil.objectives.criterion import Criterion

CHECKPOINT_FROM = 10**9  # parameters from which gradient checkpointing is on unless said otherwise

MAX_STRENGTH = 1.5  # of an adapter; far beyond what was trained a model falls apart

INSTALL = {
    "cuda": 'pip install "lite-dil[cuda]"',
    "cpu": 'pip install "lite-dil[cpu]"',
    "mlx": 'pip install "lite-dil[mlx]"',
}


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step leaves for the metrics.

    `policy` and `reference` are summed log-probs in nats, float32, shape (responses,), in the order of the batches; `loss` is
    the mean over the examples; `grad_norm` is taken before clipping; `skipped` is true, and `grad_norm` 0, where float16's
    loss scaling found an overflow and left the weights alone.
    """

    loss: float
    grad_norm: float
    policy: np.ndarray
    reference: np.ndarray
    skipped: bool = False


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's distribution.

    The logits are divided by `temperature`, of which 0 takes the likeliest token; then only the likeliest tokens are kept, the
    fewest whose probability reaches `top_p`. The defaults draw from exactly the model's own distribution.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature {self.temperature:g}: expected at least 0, which takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p:g}: expected above 0 and at most 1, which cuts nothing off")


OWN = Sampling()  # the model's own distribution


def never() -> bool:
    """Return false: nothing stops a generation."""
    return False


class Answer(NamedTuple):
    """A generated continuation of a prompt.

    `ids` are the new tokens up to and without the end token; `end` is the end token that closed it, or None where it reached
    the limit first. The end token is one of the new tokens that the limit counts, so `end` is None exactly where there are as
    many `ids` as the limit allows.
    """

    ids: list[int]
    end: int | None

    @classmethod
    def of(cls, tokens: list[int], end_ids: Sequence[int]) -> Answer:
        """Cut what was generated at the first of `end_ids`."""
        at = next((i for i, token in enumerate(tokens) if token in end_ids), None)
        return cls(tokens, None) if at is None else cls(tokens[:at], tokens[at])


class Backend(Protocol):
    """A frozen base model with a trainable LoRA adapter, and the reference that is the same model with the adapter off."""

    name: str
    description: str  # device, dtype and quantisation, for people
    dtype_name: str  # what --dtype auto came to
    layout: str  # "plain", "packed" or "prefix"
    layout_reason: str  # a sentence for people where auto could not take the sharing layout, else nothing
    strength: float  # what the policy's adapter is multiplied by; see set_strength
    identity: str  # what the reference's log-probs depend on beside the checkpoint: library, dtype, quantisation

    def adapter_off(self) -> AbstractContextManager[None]:
        """Make the model the reference inside the block, and the policy again after it, also after an exception."""

    def token_logps(self, batch: Batch) -> np.ndarray:
        """Return log-probs of all response tokens under the policy (or the reference, inside `adapter_off`), without dropout.

        Shape (tokens,), float32, in nats, in the order of the batch's responses. Raises OutOfMemory, as `sequence_logps` and
        `generate` do, where the device does not hold it all at once and fewer examples may fit.
        """

    def sequence_logps(self, batch: Batch) -> np.ndarray:
        """Like `token_logps`, summed over each response: shape (responses,)."""

    def step(
        self,
        batches: Sequence[Batch],
        criterion: Criterion,
        learning_rate: float,
        references: Sequence[np.ndarray | None] | None = None,
        baseline: float = 0.0,
    ) -> StepResult:
        """Take one AdamW step on the mean loss over all examples of the micro-batches.

        Args:
            references: for each micro-batch the reference's summed log-probs, (responses,) float32, where they are known;
                the others are computed on the way.
            baseline: kto's z0; see `Criterion.inputs`.

        Raises OutOfMemory where the device does not hold it, with everything as it was before the step and its memory freed.
        """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_ids: Sequence[int],
        seeds: Sequence[int] | None = None,
        sampling: Sampling = OWN,
        stop: Callable[[], bool] = never,
    ) -> list[Answer]:
        """Continue the prompts as the policy (or the reference, inside `adapter_off`), without dropout.

        Args:
            max_new_tokens: of an answer at most, its end token counted; at least 1.
            end_ids: the tokens that end an answer, at least one.
            seeds: None takes the likeliest token each time. Otherwise one number below 2^64 a prompt: each answer is a draw,
                by default from exactly the model's own distribution, whatever settings the checkpoint comes with. A prompt's
                draw is decided by its seed and not by the prompts beside it (but for the rounding of a batch of another
                shape); the training's random state is left alone.
            sampling: how to draw where there are seeds.
            stop: asked between tokens; where it returns true the answers end as they are.
        """

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        end_ids: Sequence[int],
        seed: int | None = None,
        sampling: Sampling = OWN,
    ) -> Iterator[int]:
        """Continue one prompt as `generate` does, and yield each token when it is made, the end token last.

        Each `next` computes as the policy, or as the reference inside `adapter_off`, whichever it is called in; it must be
        the same for all of a stream. Other streams and passes may come between. Raises OutOfMemory from `next`.
        """

    def set_strength(self, value: float) -> None:
        """Multiply the policy's adapter by `value`, 0 to 1.5: 0 is exactly the base, 1, the default, the adapter as trained.

        For inference: `step` raises ValueError at any strength but 1. The reference and what is saved do not change.
        """

    def save_adapter(self, folder: Path) -> None:
        """Write the policy's adapter in this library's own format."""

    def save_state(self, folder: Path) -> None:
        """Write adapter, optimiser and random state, for `load_state`."""

    def load_state(self, folder: Path) -> None:
        """Go on exactly where `save_state` was called."""

    def peak_memory_mb(self) -> float:
        """Return the peak so far in MiB: of the device's allocator, or of the process on a CPU."""


def resolve(name: str) -> str:
    """Return the backend that `name` stands for on this machine, or raise UserError with the fix."""
    if name == "auto":
        return _best()
    if name == "mlx":
        if importlib.util.find_spec("mlx") is None or importlib.util.find_spec("mlx_lm") is None:
            raise UserError(f"--backend mlx: mlx and mlx-lm are not installed: {INSTALL['mlx']}")
        return name
    missing = [module for module in ("torch", "peft") if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"--backend {name}: {' and '.join(missing)} not installed: {INSTALL[name]}")
    if name == "cuda" and not _has_cuda():
        raise UserError("--backend cuda: torch finds no CUDA GPU here; use --backend cpu, or install a CUDA build of torch")
    return name


def _best() -> str:
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    if apple and importlib.util.find_spec("mlx_lm") is not None:
        return "mlx"
    if importlib.util.find_spec("torch") is not None and importlib.util.find_spec("peft") is not None:
        return "cuda" if _has_cuda() else "cpu"
    if importlib.util.find_spec("mlx_lm") is not None:
        return "mlx"
    best = "mlx" if apple else "cpu"
    raise UserError(f"no backend is installed: {INSTALL[best]}" + ("" if apple else f" (with a GPU: {INSTALL['cuda']})"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def check_options(name: str, config: TrainConfig) -> None:
    """Raise UserError for options that backend `name`, "cuda", "mlx" or "cpu", cannot honour; it need not be installed."""
    shared = "is for the cuda backend; on Apple silicon the GPU uses the computer's own memory already"
    needs_gpu = "is for the cuda backend: it needs a GPU"
    where = shared if name == "mlx" else needs_gpu
    refused = {
        f"--offload-activations {where}": name != "cuda" and config.offload_activations,
        f"--offload-embeddings {where}": name != "cuda" and config.offload_embeddings,
    }
    if name == "mlx":
        eight_bit, half, stock = config.optim == "paged_adamw_8bit", config.dtype == "float16", not config.fused_layers
        refused |= {
            "--optim paged_adamw_8bit is for the cuda and cpu backends; use adamw with mlx": eight_bit,
            "--dtype float16 is for the cuda backend, which scales the loss for it; use bfloat16 with mlx": half,
            "--layout packed is for the cuda and cpu backends; mlx has prefix": config.layout == "packed",
            "--no-fused-layers is for the cuda and cpu backends; mlx has no such layers, leave it out": stock,
        }
    else:
        refused |= {
            f"--layout prefix is for the mlx backend; {name} has packed, which shares prompts too": config.layout == "prefix",
            f"--compile is for the mlx backend; leave it out with {name}": config.compile is not None,
        }
    problems = [text for text, given in refused.items() if given]
    if problems:
        heading = f"these options cannot be used with {name}:"
        raise UserError(gather(problems, heading) if len(problems) > 1 else problems[0])


def prepare(name: str, config: TrainConfig) -> None:
    """Import what must come before transformers, that is unsloth, if the run on backend `name` asks for it.

    Raises UserError where it cannot be used.
    """
    if config.unsloth:
        from lite_dil.backends.torch import unsloth as torch_unsloth

        torch_unsloth.check(config, name if name in ("cpu", "mlx") else resolve(name))
        torch_unsloth.require()


def import_library(name: str) -> None:
    """Import what backend `name` is made of, as `load` would: what it takes of the memory is not the model's."""
    importlib.import_module(f"lite_dil.backends.{'mlx' if name == 'mlx' else 'torch'}.backend")


def load(name: str, config: TrainConfig, model: str) -> Backend:
    """Load `model` (a folder or hub id) with a trainable adapter on backend `name`, "cuda", "cpu" or "mlx"."""
    prepare(name, config)
    if name == "mlx":
        from lite_dil.backends.mlx.backend import MLXBackend

        return MLXBackend(config, model)
    from lite_dil.backends.torch.backend import TorchBackend

    return TorchBackend(config, model, device=name)


def checkpointing(config: TrainConfig, parameters: int) -> str:
    """Return "off", "selective" or "full": as asked, or by the number of parameters."""
    if config.gradient_checkpointing == "auto":
        return "full" if parameters >= CHECKPOINT_FROM else "off"
    return config.gradient_checkpointing


def check_strength(value: float) -> float:
    """Return a strength of the adapter, or raise UserError."""
    if not 0 <= value <= MAX_STRENGTH:
        raise UserError(f"--strength {value:g}: expected 0 (the bare model) to {MAX_STRENGTH:g}; 1 is the adapter as trained")
    return value


def check_trains(strength: float) -> None:
    """Raise ValueError where a step would train another model than the one that is saved."""
    if strength != 1:
        raise ValueError(f"the adapter's strength is {strength:g}; training needs 1")


@contextmanager
def switched(set_reference: Callable[[bool], None]) -> Iterator[None]:
    """Run a block with the reference switched on, and switch back to the policy whatever happens in it."""
    set_reference(True)
    try:
        yield
    finally:
        set_reference(False)
