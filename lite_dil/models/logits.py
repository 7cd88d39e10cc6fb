"""What models do to their logits after the output head."""

from __future__ import annotations

from typing import Any, NamedTuple


class LogitTransform(NamedTuple):
    """Logits become ``cap * tanh(scale * z / cap)``, or ``scale * z`` if cap is 0."""

    scale: float = 1.0
    cap: float = 0.0


def logit_transform(config: dict[str, Any]) -> LogitTransform:
    """Read the transform from a config.json.

    Known: final_logit_softcapping (Gemma 2 and 3) and logits_soft_cap (RecurrentGemma), logits_scaling (Granite, a divisor),
    logit_scale (Cohere), lm_head_multiplier (Falcon-H1) and dim_model_base (MiniCPM 3, which divides by the width's ratio to
    it). The start-up check compares the result with the model's own logits.
    """
    config = config.get("text_config") or config
    scale = float(config.get("logit_scale") or 1.0) * float(config.get("lm_head_multiplier") or 1.0)
    scale /= float(config.get("logits_scaling") or 1.0)
    scale *= float(config["dim_model_base"]) / config["hidden_size"] if config.get("dim_model_base") else 1.0
    return LogitTransform(scale, float(config.get("final_logit_softcapping") or config.get("logits_soft_cap") or 0.0))
