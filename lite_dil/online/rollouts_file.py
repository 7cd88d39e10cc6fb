"""rollouts.jsonl: every answer that a run trained on, with its reward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lite_dil.base.jsonl import JSONLines
from lite_dil.base.observer import Event, Observer
from lite_dil.base.strict_json import parse_json
from lite_dil.online.training import OnlineTraining, TakenOnline
from lite_dil.rewards.total import Rewarded

ROLLOUTS = "rollouts.jsonl"


class RolloutsFile(Observer):
    """Writes each step's answers; in a resumed run, those after the checkpoint are removed first."""

    writes = True

    def __init__(self, folder: Path, training: OnlineTraining, say: Callable[[str], None]) -> None:
        self._path, self._training, self._say = folder / ROLLOUTS, training, say
        self._file: JSONLines | None = None
        self._written = 0

    def started(self, event: Event) -> None:
        """Remove the answers of steps that will be taken again."""
        self._file = JSONLines(self._path, "the drawn answers")
        found = [row for row in map(_row, self._file.lines) if row is not None]
        if damaged := len(self._file.lines) - len(found):
            self._say(f"warning: {self._path}: {damaged} damaged rows are removed")
        kept = [row for row in found if row["step"] <= event.step]
        if len(kept) < len(self._file.lines):
            self._file.rewrite(kept)
        self._written = event.step

    def after_step(self, event: Event) -> None:
        """Write the step's answers; further steps on them add none."""
        taken = self._training.last
        if self._file is not None and taken is not None and taken.step == event.step > self._written:
            if not taken.update:
                self._file.add(*_rows(taken))
            self._written = event.step


def _rows(taken: TakenOnline) -> Iterator[dict[str, Any]]:
    """Yield a row for each answer."""
    judged, at = taken.drawn.judged, itertools.count()
    for group, advantages in zip(taken.drawn.groups, taken.advantages, strict=True):
        columns = (group.rollouts, group.answers, group.seeds, group.rewards, group.log_ratios, advantages)
        for number, (rollout, answer, seed, reward, ratio, advantage) in enumerate(zip(*columns, strict=True)):
            yield {
                "step": taken.step,
                "place": group.prompt.place,
                "prompt": answer.prompt,
                "response": answer.response,
                "reward": float(reward),
                "rewards": {name: float(values[number]) for name, values in group.parts.items()},
                **_judged(judged, next(at)),
                "log_ratio": float(ratio),
                "advantage": float(advantage),
                "ended": rollout.ended,
                "ids": list(rollout.ids),
                "seed": seed,
            }


def _judged(judged: Rewarded | None, at: int) -> dict[str, Any]:
    """Return what --eval-reward gave to an answer."""
    if judged is None:
        return {}
    parts = {name: float(values[at]) for name, values in judged.parts.items()}
    return {"eval_reward": float(judged.total[at]), "eval_rewards": parts}


def _row(line: bytes) -> dict[str, Any] | None:
    """Return a row that was written; None if it is damaged."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
