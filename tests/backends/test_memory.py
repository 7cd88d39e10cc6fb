"""Nothing of size tokens x vocabulary is allocated, neither forward nor backward: measured by each library's own books."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from conftest import criterion, load, make_checkpoint, one_step
from torch.utils._python_dispatch import TorchDispatchMode

from lite_dil.batching.batch import Batch

VOCABULARY, ROWS, LENGTH = 32768, 8, 384
WHOLE = ROWS * LENGTH * VOCABULARY  # float32 logits of all tokens: 384 MiB


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns, in elements."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        return out


def long_batch() -> Batch:
    draw = np.random.default_rng(0)
    responses = [draw.integers(3, 500, LENGTH) for _ in range(ROWS)]
    return Batch([np.array([5, 6])], responses, np.zeros(ROWS, int), np.array([1, -1] * (ROWS // 2)))


def test_torch_never_holds_tokens_by_vocabulary(tmp_path: Any) -> None:
    backend = load("cpu", str(make_checkpoint(tmp_path, vocab=VOCABULARY)), lora_r=4)
    with LargestTensor() as seen:
        one_step(backend, [long_batch()], criterion(), 1e-3)
        backend.sequence_logps(long_batch())
    # The head's own weight has VOCABULARY x 64 elements.
    assert VOCABULARY * 64 <= seen.largest < WHOLE / 4
    with LargestTensor() as whole:  # the measure must be able to see it
        backend.base(input_ids=torch.zeros(ROWS, LENGTH, dtype=torch.long))
    assert whole.largest == WHOLE


def test_mlx_never_holds_tokens_by_vocabulary(tmp_path: Any) -> None:
    import mlx.core as mx

    backend = load("mlx", str(make_checkpoint(tmp_path, vocab=VOCABULARY)), lora_r=4)

    def peak(run: Any) -> float:
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        run()
        return (mx.get_peak_memory() - before) / 2**20

    whole = WHOLE * 4 / 2**20
    assert peak(lambda: one_step(backend, [long_batch()], criterion(), 1e-3)) < whole
    assert peak(lambda: backend.sequence_logps(long_batch())) < whole
    assert peak(lambda: mx.eval(backend.model(mx.zeros((ROWS, LENGTH), mx.int32)))) >= whole
