"""Numbers and rules shared by the backends and planning, without an array library."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from lite_dil.backends.options import EngineOptions
from lite_dil.base.errors import UserError, gather
from lite_dil.models.options import ModelOptions

CHECKPOINT_FROM = 10**9  # parameters from which gradient checkpointing is on by default

MAX_STRENGTH = 1.5  # of an adapter; far beyond 1 a model breaks down

# torch
TORCH_CHUNK = {"cpu": 2**22, "cuda": 2**24}  # logits at once: 16 or 64 MiB of float32; a GPU needs larger products
HEAD_TILE = 2**14  # tokens of a quantised head unpacked at a time
HEAD_SUMS = 2**25  # size of the (tokens, width) sums per unpacking of a quantised head: 128 MiB of float32
MLP_TILE = 2**25  # size of one intermediate (tokens, width) array of an MLP that is not kept: 64 MiB of bfloat16
NORM_TILE = {"cpu": 2**17, "cuda": 2**24}  # size of a norm's float32 copies of (tokens, width): a CPU's cache, or 64 MiB
OFFLOAD_CHUNK = 2**25  # bytes of pinned memory at a time, a power of two, to which torch's allocator rounds up
FLEX_BLOCK = 128  # FlexAttention's block size; rows on CUDA are padded to a multiple of it
TORCH_QUERIES = 64  # in a block of packed attention on a CPU: its scores over a few hundred keys stay in the cache

# MLX
MLX_CHUNK = 2**22  # logits at once: 16 MiB of float32. Work is queued ahead, so about ten such arrays are live at once
GROUP_SIZE, BITS = 64, 4  # for --4bit
MLX_QUERIES = 256  # of a prompt or response that attend at a time on a CPU, so that later keys cost nothing
COMPILED_MULTIPLE = 64  # tokens; shapes must repeat, or the step is compiled anew for every batch


def check_options(name: str, options: ModelOptions, training: EngineOptions | None) -> None:
    """Raise UserError for options that backend `name`, "cuda", "mlx" or "cpu", does not support; it need not be installed."""
    problems = []
    if name == "mlx" and options.dtype == "float16":
        problems.append("--dtype float16 is for the cuda backend, which scales the loss for it; use bfloat16 with mlx")
    if training is not None:
        problems += _training_problems(name, training)
    if problems:
        heading = f"these options cannot be used with {name}:"
        raise UserError(gather(problems, heading) if len(problems) > 1 else problems[0])


def _training_problems(name: str, config: EngineOptions) -> list[str]:
    shared = "is for the cuda backend; on Apple silicon the GPU uses the computer's own memory already"
    needs_gpu = "is for the cuda backend: it needs a GPU"
    where = shared if name == "mlx" else needs_gpu
    refused = {
        f"--offload-activations {where}": name != "cuda" and config.offload_activations,
        f"--offload-embeddings {where}": name != "cuda" and config.offload_embeddings,
    }
    if name == "mlx":
        eight_bit, stock = config.optim == "paged_adamw_8bit", not config.fused_layers
        refused |= {
            "--optim paged_adamw_8bit is for the cuda and cpu backends; use adamw with mlx": eight_bit,
            "--layout packed is for the cuda and cpu backends; mlx has prefix": config.layout == "packed",
            "--no-fused-layers is for the cuda and cpu backends; mlx has no such layers, leave it out": stock,
        }
    else:
        refused |= {
            f"--layout prefix is for the mlx backend; {name} has packed, which shares prompts too": config.layout == "prefix",
            f"--compile is for the mlx backend; leave it out with {name}": config.compile is not None,
        }
    return [text for text, given in refused.items() if given]


def checkpointing(config: EngineOptions, parameters: int) -> str:
    """Return "off", "selective" or "full": the option, or a default by the number of parameters."""
    if config.gradient_checkpointing == "auto":
        return "full" if parameters >= CHECKPOINT_FROM else "off"
    return config.gradient_checkpointing


def check_strength(value: float) -> float:
    """Return `value` if it is a valid strength of an adapter, else raise UserError."""
    if not 0 <= value <= MAX_STRENGTH:
        raise UserError(f"--strength {value:g}: expected 0 (the bare model) to {MAX_STRENGTH:g}; 1 is the adapter as trained")
    return value


def check_trains(strength: float) -> None:
    """Raise ValueError if a step would train another model than the saved one."""
    if strength != 1:
        raise ValueError(f"the adapter's strength is {strength:g}; training needs 1")


def chunk_tokens(vocabulary: int, elements: int) -> int:
    """Return how many tokens to send through the head at once: at most `elements` logits, but at least 16 tokens."""
    return max(16, elements // vocabulary)


def slices(total: int, size: int) -> Iterator[slice]:
    """Yield slices that split `total` rows into pieces of `size`; the last may be smaller."""
    return (slice(start, min(start + size, total)) for start in range(0, total, max(1, size)))


def check_name(name: str, taken: Collection[str]) -> None:
    """Raise ValueError if no adapter can be added under this name, which is also a folder name."""
    if name in taken:
        raise ValueError(f"adapter {name!r}: the name is taken ({', '.join(taken)}); choose another")
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"adapter {name!r}: expected letters, digits, _ and -, since it is also a folder name")
