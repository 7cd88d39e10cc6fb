"""What models do to their logits after the output head."""

from __future__ import annotations

from typing import Any, NamedTuple


class LogitTransform(NamedTuple):
    """Logits become ``cap * tanh(scale * z / cap)``, or ``scale * z`` if cap is 0."""

    scale: float = 1.0
    cap: float = 0.0


def logit_transform(config: dict[str, Any]) -> LogitTransform:
    """Read the transform from a config.json.

    Known: final_logit_softcapping (Gemma 2 and 3), logits_scaling (Granite, a divisor), logit_scale (Cohere) and
    lm_head_multiplier (Falcon-H1). The start-up check compares the result with the model's own logits.
    """
    config = config.get("text_config") or config
    scale = float(config.get("logit_scale") or 1.0) * float(config.get("lm_head_multiplier") or 1.0)
    scale /= float(config.get("logits_scaling") or 1.0)
    return LogitTransform(scale, float(config.get("final_logit_softcapping") or 0.0))
