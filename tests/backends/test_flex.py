"""FlexAttention without a card: which keys a row's queries see, how many variants are compiled, what errors are told as.

Only a card can show that CUDA's kernels compute right, forward and backward. Here the mask is compared with the plain rule,
token by token; the function that CUDA compiles runs through torch's compiler on the CPU, which has a forward pass alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load

from lite_dil.backends.torch import compiling, flex, packed_attention
from lite_dil.backends.torch.row import PackedRow, Scores, Unsupported
from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.batching.layouts import packed

CPU = torch.device("cpu")
LARGE = (
    "No valid triton configs. OutOfMemoryError: out of resource: triton_tem_fused_flex_attention_backward_1 Required: 114688 "
    "Hardware limit:101376 Reducing block sizes or `num_stages` may help."
)


def row(lengths: list[tuple[int, int, int]]) -> tuple[PackedRow, int]:
    """A row of prompts with two responses each, of so many tokens, and how many tokens it has."""
    prompts = [np.zeros(one[0], np.int64) for one in lengths]
    responses = [np.zeros(length, np.int64) for one in lengths for length in one[1:]]
    owner = np.repeat(np.arange(len(lengths)), 2)
    layout = packed(Batch(prompts, responses, owner, np.tile([1, -1], len(lengths))), multiple=128)
    return PackedRow.of(layout, CPU), layout.input_ids.shape[1]


@pytest.mark.parametrize("window", [None, 5, 150])
def test_the_mask_is_that_of_segments_positions_and_window(window: int | None) -> None:
    """Token by token from the rule, and block by block as torch's own `create_block_mask` finds it."""
    from torch.nn.attention.flex_attention import create_block_mask

    made, tokens = row([(200, 130, 3), (1, 1, 2), (7, 300, 40)])
    unit, prompt, position = (np.full(tokens, -1) for _ in range(3))
    for number, part in enumerate(made.segments):
        at = part.start
        for order, length in enumerate((part.prompt, *part.responses)):
            unit[at : at + length], prompt[at : at + length] = 3 * number + order, 3 * number
            position[at : at + length] = np.arange(length) + (part.prompt if order else 0)
            at += length
    place = np.arange(tokens)
    allowed = (unit == unit[:, None]) | (unit == prompt[:, None])
    allowed &= place <= place[:, None]
    allowed &= (position[:, None] - position < window) if window else True
    allowed[unit < 0] = np.eye(tokens, dtype=bool)[unit < 0]

    first, end, own, stop = flex.seen(made.segments, window, tokens)[:, :, None]
    np.testing.assert_array_equal((place >= first) & (place < end) | (place >= own) & (place < stop), allowed)
    known = torch.from_numpy(allowed)
    expected = create_block_mask(lambda b, h, q, k: known[q, k], None, None, tokens, tokens, device="cpu")
    lists = flex.mask(made.segments, window, tokens, CPU)[1:]
    for name, ours in zip(flex.BLOCK_LISTS, lists, strict=True):
        theirs = getattr(expected, name)
        if name.endswith("num_blocks"):
            assert torch.equal(ours, theirs), name
        else:  # only so many of them are read
            read = torch.arange(theirs.shape[-1]) < getattr(expected, name.replace("indices", "num_blocks"))[..., None]
            assert torch.equal(ours * read, theirs * read), name


def test_one_compiled_variant_serves_all_rows_windows_and_layers() -> None:
    """With torch's real compiler, and a ninth kind of layer: torch keeps eight variants a function, and goes on uncompiled."""
    from torch._dynamo.testing import CompileCounter

    rows = [row([(5, 3, 2)]), row([(200, 130, 3)]), row([(300, 200, 150), (90, 20, 30)])]
    for width in range(8, 80, 8):
        counter, scale = CompileCounter(), width**-0.5
        run = flex.compiled_function(flex.Kind(4, 2, width, width, scale, 30.0, torch.float32, CPU), {}, backend=counter)
        for made, tokens in rows:
            for window in (None, 20):
                q, k, v = (torch.randn(1, heads, max(tokens, 256), width) for heads in (4, 2, 2))
                scores = Scores(scale, 30.0, window)
                lists = flex.mask(made.segments, window, q.shape[2], q.device)
                out = flex.call(run, (q, k, v), lists).transpose(1, 2)
                if width == 8:
                    own = packed_attention.blockwise(q, k, v, made, scores)
                    real = sum(part.prompt + sum(part.responses) for part in made.segments)
                    torch.testing.assert_close(out[:, :real], own[:, :real], atol=1e-5, rtol=1e-5)
        assert counter.frame_count == 1


