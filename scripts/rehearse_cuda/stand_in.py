"""The stand-in GPU: building its library, the environment that loads it, and the controls."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path

from lite_dil.base.errors import UserError

SOURCES = Path(__file__).parent / "card"
LIBRARY = "libcuda.so.1"  # one library replaces CUDA's runtime, driver, cuBLAS and NVML
ALIASES = ("libcuda.so", "libnvidia-ml.so.1")
GIB = 2**30
# GiB usable under CUDA on cards of 6, 8, 12, 16 and 24 GB, and on a T4.
USABLE = {"6 GB": 5.4, "8 GB": 7.4, "12 GB": 11.4, "T4": 14.0, "16 GB": 15.4, "24 GB": 23.4}


def build(folder: Path) -> Path:
    """Build the library in `folder`, unless it is newer than its sources; return the library's folder."""
    place, sources = folder / "lib", sorted(SOURCES.iterdir())
    made = place / LIBRARY
    if made.exists() and made.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        return place
    compiler = shutil.which("g++")
    if compiler is None:
        raise UserError("the rehearsal needs g++, for its stand-in libraries and for Triton")
    place.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", *_headers()]
    command += [str(source) for source in sources if source.suffix == ".cpp"]
    done = subprocess.run([*command, "-o", str(made), "-ldl"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the stand-in libraries cannot be built:\n{done.stderr}")
    for alias in ALIASES:  # the same file, so that loading any of them gives the already loaded library
        (place / alias).unlink(missing_ok=True)
        (place / alias).symlink_to(LIBRARY)
    return place


def _headers() -> list[str]:
    """Return the flags for CUDA's headers, which come with torch, a few with Triton."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise UserError("torch is not installed here; make rehearse-cuda makes an environment with a CUDA build")
    packages = Path(spec.origin).parent.parent
    found = sorted(packages.glob("nvidia/cu*/include/cuda_runtime_api.h"))
    if not found:
        raise UserError("torch here is not a CUDA build; make rehearse-cuda makes an environment with one")
    return ["-I", str(found[-1].parent), "-idirafter", str(packages / "triton/backends/nvidia/include")]


def environment(library: Path, caches: Path, card: int, gib: float, lag: int = 0) -> dict[str, str]:
    """Return the environment of a process with a card of compute capability `card` / 10 and `gib` of memory.

    Args:
        library: the folder that `build` returned.
        caches: folder for what Triton and Inductor compile, separate from what was compiled for real cards.
        lag: the launches that the card may be behind; CUDA allows 1024.
    """
    return {
        "LD_PRELOAD": str(library / LIBRARY),
        "LD_LIBRARY_PATH": str(library),
        "TRITON_LIBCUDA_PATH": str(library),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a pool would import torch again for a few kernels
        "REHEARSAL_CARD": str(card),
        "REHEARSAL_CARD_GIB": str(gib),
        "REHEARSAL_LAG": str(lag),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "0",
    }


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the user's settings for a real card."""
    kept = ("PYTORCH_", "CUDA_", "TORCH", "TRITON", "REHEARSAL_", "LITE_DIL_")
    return {name: value for name, value in environ.items() if not name.startswith(kept)}


class Kind(IntEnum):
    """The calls that the card counts and can fail, in the order of card.h."""

    LAUNCH = 0
    PRODUCT = 1
    COPY = 2
    SET = 3
    DEVICE_ALLOCATION = 4
    PINNED_ALLOCATION = 5


class Doors:
    """Controls of the card, for the process that runs on it."""

    def __init__(self) -> None:
        if LIBRARY not in os.environ.get("LD_PRELOAD", ""):
            raise RuntimeError("this process does not run on the stand-in card")
        self._library = ctypes.CDLL(LIBRARY)
        for name in ("device_used", "device_peak", "pinned_used", "pinned_peak"):
            getattr(self._library, f"card_{name}").restype = ctypes.c_size_t
        self._library.card_count.restype = ctypes.c_long

    def work(self) -> dict[str, int]:
        """Return the number of calls of each kind of work: launches, products, copies and memsets."""
        return {kind.name.lower(): self._library.card_count(kind) for kind in Kind if kind <= Kind.SET}

    def fail(self, kind: Kind, nth: int) -> None:
        """Make the nth call of a kind from now on fail; 0 cancels this."""
        self._library.card_fail(int(kind), ctypes.c_long(nth))

    def set_capacity(self, device: float, pinned: float = 1024 * GIB) -> None:
        """Set the capacities of card and pinned memory, in bytes."""
        self._library.card_set_capacity(ctypes.c_size_t(int(device)), ctypes.c_size_t(int(pinned)))

    def reset_peaks(self) -> None:
        """Reset the peaks."""
        self._library.card_reset_peaks()

    def __getattr__(self, name: str) -> int:
        """Return device_used, device_peak, pinned_used or pinned_peak, in bytes."""
        if name.startswith("_"):
            raise AttributeError(name)
        return int(getattr(self._library, f"card_{name}")())
