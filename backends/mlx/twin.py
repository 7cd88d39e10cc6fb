"""MLX's log-probs of a model's small twin against transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from lite_dil.backends.foreign import Misfit, foreign
from lite_dil.backends.mlx.load import check_windows, load, set_dtype, windows
from lite_dil.backends.mlx.prefix import applied_windows
from lite_dil.backends.twin import twin
from lite_dil.base.errors import UserError
from lite_dil.models.options import ModelOptions
from lite_dil.models.twin import WINDOW, probe

TOLERANCE = 5e-3 if mx.metal.is_available() else 3e-4  # nats: above float32's noise, which products of 19 bits make on an M5


def check_twin(
    folder: Path, name: str, config: dict[str, Any], max_length: int, trust_remote_code: bool, model: Any
) -> str:
    """Compare a model's twin; return a remark if there is nothing to compare it with, else "".

    Args:
        config, model: as loaded, with wrapped layers, for the windows of a model that is not compared.

    Raises:
        UserError: mlx-lm computes something else than transformers.
    """
    try:
        within, beyond = differences(folder, name, trust_remote_code)
    except Misfit as error:
        check_windows(config, applied_windows(model), max_length, name)
        return f"{name} was not compared with transformers: {error}. Compare its first loss with --backend cpu"
    if not within < TOLERANCE or not (beyond < TOLERANCE or any(windows(config))):
        raise UserError(
            f"--model {name}: mlx-lm computes this model differently from transformers, by up to {beyond:.2g} nats per token on "
            "a small copy of it with random weights; take another --backend, or a later mlx-lm"
        )
    if not beyond < TOLERANCE:
        check_windows(config, None, max_length, name)
    return ""


def differences(folder: Path, name: str, trust_remote_code: bool = False) -> tuple[float, float]:
    """Return by how much log-probs differ at most, in nats: of the tokens within every attention window, and of all.

    Raises:
        Misfit: transformers' figures are unknown, with the reason.
        UserError: mlx-lm cannot load the twin.
    """
    options = ModelOptions(dtype="float32", trust_remote_code=trust_remote_code)
    with twin(folder, trust_remote_code) as (small_folder, figures):
        small, _, _ = load(small_folder, name, options)
        set_dtype(small, "float32", pre_quantised=False)
        small.eval()
        ids = mx.array(probe()[None])
        logits = foreign(small, ids)[0, :-1].astype(mx.float32)
        logps = logits - mx.logsumexp(logits, -1, keepdims=True)
        found = np.array(mx.take_along_axis(logps, ids[0, 1:, None], -1)[:, 0])
    off = np.abs(found - figures.logps)
    return float(off[: WINDOW - 1].max()), float(off.max())
