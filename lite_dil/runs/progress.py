"""A run's progress: what its checkpoints record in progress.json, written and read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lite_dil.base.checked import read_object
from lite_dil.base.errors import UserError
from lite_dil.base.files import write
from lite_dil.base.formats import KEY, RUN, check_format

_NAME = "progress.json"


@dataclass
class Progress:
    """A run's progress, apart from the backend's state; saved with each checkpoint.

    Attributes:
        fingerprint, held_out: hashes of the tokens of the training and held-out data; "" for none, or unknown.
        base: what identifies the base model, by `lite_dil.models.fingerprint.base_of`.
        init_adapter: a hash of the initial adapter's files.
        rewards: hashes of the models that reward the policy's own answers, by the reward's name.
        drawn: a hash of the tokens of the training data with the responses that --sample-rejected drew.
        window: sums of the metrics since the last logged line, so that a resumed run logs the same means.
        metrics: size and hash of metrics.jsonl when the checkpoint was saved.
        ended: whether the training has ended before its last step, as --target-kl does.
        reward_spread: what --reward-scale running keeps: count, mean and sum of squared deviations of all rewards so far.

    Runs before format 3 recorded the training data alone.
    """

    step: int = 0
    num_tokens: int = 0
    fingerprint: str = ""
    window: dict[str, list[float]] = field(default_factory=dict)
    held_out: str = ""
    init_adapter: str = ""
    drawn: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    metrics: list[Any] = field(default_factory=list)
    ended: bool = False
    rewards: dict[str, str] = field(default_factory=dict)
    reward_spread: list[float] = field(default_factory=list)


def write_progress(checkpoint: Path, progress: Progress) -> None:
    """Write a checkpoint's progress.json, into a folder that is renamed later."""
    write(checkpoint / _NAME, json.dumps({KEY: RUN, **asdict(progress)}))


def read_progress(checkpoint: Path) -> Progress:
    """Read a checkpoint's progress.json. Raises UserError if it cannot be read, or has a field of a wrong type."""
    path = checkpoint / _NAME
    content = read_object(path)
    check_format(content, RUN, checkpoint)
    content.pop(KEY, None)
    if "step" not in content:
        raise UserError(f"{path}: step is missing")
    for name, value in content.items():
        if name not in _FIELDS:
            raise UserError(f"{path}: {name} is not a field of a run's progress")
        expected, holds = _FIELDS[name]
        if not holds(value):
            raise UserError(f"{path}: {name} is {repr(value)[:80]}; expected {expected}")
    return Progress(**content)


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _sums(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [None]
    return all(isinstance(each, list) and all(type(number) in (int, float) for number in each) for each in lists)


def _base(value: Any) -> bool:
    return value == {} or (
        isinstance(value, dict) and isinstance(value.get("weights"), str) and isinstance(value.get("config"), dict)
    )


def _hashes_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


def _size_and_hash(value: Any) -> bool:
    return value == [] or (isinstance(value, list) and len(value) == 2 and _whole(value[0]) and isinstance(value[1], str))


def _spread(value: Any) -> bool:
    return value == [] or (isinstance(value, list) and len(value) == 3 and all(type(n) in (int, float) for n in value))


_TEXT: tuple[str, Callable[[Any], bool]] = ("text", lambda value: isinstance(value, str))
_WHOLE: tuple[str, Callable[[Any], bool]] = ("a whole number, at least 0", _whole)
# What each field must be: in words, and as a check.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("step", "num_tokens"), _WHOLE),
    **dict.fromkeys(("fingerprint", "held_out", "init_adapter", "drawn"), _TEXT),
    "window": ("lists of numbers by name", _sums),
    "base": ("weights and config", _base),
    "rewards": ("hashes by name", _hashes_by_name),
    "metrics": ("a size and a hash", _size_and_hash),
    "reward_spread": ("three numbers, or none", _spread),
    "ended": ("true or false", lambda value: type(value) is bool),
}
