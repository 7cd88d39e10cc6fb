"""Readable messages for failures of torch's compiler, with the names of torch 2.6 to 2.14."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

from lite_dil.backends.torch.out_of_memory import ran_out
from lite_dil.base.errors import first_line

# Patterns of the original messages, with their meaning and the fix.
CAUSES = (
    (
        r"Failed to find C compiler|No working C\+\+ compiler|Compiler: .* is not found",
        "no C compiler was found: apt install gcc",
    ),
    (r"Python\.h", "Python's C headers are missing: apt install python3-dev"),
    (
        r"Cannot find a working triton|No module named 'triton'|[Tt]riton not installed",
        "Triton is not installed: pip install triton (on Windows: pip install triton-windows)",
    ),
)
TOO_LARGE = re.compile(r"out of resource.*?[Rr]equired: (\d+),? [Hh]ardware limit: ?(\d+)", re.DOTALL)


def errors() -> tuple[type[Exception], ...]:
    """Return the types of errors that may mean that something cannot be compiled; `why_not` decides."""
    # torch's own are RuntimeErrors; the second is a failure of a C compiler.
    return (RuntimeError, subprocess.CalledProcessError, *_tritons())


def _tritons() -> tuple[type[Exception], ...]:
    try:
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError
    except ImportError:  # Triton is not available or not installed
        return ()
    return CompilationError, OutOfResources, PTXASError


def why_not(error: Exception) -> str:
    """Return why something could not be compiled; raise an error with another cause, such as a lack of memory."""
    from torch._dynamo import exc

    chain, large = list(_chain(error)), _sizes(error)
    if large:
        return f"its kernels need {large[0]} bytes of shared memory, and this GPU has {large[1]}"
    for one in chain:
        if ran_out(one):
            raise one
    for pattern, cause in CAUSES:
        if any(re.search(pattern, str(one)) for one in chain):
            return cause
    ours = (exc.TorchRuntimeError, exc.UserError)  # raised by the function being compiled
    known = (exc.TorchDynamoException, subprocess.CalledProcessError, *_tritons())
    if isinstance(error, ours) or not isinstance(error, known):
        raise error
    return f"{type(chain[-1]).__name__}: {first_line(chain[-1])}"


def too_large(error: Exception) -> bool:
    """Return whether kernels need more shared memory than the GPU has."""
    return _sizes(error) is not None


def _sizes(error: Exception) -> tuple[str, str] | None:
    """Return the bytes of shared memory that kernels need and that the GPU has, if that is the error."""
    found = next(filter(None, (TOO_LARGE.search(str(one)) for one in _chain(error))), None)
    return None if found is None else (found[1], found[2])


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors it was raised from."""
    while error is not None:
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__