def test_a_variant_too_many_is_an_error_and_not_the_uncompiled_function() -> None:
    """Uncompiled, FlexAttention holds whole score matrices."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    kind = flex.Kind(2, 2, 8, 8, 0.3, 0.0, torch.float32, CPU)
    run = flex.compiled_function(kind, {}, backend="eager")
    lists = flex.mask(row([(200, 30, 3)])[0].segments, None, 256, CPU)
    for width in range(8, 72, 8):
        flex.call(run, (torch.randn(1, 2, 256, width),) * 3, lists)
    with pytest.raises(FailOnRecompileLimitHit):
        flex.call(run, (torch.randn(1, 2, 256, 72),) * 3, lists)


def test_shared_memory_that_is_too_small_is_told_from_a_lack_of_memory() -> None:
    error = RuntimeError(LARGE)
    assert compiling.too_large(error)
    assert compiling.why_not(error) == "its kernels need 114688 bytes of shared memory, and this GPU has 101376"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
            "no C compiler was found: apt",
        ),
        (RuntimeError("Cannot find a working triton installation. Either"), "Triton is not installed: pip install triton"),
    ],
)
def test_what_is_missing_is_said_with_its_fix(error: Exception, reason: str) -> None:
    assert reason in compiling.why_not(error)


def test_other_errors_are_raised_as_they_are() -> None:
    """A lack of memory, also within the compiler's own error, and mistakes of the function that is compiled."""
    from torch._dynamo.exc import TorchRuntimeError

    full = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        compiling.why_not(full)
    wrapped = RuntimeError("inductor")
    wrapped.inner_exception = full
    with pytest.raises(torch.OutOfMemoryError):
        compiling.why_not(wrapped)
    with pytest.raises(RuntimeError, match="a mistake"):
        compiling.why_not(RuntimeError("a mistake"))
    mistaken = torch.compile(lambda x: x @ x, fullgraph=True, backend="eager")
    with pytest.raises(TorchRuntimeError) as caught:
        mistaken(torch.zeros(2, 3))
    with pytest.raises(TorchRuntimeError):
        compiling.why_not(caught.value)


NO_COMPILER = """
import torch
from lite_dil.backends.torch import compiling
try:
    torch.compile(lambda x: x.sin() + 1)(torch.zeros(100))
except compiling.errors() as error:
    print(compiling.why_not(error))
"""


def test_a_machine_without_a_compiler_is_told_so(tmp_path: Path) -> None:
    """The error that torch's compiler itself raises there, on the CPU."""
    environment = {**os.environ, "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    for name in ("CC", "CXX"):
        environment.pop(name, None)
    out = subprocess.run([sys.executable, "-c", NO_COMPILER], env=environment, capture_output=True, text=True, check=False)
    assert out.stdout == "no C compiler was found: apt install gcc\n", out.stderr


def test_a_layout_that_cannot_be_compiled_is_not_taken(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: Any) -> Any:
        raise Unsupported("FlexAttention cannot be compiled: no C compiler was found: apt install gcc")

    monkeypatch.setattr(packed_attention, "blockwise", unable)
    backend = load("cpu", tiny)
    assert backend.layout == "plain"
    assert backend.layout_reason.endswith(
        "its answers: FlexAttention cannot be compiled: no C compiler was found: apt install gcc"
    )
    with pytest.raises(UserError, match=r"--layout packed: not for .*no C compiler was found"):
        load("cpu", tiny, layout="packed")
