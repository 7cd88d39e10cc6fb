"""Rotary embeddings that mlx-lm builds without all of their settings."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import SuScaledRoPE, YarnRoPE

from lite_dil.base.errors import UserError


def mend_ropes(model: nn.Module, config: dict[str, Any]) -> None:
    """Apply settings that some of mlx-lm's models do not read; a rope that has them stays as it is.

    These are the share of each head that is rotated (GLM-4), YaRN's bounds that are not rounded (gpt-oss), and LongRoPE's
    factors for short sequences (Phi 3 to 4).
    """
    config = config.get("text_config") or config
    if any(isinstance(value, dict) for value in (config.get("rope_parameters") or {}).values()):
        return  # a rope for each type of layer, which only models read that know of it
    head, share, rope = config.get("head_dim"), config.get("partial_rotary_factor"), config.get("rope_scaling") or {}
    for module in model.modules():
        if type(module) is nn.RoPE and head and share and module.dims == head:
            module.dims = int(head * share)
        elif isinstance(module, YarnRoPE) and rope.get("truncate") is False:
            module._freqs = _yarn(module.dims, config["rope_theta"], rope)
        elif type(module) is SuScaledRoPE and "short_factor" in rope:
            module.__class__, module._most = _LongRoPE, module.original_max_position_embeddings
            theta = config["rope_theta"] ** (mx.arange(0, module.dim, 2, dtype=mx.float32) / module.dim)
            module._short = mx.array(rope["short_factor"], mx.float32) * theta


class _LongRoPE(SuScaledRoPE):
    """LongRoPE with the factors for short sequences, as in transformers; mlx-lm has those for long ones only.

    The factors of a long sequence are refused: they hold for all of its tokens, and keys that are cached, or rotated with
    a prompt's, have those of the short one.
    """

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        """Rotate (..., tokens, width), of which the first has position `offset`."""
        furthest, most = (offset if isinstance(offset, int) else int(mx.max(offset).item())) + x.shape[-2], self._most
        if furthest > most:
            raise UserError(
                f"this model's LongRoPE turns other angles beyond {most} tokens, which is not done on MLX: use at most {most} "
                "tokens of prompt and response (--max-length), or take another --backend"
            )
        scaled = x.at[..., : self.dim].multiply(self._scale)
        return mx.fast.rope(scaled, self.dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._short)


def _yarn(dims: int, theta: float, rope: dict[str, Any]) -> mx.array:
    """Return YaRN's wavelengths / 2 pi, (dims / 2,), by arXiv 2309.00071, section 3.2, with bounds as they are."""

    def bound(rotations: float) -> float:
        length = rope["original_max_position_embeddings"]
        return dims * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(bound(rope.get("beta_fast") or 32), 0), min(bound(rope.get("beta_slow") or 1), dims - 1)
    kept = 1 - mx.clip((mx.arange(dims // 2) - low) / max(high - low, 1e-3), 0, 1)  # the share that is not interpolated
    waves = theta ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    return waves / (kept + (1 - kept) / rope["factor"])
