"""answers.json of a checkpoint between two updates on the same answers: what the next update needs of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.base.checked import read_object
from lite_dil.base.files import write
from lite_dil.data.prompts import Prompt
from lite_dil.generation.rollouts import Rollout
from lite_dil.online.groups import DrawnGroups, Group, GroupSampler
from lite_dil.rewards.total import Rewarded

ANSWERS = "answers.json"


def write_answers(checkpoint: Path, drawn: DrawnGroups) -> None:
    """Write a step's groups; its numbers are read back bit for bit."""
    groups = [
        {
            "seeds": group.seeds,
            "rewards": group.rewards.tolist(),
            "parts": _lists(group.parts),
            "answers": [
                {
                    "ids": list(one.ids),
                    "ended": one.ended,
                    "logps": one.logps.tolist(),
                    "reference_logps": one.reference_logps.tolist(),
                }
                for one in group.rollouts
            ],
        }
        for group in drawn.groups
    ]
    content: dict[str, Any] = {"refilled": drawn.refilled, "groups": groups}
    if drawn.judged:
        content["judged"] = {"parts": _lists(drawn.judged.parts), "total": drawn.judged.total.tolist()}
    write(checkpoint / ANSWERS, json.dumps(content))


def read_answers(checkpoint: Path, sampler: GroupSampler, prompts: Sequence[Prompt]) -> DrawnGroups:
    """Return the groups of a checkpoint, whose seal was checked; `prompts` are theirs, in order.

    Raises UserError if the file cannot be read.
    """
    content = read_object(checkpoint / ANSWERS)
    groups = [_group(row, prompt, sampler) for row, prompt in zip(content["groups"], prompts, strict=True)]
    judged = content.get("judged")
    return DrawnGroups(groups, content["refilled"], judged and Rewarded(_arrays(judged["parts"]), np.array(judged["total"])))


def _group(row: dict[str, Any], prompt: Prompt, sampler: GroupSampler) -> Group:
    found = [
        Rollout(
            tuple(one["ids"]),
            np.array(one["logps"], np.float32),
            np.array(one["reference_logps"], np.float32),
            one["ended"],
        )
        for one in row["answers"]
    ]
    answers = [sampler.answered(prompt, one.ids, one.ended) for one in found]
    return Group(prompt, found, answers, row["seeds"], _arrays(row["parts"]), np.array(row["rewards"]))


def _lists(parts: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    return {name: values.tolist() for name, values in parts.items()}


def _arrays(parts: Mapping[str, list[Any]]) -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in parts.items()}
