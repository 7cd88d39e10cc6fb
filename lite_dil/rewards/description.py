"""reward.json, beside the files of a reward model's adapter and head: which base they belong to, and what the score means."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lite_dil.base.checked import with_digest, without_digest
from lite_dil.base.errors import UserError, first_line
from lite_dil.base.files import write
from lite_dil.base.formats import KEY, REWARD, check_format
from lite_dil.base.strict_json import parse_json

REWARD_FILE = "reward.json"


@dataclass(frozen=True)
class Description:
    """What a reward model's folder says of it.

    Attributes:
        loss: the name of its loss.
        scale: multiplies the head's first output, and the noise scale V; 1 except for bt-variance, whose loss leaves it open.
        base: what identifies its base; see `lite_dil.models.fingerprint.base_of`.
        model: the base's name.
        lowest, highest: the extreme scores that it gave to responses of its training data; see `cut_score`. None in a file of
            an earlier version.
    """

    loss: str
    scale: float
    base: dict[str, Any]
    model: str
    lowest: float | None = None
    highest: float | None = None

    def cut_score(self, weight: float, folder: Path) -> float:
        """Return what an answer that was cut before its end gets, which a head cannot score: the worst for this weight.

        Raises UserError if the file has no such figures.
        """
        worst = self.lowest if weight > 0 else self.highest
        if worst is None:
            raise UserError(
                f"{folder / REWARD_FILE} is of an earlier lite-dil and lacks the lowest score, which answers get that are cut "
                "before their end; train the reward model again"
            )
        return worst


def write_description(folder: Path, description: Description) -> None:
    """Write reward.json."""
    write(folder / REWARD_FILE, json.dumps({KEY: REWARD, **with_digest(asdict(description))}, indent=1) + "\n")


def read_description(folder: Path) -> Description:
    """Read reward.json. Raises UserError if there is none, or if it is not what the run wrote."""
    path = folder / REWARD_FILE
    if not path.is_file():
        raise UserError(f"{folder} is no reward model: it has no {REWARD_FILE}; lite-dil reward trains one")
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            check_format(content, REWARD, path)
            content.pop(KEY, None)
        found = Description(**without_digest(content))
        if not (math.isfinite(found.scale) and found.scale > 0):
            raise ValueError(f"scale is {found.scale}")
        for name, value in (("lowest", found.lowest), ("highest", found.highest)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from None
    return found


def check_base(folder: Path, description: Description, base: Mapping[str, Any], model: str) -> None:
    """Raise UserError unless `base`, that of `model`, is the one that the reward model in `folder` was trained on."""
    trained = description.base
    if trained["weights"] != base["weights"]:
        raise UserError(
            f"{folder} was trained on {description.model}, and --model {model} has other weights: its head reads states that "
            "this model does not have; give the model it was trained on, or train a reward model on this one"
        )
    old, new = trained["config"], base["config"]
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if changed:
        raise UserError(
            f"{folder} was trained on {description.model}, and --model {model} computes otherwise: {changed[0]} in its "
            f"config.json was {old.get(changed[0])}, and is {new.get(changed[0])}"
        )
