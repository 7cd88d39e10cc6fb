"""``--reward``: the sources of a run's reward and their weights, as text and as objects.

A run's config.yaml holds a Python function as ``function:NAME:DIGEST``. The function itself comes from the command line or a
program, again for each resumed run: no file grants that code is run.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError, did_you_mean
from lite_dil.rewards.answer import READERS, AnswerSource
from lite_dil.rewards.function import TIMEOUT, FunctionSource, identity_of
from lite_dil.rewards.source import RewardSource

Functions = Mapping[str, Callable[..., Any]]  # a reward's functions by name
# Kinds that models compute, and which the caller opens beside the policy.
REWARD_RUN, IMPLICIT, HF = "run", "implicit", "hf"
MODELS = (REWARD_RUN, IMPLICIT, HF)
_EXPECTED = (
    "answer:exact|number|choice, FILE.py:FUNCTION, the folder of a run of lite-dil reward, implicit:ADAPTER or hf:MODEL, "
    "without a comma in its path"
)
_FUNCTION = re.compile(r"function:(\w{1,60}):([0-9a-f]{12})")


@dataclass(frozen=True)
class Part:
    """One source of a reward.

    Attributes:
        kind: "answer"; "file", a function in a file; "function", one by its name and digest; `REWARD_RUN`, a trained head;
            `IMPLICIT`, the log-ratio of a trained policy; or `HF`, a sequence classifier of transformers.
        value: the kind of answer, FILE.py:FUNCTION, NAME:DIGEST, the folder of a run or an adapter, or a model's folder or
            hub id.
        given: whether the text has the weight.
    """

    kind: str
    value: str
    weight: float
    given: bool = False

    @property
    def name(self) -> str:
        """Names its metrics: rewards/NAME/mean."""
        if self.kind == "answer":
            return f"answer:{self.value}"
        if self.kind in MODELS:
            name = Path(self.value).absolute().name
            return name if self.kind == REWARD_RUN else f"{self.kind}:{name}"
        return self.value.rpartition(":")[2] if self.kind == "file" else self.value.partition(":")[0]

    def __str__(self) -> str:
        source = self.value if self.kind in ("file", REWARD_RUN) else f"{self.kind}:{self.value}"
        short = f"{self.weight:g}"
        weight = short if float(short) == self.weight else repr(self.weight)
        return source if self.weight == 1 and not self.given else f"{source}={weight}"


def joined(*texts: str | None) -> str:
    """Return several texts as one; those that are None are left out."""
    return ",".join(text for text in texts if text is not None)


def parse(text: str) -> list[Part]:
    """Return the parts of text such as ``answer:number,rewards.py:brief=0.2``. Raises UserError."""
    parts = _parts(text, _is_there)
    for name, count in Counter(part.name for part in parts).items():
        if count > 1:
            raise UserError(f"--reward: {name!r} is there twice; its metrics could not be told apart")
    return parts


def moved(text: str, saved: str) -> bool:
    """Return whether two texts differ at most in where models are, of which nothing needs to be there. Raises UserError."""
    now, before = (
        [(part.kind, part.weight, "" if part.kind in MODELS else part.value) for part in _parts(each, _anything)]
        for each in (text, saved)
    )
    return now == before


def gone(text: str) -> list[str]:
    """Return the folders in a run's text that are not there. Raises UserError."""
    parts = _parts(text, _anything)
    return [part.value for part in parts if part.kind in (REWARD_RUN, IMPLICIT) and not _is_there(part.value)]


def _is_there(folder: str) -> bool:
    return Path(folder).is_dir()


def _anything(folder: str) -> bool:
    return bool(folder)


def _parts(text: str, there: Callable[[str], bool]) -> list[Part]:
    return [_part(piece.strip(), there) for piece in text.split(",")]


