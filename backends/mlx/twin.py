"""MLX's log-probs of a model's small twin against transformers'."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from lite_dil.backends.foreign import foreign
from lite_dil.backends.mlx.load import load, set_dtype
from lite_dil.backends.twin import twin
from lite_dil.models.options import ModelOptions
from lite_dil.models.twin import WINDOW, probe

TOLERANCE = 5e-3  # nats; float32's noise is about 1e-5 here, and a GPU that rounds products to 19 bits stays below a third of it


def differences(model: Path, trust_remote_code: bool) -> tuple[float, float]:
    """Return by how much log-probs differ at most, in nats: of the tokens within every attention window, and of all.

    Raises:
        Misfit: transformers' figures are unknown, with the reason.
        UserError: mlx-lm cannot load the twin.
    """
    options = ModelOptions(dtype="float32", trust_remote_code=trust_remote_code)
    with twin(model, trust_remote_code) as (folder, figures):
        small, _, _ = load(folder, "its twin of small sizes", options)
        set_dtype(small, "float32", pre_quantised=False)
        small.eval()
        ids = mx.array(probe()[None])
        logits = foreign(small, ids)[0, :-1].astype(mx.float32)
        logps = logits - mx.logsumexp(logits, -1, keepdims=True)
        found = np.array(mx.take_along_axis(logps, ids[0, 1:, None], -1)[:, 0])
    off = np.abs(found - figures.logps)
    return float(off[: WINDOW - 1].max()), float(off.max())
