"""Find the backends of this machine and load one; a backend's modules are imported only then."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_dil.backends.head_files import has_head
from lite_dil.base.errors import UserError
from lite_dil.base.install import install
from lite_dil.runs.folder import recorded_with

if TYPE_CHECKING:
    import numpy as np

    from lite_dil.backends.options import EngineOptions
    from lite_dil.backends.protocol import Backend
    from lite_dil.models.options import ModelOptions, ResolvedAdapter


def resolve(name: str) -> str:
    """Return the backend that `name` means on this machine, or raise UserError with the fix."""
    if name == "auto":
        return _best()
    if name == "mlx":
        if importlib.util.find_spec("mlx") is None or importlib.util.find_spec("mlx_lm") is None:
            raise UserError(f"--backend mlx: mlx and mlx-lm are not installed: {install('mlx')}")
        return name
    missing = [module for module in ("torch", "peft") if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"--backend {name}: {' and '.join(missing)} not installed: {install(name)}")
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
    raise UserError(f"no backend is installed: {install(best)}" + ("" if apple else f" (with a GPU: {install('cuda')})"))


def _has_cuda() -> bool:
    from lite_dil.backends.torch.device import has_cuda

    return has_cuda()


def auto_dtype(name: str, here: bool = True) -> str:
    """Return the dtype of ``--dtype auto`` on backend `name`, as far as known; a Mac other than this machine has bfloat16."""
    if here and name == "mlx" and importlib.util.find_spec("mlx") is not None:
        from lite_dil.backends.mlx import device

        return device.auto_dtype()
    if name != "mlx" and importlib.util.find_spec("torch") is not None and (name == "cpu" or _has_cuda()):
        from lite_dil.backends.torch.device import compute_dtype

        return str(compute_dtype("auto", name)).removeprefix("torch.")
    return "float32" if name == "cpu" else "bfloat16"


def prepare(name: str, options: ModelOptions, training: EngineOptions | None) -> None:
    """Import unsloth, which must come before transformers, if the run on backend `name` uses it.

    Raises UserError if it cannot be used.
    """
    if training is not None and training.unsloth:
        from lite_dil.backends.torch import unsloth as torch_unsloth

        torch_unsloth.check(options, training, name if name in ("cpu", "mlx") else resolve(name))
        torch_unsloth.require()


def module(name: str, part: str) -> Any:
    """Import the module `part` of backend `name`, such as "export" or "memory"."""
    return importlib.import_module(f"lite_dil.backends.{'mlx' if name == 'mlx' else 'torch'}.{part}")


def import_library(name: str) -> str:
    """Import backend `name` as `load` does, so that its memory is not counted as the model's.

    Returns a sentence for the user if part of the setup fails, else an empty string.
    """
    module(name, "backend")
    if name != "cuda":
        return ""
    from lite_dil.backends.torch.memory import expand_segments

    return expand_segments()


def load(
    name: str,
    options: ModelOptions,
    model: str,
    adapter: ResolvedAdapter | None,
    training: EngineOptions | None,
    say: Callable[[str], None] | None = None,
    in_files: bool = False,
) -> Backend:
    """Load `model` (a folder or hub id) on backend `name`, "cuda", "cpu" or "mlx".

    Args:
        adapter: the policy's adapter; None makes the bare base the policy.
        training: options for training; None loads it for inference, without what only training needs.
        say: shows a line to the user: what `import_library` remarks, what could not be checked, slow work without progress.
        in_files: on a CPU leave full weights in the model's files, from which each pass reads them: slower, in little memory.

    Raises UserError if the model or the adapter cannot be loaded, or is damaged.
    """
    if adapter is not None and adapter.init_adapter:
        recorded_with(Path(adapter.init_adapter))
        if has_head(Path(adapter.init_adapter)):
            raise UserError(
                f"adapter {adapter.init_adapter} is a reward model's, which scores responses and writes none: lite-dil score, "
                "or lite-dil export --format reward"
            )
    prepare(name, options, training)
    if (remark := import_library(name)) and say is not None:
        say(remark)
    if name == "mlx":
        from lite_dil.backends.mlx.backend import MLXBackend

        return MLXBackend(options, model, adapter, training, say)
    from lite_dil.backends.torch import backend

    return backend.load(options, model, adapter, training, name, say, in_files)


def value_and_slope(
    name: str, function: Callable[..., Any], policy: np.ndarray, reference: np.ndarray, inputs: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Call ``function(policy, reference, inputs)`` on arrays of the library and the device of backend `name`.

    Returns:
        Its result, and the gradient of the result's sum with respect to `policy`.
    """
    found: tuple[np.ndarray, np.ndarray] = module(name, "values").value_and_slope(name, function, policy, reference, inputs)
    return found


def free(name: str) -> None:
    """Free the unused memory of backend `name`."""
    module(name, "memory").free()


def forget_peak(name: str) -> None:
    """Let `Backend.peak_memory_mb` be the peak from here on; on a CPU it is the process's, and stays."""
    module(name, "memory").forget_peak()
