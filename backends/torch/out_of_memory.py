"""Handling of out-of-memory errors in the torch backend."""

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
Random = tuple[Tensor, Tensor | None]  # states of the host's and the GPU's random generators

ERRORS = (RuntimeError, MemoryError)  # the types of all errors that `ran_out` recognises, and of others
# Not all are torch.OutOfMemoryError, and Inductor and transformers wrap errors.
_MESSAGES = (
    "CUDA out of memory",  # torch's allocator on the GPU
    "CUDA error: out of memory",  # pinned memory: an AcceleratorError, before torch 2.8 a RuntimeError
    "CUDA driver error: out of memory",  # driver calls, for expandable segments and modules
    "CUBLAS_STATUS_ALLOC_FAILED",  # a cuBLAS handle or its workspace
    "Triton Error [CUDA]: out of memory",  # loading or launching a kernel
    "memory: you tried to allocate",  # the CPU's allocator: "can't allocate", on Windows "not enough"
)


class HostMemoryError(MemoryError):
    """The computer's memory does not hold the activations that --offload-activations keeps there."""


def ran_out(error: BaseException) -> bool:
    """Return whether `error` means that memory ran out: on the GPU, pinned memory or the computer's.

    After any other CUDA error, such as an illegal access, the process cannot continue. A kernel that needs more shared
    memory than the card has ("out of resource") is not out of memory either.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_line(str(error)))


def _line(text: str) -> str:
    """Return the first out-of-memory line of an error's text or a report, "" if none."""
    return next((line.strip() for line in text.splitlines() if any(message in line for message in _MESSAGES)), "")


def whole(work: str, device: torch.device, run: Callable[[], _T]) -> _T:
    """Return `run()`; if memory runs out in it, raise OutOfMemory after freeing everything it held."""
    try:
        return run()
    except ERRORS as error:
        if not ran_out(error):
            raise
        detail = first_line(error)
    # Outside the except block: as this error's context, the caught one would keep its frames and so all activations.
    free(device)
    raise OutOfMemory(work, detail)


def helps(error: BaseException, device: torch.device, checkpointing: str, offloading: bool) -> list[str]:
    """Return the options that reduce the memory that a step ran out of and that it does not use yet.

    Args:
        checkpointing: the mode in use.
        offloading: whether activations are offloaded already.
    """
    if isinstance(error, HostMemoryError):
        return ["a shorter --max-length", "--no-offload-activations", "more memory in the computer"]
    found = [] if checkpointing == "full" else ["--gradient-checkpointing full"]
    found += ["--offload-activations"] if device.type == "cuda" and not offloading else []
    return [*found, *OutOfMemory.HELPS]


def loaded(model: str, device: torch.device, helps: Sequence[str], load: Callable[[], _T]) -> _T:
    """Return `load()`; if memory runs out in it, raise UserError after freeing everything it held.

    Args:
        helps: options that make loading take less.
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
    """Raise torch.OutOfMemoryError if transformers runs out of memory while it converts weights in the block.

    It logs pages of tracebacks, then raises an error that only refers to them. This keeps them off the terminal.
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
    """Free unused memory, including garbage in cycles and pinned memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        empty_pinned = getattr(torch._C, "_host_emptyCache", None)  # not in all versions
        if empty_pinned is not None:
            empty_pinned()


def random_state(device: torch.device) -> Random:
    """Return the state of the random generators that dropout uses."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else None


def set_random_state(state: Random) -> None:
    """Restore a state from `random_state`."""
    host, device = state
    torch.set_rng_state(host)
    if device is not None:
        torch.cuda.set_rng_state(device)
