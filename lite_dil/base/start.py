"""What a process sets up before torch, MLX or transformers are imported; every door calls `start` first."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from importlib import metadata

from lite_dil.base.errors import UserError
from lite_dil.base.memory import expandable_segments

# The number of processes by each launcher: torchrun and accelerate, Open MPI, MPICH and Intel's, MVAPICH, mlx.launch on CUDA,
# and srun. A batch script of Slurm's that starts one program has SLURM_NTASKS too, but no step.
_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "MLX_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_RANKS = ("MLX_RANK", "SLURM_PROCID")  # above 0 there is another process, whatever the count says
_HOSTS = ("MLX_HOSTFILE", "MLX_IBV_DEVICES")  # of mlx.launch, which sets no count: JSON files with a list, an entry a process

# Where torch's allocators read their settings: up to torch 2.9 in the second, which later versions call deprecated.
ALLOCATOR, OLD_ALLOCATOR, ROCM_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"
EXPANDABLE = "expandable_segments:True"


def start(training: bool = False) -> None:
    """Set up the process. Called again, it changes nothing.

    Raises UserError where `training` is one of several processes.
    """
    if training:
        check_alone()
    _environment()
    if "torch" not in sys.modules and expandable_segments():
        set_allocator(os.environ, _torch_version())


def check_alone(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError where a launcher started this process as one of several, of which each would train the same."""
    several = [name for name in _COUNTS if _number(environment, name) > 1]
    several += [name for name in _RANKS if _number(environment, name) > 0]
    several += [name for name in _HOSTS if name in environment and _entries(environment[name]) > 1]
    if several:
        name = several[0]
        raise UserError(
            f"training runs in one process, and {name}={environment[name]} says that there are several; start it without "
            "torchrun, accelerate launch, mlx.launch, mpirun or srun"
        )


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else 0


def _entries(path: str) -> int:
    try:
        with open(path, encoding="utf-8") as file:
            return len(json.load(file))
    except (OSError, ValueError, TypeError):
        return 0


def allocator_is_set(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the environment says how torch allocates."""
    return any(name in environment for name in (ALLOCATOR, OLD_ALLOCATOR, ROCM_ALLOCATOR))


def set_allocator(environment: MutableMapping[str, str], version: str) -> None:
    """Let segments of a GPU's memory grow, by the name that torch of this version reads, unless the user set anything there.

    Without it 4 to 13 % of what is reserved lies between tensors where none fits, with it about 4 %. Setting one option resets
    the others, so that what the user wrote is never added to.
    """
    numbers = version.split(".")[:2]
    if allocator_is_set(environment) or "rocm" in version or len(numbers) < 2 or not all(map(str.isdecimal, numbers)):
        return
    major, minor = map(int, numbers)
    environment[ALLOCATOR if (major, minor) >= (2, 10) else OLD_ALLOCATOR] = EXPANDABLE


def _torch_version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def _environment() -> None:
    """Switch off what libraries read from the environment when they are imported, and their notices."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are warnings; what came of them is an error here
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # segments that grow log each lack of memory beside the error
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would be left behind by a fork
    # tqdm, in a notebook without ipywidgets: its bars are text then, which is all that the warning comes to.
    warnings.filterwarnings("ignore", "IProgress not found")
    # PEFT imports bitsandbytes, which warns on a CPU of a kernel that only inference would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quiet_bars() -> None:
    """Leave out the bars of transformers. It is imported here, so what must come before it has been."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading weights, and, without being asked, of downloads
    from huggingface_hub.utils import enable_progress_bars

    enable_progress_bars()


@contextlib.contextmanager
def without_bar() -> Iterator[None]:
    """Leave out a bar that no setting of transformers switches off: that of reading a GGUF file."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
