"""The rates at which this machine has trained, by model, backend, type and layout, in the user's cache folder."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from lite_dil.base.checked import with_digest, without_digest
from lite_dil.base.disk import DiskFailed, failing
from lite_dil.base.files import make_folder, replace_file
from lite_dil.base.observer import Event, Observer
from lite_dil.base.strict_json import parse_json
from lite_dil.models.find import cache_dir

LEAST = 5  # steps after the first, which compiles
POLICY_RATE, REWARD_RATE, SAMPLED_RATE = "policy", "reward model", "drawn answers"
_MOST = 50  # rates that are kept, the newest


@dataclass(frozen=True)
class Setting:
    """What a rate was measured with.

    Attributes:
        model: a hub id, or a folder with its whole path.
        layout: may be "auto".
        kind: `POLICY_RATE` on given responses, `REWARD_RATE`, a reward model, or `SAMPLED_RATE`, whose rate is not kept.
    """

    model: str
    backend: str
    dtype: str
    load_in_4bit: bool
    layout: str
    kind: str = POLICY_RATE

    def __str__(self) -> str:
        trained = "" if self.kind == POLICY_RATE else f"{self.kind}, "
        return f"{trained}{self.backend}, {self.dtype}{', 4 bits' if self.load_in_4bit else ''}, {self.layout} layout"


@dataclass(frozen=True)
class Rate:
    """A measured rate: tokens of all responses, each with its prompt, and examples, per second of training."""

    setting: Setting
    tokens_per_second: float
    examples_per_second: float
    steps: int
    date: str

    def __str__(self) -> str:
        return f"{self.tokens_per_second:,.0f} tokens/s (measured here in {self.steps} steps on {self.date}: {self.setting})"


def named(model: str) -> str:
    """Return a model's name in a `Setting`."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def known(model: str, setting: Setting | None = None) -> Rate | None:
    """Return the newest rate of a model, with this setting or for a policy in any; None if there is none."""
    for rate in reversed(_read()):
        taken = replace(setting, layout=rate.setting.layout) if setting and setting.layout == "auto" else setting
        if rate.setting.model == named(model) and (taken == rate.setting if taken else rate.setting.kind == POLICY_RATE):
            return rate
    return None


def keep(rate: Rate) -> None:
    """Add a rate to those of this machine, in the place of an earlier one with its setting. Raises DiskFailed."""
    kept = [*(old for old in _read() if old.setting != rate.setting), rate][-_MOST:]
    with failing(_path()):
        make_folder(_path().parent)
        replace_file(_path(), json.dumps([with_digest(asdict(rate)) for rate in kept], indent=1) + "\n")


def rate_of(lines: Sequence[dict[str, Any]], before: int, setting: Setting) -> Rate | None:
    """Return the rate of training lines in order, the first of which began after step `before`; None if they are too few.

    The first line is left out: its step waits for compilation.
    """
    ends = [before, *(line["step"] for line in lines)]
    steps = [end - start for start, end in pairwise(ends)][1:]
    if sum(steps) < LEAST:
        return None
    seconds = [line["seconds_per_step"] * number for line, number in zip(lines[1:], steps, strict=True)]
    tokens, examples = (
        sum(line[name] * each for line, each in zip(lines[1:], seconds, strict=True)) / sum(seconds)
        for name in ("tokens_per_second", "examples_per_second")
    )
    return Rate(setting, tokens, examples, sum(steps), datetime.date.today().isoformat())


class KeepRate(Observer):
    """Keeps the rate of a run that finishes."""

    writes = True

    def __init__(self, setting: Setting, say: Callable[[str], None]) -> None:
        self.setting, self.say = setting, say
        self._before, self._lines = 0, list[dict[str, Any]]()

    def started(self, event: Event) -> None:
        """Note where this part of the run begins."""
        self._before = event.step

    def after_step(self, event: Event) -> None:
        """Note the line."""
        if event.line:
            self._lines.append(event.line)

    def finished(self, event: Event) -> None:
        """Keep the rate; a full disk does not end the training."""
        if rate := rate_of(self._lines, self._before, self.setting):
            try:
                keep(rate)
            except DiskFailed as error:
                self.say(f"{error}. The rate of this run is not kept for lite-dil plan")


def _path() -> Path:
    return cache_dir() / "rates.json"


def _read() -> list[Rate]:
    """Return the rates, the oldest first; none if there is no such file, if another version wrote it, or if it is damaged."""
    try:
        found = map(without_digest, parse_json(_path().read_text(encoding="utf-8")))
        return [Rate(Setting(**entry.pop("setting")), **entry) for entry in found]
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return []
