"""What the torch backend does where memory runs out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from lite_dil.base.errors import OutOfMemory, UserError, first_line

_T = TypeVar("_T")
Random = tuple[Tensor, Tensor | None]  # the states of the host's generator and of the GPU's

ERRORS = (RuntimeError, MemoryError)  # the types of all errors that `ran_out` knows; other errors have them too
# Not every one is a torch.OutOfMemoryError, and Inductor and transformers wrap what they meet.
_MESSAGES = (
    "CUDA out of memory",  # torch's allocator on the GPU
    "CUDA error: out of memory",  # pinned memory: an AcceleratorError, before torch 2.8 a RuntimeError
    "CUDA driver error: out of memory",  # the driver's calls, for expandable segments and modules
    "CUBLAS_STATUS_ALLOC_FAILED",  # a handle of cuBLAS, or its workspace
    "Triton Error [CUDA]: out of memory",  # loading or launching a kernel
    "memory: you tried to allocate",  # the CPU's allocator: "can't allocate", on Windows "not enough"
)


class HostMemoryError(MemoryError):
    """The computer's memory does not hold the activations that --offload-activations keeps there."""


def ran_out(error: BaseException) -> bool:
    """Return whether `error` says that memory ran out: the GPU's, pinned memory or the computer's.

    After every other CUDA error, an illegal access for one, the process cannot go on. A kernel that asks for more shared
    memory than the card has ("out of resource") does not run out of memory either.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_line(str(error)))


def _line(text: str) -> str:
    """Return the first line that has a message of memory that ran out, of an error's text or of a report; "" for none."""
    return next((line.strip() for line in text.splitlines() if any(message in line for message in _MESSAGES)), "")


def whole(work: str, device: torch.device, run: Callable[[], _T]) -> _T:
    """Return what `run` returns; where memory ends in it, raise OutOfMemory with nothing of it held any more."""
    try:
        return run()
    except ERRORS as error:
        if not ran_out(error):
            raise
        detail = first_line(error)
    # Not in the except block: as this error's context, that one would keep its frames, and with them all activations.
    free(device)
    raise OutOfMemory(work, detail)


def helps(error: BaseException, device: torch.device, checkpointing: str, offloading: bool) -> list[str]:
    """Return what helps a step that ran out of memory: of what it does not do already, what needs less of that memory.

    Args:
        checkpointing: its mode.
        offloading: whether activations are offloaded.
    """
    if isinstance(error, HostMemoryError):
        return ["a shorter --max-length", "--no-offload-activations", "more memory in the computer"]
    found = [] if checkpointing == "full" else ["--gradient-checkpointing full"]
    found += ["--offload-activations"] if device.type == "cuda" and not offloading else []
    return [*found, *OutOfMemory.HELPS]


def loaded(model: str, device: torch.device, helps: Sequence[str], load: Callable[[], _T]) -> _T:
    """Return what `load` returns; where memory ends in it, raise UserError with nothing of it held any more.

    Args:
        helps: options with which loading takes less.
    """
    try:
        return load()
    except ERRORS as error:
        if not ran_out(error):
            raise
        detail = _line(str(error)) or first_line(error)
    free(device)
    what = ", ".join([*helps, "a smaller model"])
    raise UserError(f"--model {model}: not enough memory to load it ({detail}). What helps: {what}")


@contextmanager
def conversion_report() -> Iterator[None]:
    """Raise torch.OutOfMemoryError where transformers ran out of memory while it converted weights in the block.

    It logs pages of tracebacks, and then raises an error that only refers to them. They are kept off the terminal here.
    """
    logger, found = logging.getLogger("transformers.modeling_utils"), list[str]()
    level, shown = logger.level, logger.getEffectiveLevel()

    def keep(record: logging.LogRecord) -> bool:
        if line := _line(record.getMessage()):
            found.append(line)
            return False
        return record.levelno >= shown

    logger.addFilter(keep)
    logger.setLevel(min(shown, logging.WARNING))
    try:
        yield
    except RuntimeError as error:
        if not found or ran_out(error):
            raise
        raise torch.OutOfMemoryError(found[0]) from None
    finally:
        logger.removeFilter(keep)
        logger.setLevel(level)


def free(device: torch.device) -> None:
    """Give back what nobody holds, garbage in cycles and pinned memory too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        empty_pinned = getattr(torch._C, "_host_emptyCache", None)  # not in every version
        if empty_pinned is not None:
            empty_pinned()


def random_state(device: torch.device) -> Random:
    """Return the state of the generators that dropout draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else None


def set_random_state(state: Random) -> None:
    """Go back to what `random_state` returned."""
    host, device = state
    torch.set_rng_state(host)
    if device is not None:
        torch.cuda.set_rng_state(device)
