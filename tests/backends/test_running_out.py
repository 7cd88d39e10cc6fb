"""What counts as running out of memory, by real errors where a CPU can raise them, and what is said and kept after it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import batch, criterion, load, one_step, write_pairs

from lite_dil.backends.limits import OFFLOAD_CHUNK
from lite_dil.backends.torch import offload
from lite_dil.backends.torch.offload import Arena
from lite_dil.backends.torch.out_of_memory import ran_out, whole
from lite_dil.base.errors import OutOfMemory, UserError
from lite_dil.cli.main import main

CPU = torch.device("cpu")


def too_much() -> torch.Tensor:
    return torch.empty(2**60, dtype=torch.uint8)


def raised(run: Callable[[], Any]) -> BaseException:
    try:
        run()
    except Exception as error:
        return error
    raise AssertionError("no error")


# As a CUDA build of torch 2.14 and Triton 3.8 word them.
PINNED = (
    "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the CUDA documentation for more information.\n"
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect."
)
STICKY = PINNED.replace("out of memory", "an illegal memory access was encountered").replace(
    "MemoryAllocation", "IllegalAddress"
)


def test_every_form_of_running_out() -> None:
    for run in (too_much, lambda: torch.zeros(1).expand(2**58).clone(), lambda: np.empty(2**56), lambda: bytearray(2**60)):
        assert ran_out(raised(run))
    accelerator = getattr(torch, "AcceleratorError", RuntimeError)  # since torch 2.8
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        accelerator(PINNED),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("InductorError: OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB."),
    ):
        assert ran_out(error), error


def test_other_errors_are_none() -> None:
    accelerator = getattr(torch, "AcceleratorError", RuntimeError)
    shared = "out of resource: shared memory, Required: 114688, Hardware limit: 101376. Reducing block sizes may help."
    for error in (
        accelerator(STICKY),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        RuntimeError(f"Triton Error [CUDA]: {shared}"),
        ValueError("CUDA out of memory"),
        raised(lambda: torch.ones(2, 3) @ torch.ones(2, 3)),
        raised(lambda: torch.empty(-1)),
    ):
        assert not ran_out(error), error


def test_a_pass_that_memory_does_not_hold() -> None:
    with pytest.raises(OutOfMemory, match="you tried to allocate 1152921504606846976 bytes") as caught:
        whole("a pass", CPU, too_much)
    assert caught.value.__context__ is None  # which would keep its frames
    with pytest.raises(RuntimeError, match="illegal memory access"):
        whole("a pass", CPU, lambda: exec("raise RuntimeError(STICKY)", {"STICKY": STICKY}))


@pytest.mark.parametrize(("message", "kind"), [(PINNED, OutOfMemory), (STICKY, RuntimeError)])
def test_a_step_that_ran_out_of_pinned_memory_and_one_that_broke_the_gpu(tiny: str, message: str, kind: type) -> None:
    backend: Any = load("cpu", tiny)

    def fail(*args: Any) -> None:
        handle.remove()
        raise RuntimeError(message)

    handle = backend.decoder.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(kind) as caught:
        one_step(backend, [batch()], criterion(), 1e-3)
    assert type(caught.value) is kind
    if kind is OutOfMemory:
        after = one_step(backend, [batch()], criterion(), 1e-3)
        other = one_step(load("cpu", tiny), [batch()], criterion(), 1e-3)
        assert after.grad_norm == other.grad_norm and np.array_equal(after.policy, other.policy)


@pytest.mark.parametrize("flags", [(), ("--4bit", "--head-bits", "8")], ids=" ".join)
def test_a_model_that_does_not_fit_is_one_message(
    tiny: str, tmp_path: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Memory really runs out: while transformers reads weights, and while it quantises them, which it reports otherwise."""
    import bitsandbytes
    from transformers import PreTrainedModel

    if flags:
        monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", lambda *args, **kwargs: too_much())
    else:
        monkeypatch.setattr(PreTrainedModel, "tie_weights", lambda *args, **kwargs: too_much())
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "warning")
    data = str(write_pairs(tmp_path / "pairs.jsonl"))
    assert main(["train", "--model", tiny, "--backend", "cpu", "--data", data, *flags]) == 2
    err = capfd.readouterr().err
    said = re.findall(r"^lite-dil: --model .*", err, re.MULTILINE)
    helps = "a smaller model" if flags else "--4bit, --head-bits 8, a smaller model"
    assert len(said) == 1 and said[0].endswith(f"What helps: {helps}")
    assert f"{tiny}: not enough memory to load it (" in said[0] and "you tried to allocate" in said[0]
    assert "Traceback" not in err and "CONVERSION" not in err


def test_what_else_transformers_cannot_convert_is_no_lack_of_memory(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fail)
    with pytest.raises(UserError, match="cannot be loaded"):
        load("cpu", tiny, load_in_4bit=True)


def test_activations_that_the_computers_memory_does_not_hold(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloading is what takes it, so that it is no remedy."""
    monkeypatch.setattr(offload, "OFFLOAD_CHUNK", 2**60)
    backend: Any = load("cpu", tiny)
    arena = Arena(pinned=False)
    backend.decoder.layers[1].mlp.register_forward_hook(lambda module, inputs, out: arena.put(out, 0) and None)
    with pytest.raises(OutOfMemory, match="you tried to allocate") as caught:
        one_step(backend, [batch()], criterion(), 1e-3)
    helps = str(caught.value).partition("What helps: ")[2]
    assert helps == "a shorter --max-length, --no-offload-activations, more memory in the computer"
    assert caught.value.micro_batch == 0


def test_offloaded_arrays_take_their_bytes_and_no_more() -> None:
    arena, draw = Arena(pinned=False), torch.Generator().manual_seed(0)
    sizes = [(1, OFFLOAD_CHUNK // 16 + 3, 5), (1, 7, 1), (3, OFFLOAD_CHUNK // 8), (1, 1, 1)]  # across chunks, and inside one
    for _ in range(2):  # the second time in the same memory
        arrays = [torch.randn(size, generator=draw).to(torch.bfloat16) for size in sizes]
        spans, end = [], 0
        for x in arrays:
            spans.append(arena.put(x, end))
            end += x.nbytes
        assert len(arena.chunks) == -(-sum(x.nbytes for x in arrays) // OFFLOAD_CHUNK) == 2
        for x, span in zip(reversed(arrays), reversed(spans), strict=True):
            out = torch.empty(span.shape, dtype=span.dtype)
            arena.get(span, out)
            assert torch.equal(out, x)
    assert all(chunk.nbytes == OFFLOAD_CHUNK for chunk in arena.chunks)
