"""Memory of the models that reward a policy's own answers."""

from __future__ import annotations

import math
from pathlib import Path

from lite_dil.config.train_config import ResolvedConfig
from lite_dil.models.header import read_header
from lite_dil.planning.estimate import FLOAT32
from lite_dil.rewards.spec import HF, IMPLICIT, REWARD_RUN, Part, joined, parse


def reward_bytes(config: ResolvedConfig, e: int) -> int:
    """Return the bytes of the adapters and heads, in float32, and of the classifiers, `e` for a number, that reward.

    Those of `uncounted` take more. Raises UserError if a file cannot be read.
    """
    if not config.online:
        return 0
    parts = _parts(config)
    adapters = sum(_numbers(part.value) for part in parts if part.kind in (REWARD_RUN, IMPLICIT))
    return adapters * FLOAT32 + e * sum(_numbers(part.value) for part in parts if part.kind == HF)


def uncounted(config: ResolvedConfig) -> list[str]:
    """Return the reward models whose files are not here, as the user named them."""
    return [f"{part.kind}:{part.value}" for part in _parts(config) if not _files(part.value)] if config.online else []


def _parts(config: ResolvedConfig) -> list[Part]:
    found = parse(joined(config.reward, config.eval_reward))
    return [part for part in found if part.kind in (REWARD_RUN, IMPLICIT, HF)]


def _files(value: str) -> list[Path]:
    """Return the files of weights of a run's adapter, an adapter or a model."""
    folder = Path(value)
    return sorted((folder / "adapter" if (folder / "adapter").is_dir() else folder).glob("*.safetensors"))


def _numbers(value: str) -> int:
    return sum(math.prod(place.shape) for path in _files(value) for place in read_header(path).values())