def _part(piece: str, there: Callable[[str], bool]) -> Part:
    source, factor = _weighted(piece, there)
    given = source != piece
    kind, _, value = source.partition(":")
    if kind == "answer":
        if value not in READERS:
            raise UserError(f"--reward {source}{did_you_mean(value, READERS)}: expected answer:{'|'.join(READERS)}")
        return Part("answer", value, factor)
    if kind == HF and value:
        return Part(HF, value, factor)
    if kind == IMPLICIT:
        if not value or not there(value):
            raise UserError(f"--reward {source}: no such folder; expected that of a run of lite-dil train, or of an adapter")
        return Part(IMPLICIT, value, factor, given)
    if _FUNCTION.fullmatch(source):
        return Part("function", value, factor)
    path, colon, name = source.rpartition(":")
    if colon and path.endswith(".py") and name.isidentifier():
        return Part("file", source, factor)
    if source.endswith(".py"):
        raise UserError(f"--reward {source}: name the function in it, as {source}:brief")
    if not source or not there(source):
        raise UserError(f"--reward {source or piece!r}: expected {_EXPECTED}")
    return Part(REWARD_RUN, source, factor)


def _weighted(piece: str, there: Callable[[str], bool]) -> tuple[str, float]:
    """Return a source and its weight. Raises UserError if what follows the last "=" is neither a weight nor part of a path."""
    source, equals, number = piece.rpartition("=")
    if not equals:
        return piece, 1.0
    try:
        factor = float(number)
    except ValueError:
        whole = re.match(r"answer:|.*\.py:\w+$", source)  # a source before the "=", so that 1/2 is a wrong weight
        folder = piece.removeprefix(f"{IMPLICIT}:").removeprefix(f"{HF}:")
        if not whole and (re.search(r"[/\\]|\.py", number) or there(folder)):
            return piece, 1.0
        factor = math.nan
    if not math.isfinite(factor) or factor == 0:
        raise UserError(f"--reward {piece}: {number!r} is no weight; expected a number other than 0, as in answer:number=0.5")
    return source, factor


def resolved(text: str, functions: Functions) -> str:
    """Return the text for a run's files, with the digests of its functions in place of where they come from.

    Args:
        functions: the functions that the command line named, by name.
    """
    parts = [
        Part("function", f"{part.name}:{identity_of(functions[part.name])}", part.weight) if part.kind == "file" else part
        for part in parse(text)
    ]
    return ",".join(map(str, parts))


def of_program(
    **rewards: str | Callable[..., Any] | Iterable[str | Callable[..., Any]] | None,
) -> tuple[dict[str, str], Functions]:
    """Return the options of a program's rewards, none for those that are None, and their functions by name.

    Args:
        rewards: by option, text as ``--reward`` takes it, a function, or several of both, which are summed.
    """
    functions, options = dict[str, Callable[..., Any]](), dict[str, str]()
    for option, given in rewards.items():
        texts = list[str]()
        for each in [given] if isinstance(given, str) or callable(given) else given or ():
            if isinstance(each, str):
                texts.append(each)
            else:
                name = getattr(each, "__name__", type(each).__name__).strip("<>")
                functions[name] = each
                texts.append(f"function:{name}:{identity_of(each)}")
        if given is not None:
            options[option] = ",".join(texts)
    return options, functions


def files(text: str) -> dict[str, tuple[Path, str]]:
    """Return the file and the function's name of each part that is in a file, by name."""
    named = {part.name: part.value.rpartition(":") for part in parse(text) if part.kind == "file"}
    return {name: (Path(path), function) for name, (path, _, function) in named.items()}


def source_of(part: Part, functions: Functions, timeout: float = TIMEOUT, flag: str = "--reward") -> RewardSource:
    """Return the source of a part that no model computes; `flag` is the option that names it.

    Raises UserError if its function is missing or was changed, or cannot be used.
    """
    if part.kind == "answer":
        return AnswerSource(part.value)
    if part.name not in functions:
        raise UserError(
            f"{flag} {part.name} is a Python function, which no file grants to run: give it again, as {flag} FILE.py:"
            f"{part.name} on the command line, or in Python as dil.train(..., reward=...)"
        )
    digest = identity_of(functions[part.name])
    if part.kind == "function" and digest != part.value.rpartition(":")[2]:
        raise UserError(f"{flag} {part.name}: the function is not the one that the run has; it was changed")
    return FunctionSource(part.name, functions[part.name], timeout)
