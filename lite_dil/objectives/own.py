"""Losses of one's own: functions of log-ratios, and what a run's files call them.

A run's config.yaml holds ``own:NAME:KIND:REDUCTION:DIGEST``. All that reports and exports ask of a loss is in that name; the
functions themselves must be given again to train on, and are never loaded because a file names them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from lite_dil.base.errors import UserError
from lite_dil.objectives.losses import Array
from lite_dil.objectives.naming import CannotName, identify, place_of, source_of
from lite_dil.objectives.objective import Constants, Objective, Pairs, Sides

Function: TypeAlias = Callable[..., Array]

_OWN = re.compile(r"own:([\w.-]{1,60}):(pairs|sides|chosen):(sum|mean):([0-9a-f]{12})")
_LEARNING_RATE = 1e-4  # as every objective of the table has it


class OwnLoss:
    """What `PairLoss` and `SideLoss` share.

    Attributes:
        name: what people call it.
        identity: what a run's files call it.
        functions: its functions, in the order in which they are given.
        source: their text, empty where `version` stands for it.
    """

    kind = ""

    def __init__(self, functions: Sequence[Function], reduction: str, name: str | None, version: str | None) -> None:
        made = f"dil.{type(self).__name__}"
        for function in functions:
            if not callable(function):
                raise UserError(f"{made}: expected a function of log-ratios, found {type(function).__name__}")
        if reduction not in ("sum", "mean"):
            raise UserError(f'{made}: reduction is {reduction!r}; expected "sum" or "mean"')
        self.functions, self.reduction = tuple(functions), reduction
        self.name = name or getattr(functions[0], "__name__", "").replace("<lambda>", "lambda")
        if not re.fullmatch(r"[\w.-]{1,60}", self.name, re.ASCII):
            raise UserError(f"{made}: {self.name!r} is no name; give name=, of letters, digits, '_', '.' and '-'")
        try:
            digest = identify(functions, version)
        except CannotName as error:
            raise UserError(
                f"{made}: {place_of(functions[0])}: {error}, so that nothing tells a changed loss from this one when a run "
                "goes on; give name= and version=, and another version with every change"
            ) from None
        self.source = "" if version is not None else "\n".join(dict.fromkeys(map(source_of, functions)))
        self.identity = f"own:{self.name}:{self.kind}:{reduction}:{digest}"

    @property
    def form(self) -> Sides | Pairs:
        """The loss as the criterion takes it."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}, of the {self.reduction} over tokens>"


class PairLoss(OwnLoss):
    """A loss of one's own of a chosen and a rejected answer to the same prompt.

    `function` takes two arrays of the log-ratios ``log pi(y|x) - log pi_ref(y|x)`` in nats, float32, of shape (pairs,), those
    of the chosen answers and those of the rejected ones, and returns the loss of each pair, (pairs,). The arrays are of the
    backend's library, torch or mlx.core, in training and in evaluation. The loss of a pair must not depend on other pairs: a
    step may be split anywhere. It is tried on four made-up values before a model is loaded.

    Args:
        reduction: whether a log-ratio is the "sum" over an answer's tokens or their "mean".
        name: by default the function's.
        version: stands for the function in a run's files. By default that is its text, its defaults, and the values that it
            takes from around it.

    Raises:
        UserError: something of the function cannot be named, and there is no `version`.
    """

    kind = "pairs"

    def __init__(
        self, function: Function, *, reduction: str = "sum", name: str | None = None, version: str | None = None
    ) -> None:
        super().__init__([function], reduction, name, version)

    @property
    def form(self) -> Pairs:
        """See `OwnLoss`."""
        (function,) = self.functions
        return Pairs(lambda good, bad: function(good.log_ratio, bad.log_ratio))


class SideLoss(OwnLoss):
    """A loss of one's own that is one expectation a side, so that it needs no pairs.

    Each function takes the log-ratios of one side's answers, (answers,), and returns the loss of each; all else is as with
    `PairLoss`. Without `rejected` it is of good answers alone.
    """

    def __init__(
        self,
        chosen: Function,
        rejected: Function | None = None,
        *,
        reduction: str = "mean",
        name: str | None = None,
        version: str | None = None,
    ) -> None:
        self.kind = "chosen" if rejected is None else "sides"
        super().__init__([chosen] if rejected is None else [chosen, rejected], reduction, name, version)

    @property
    def form(self) -> Sides:
        """See `OwnLoss`."""
        chosen, rejected = self.functions[0], self.functions[1] if len(self.functions) > 1 else None
        return Sides(
            lambda answers: chosen(answers.log_ratio),
            None if rejected is None else lambda answers: rejected(answers.log_ratio),
        )


def is_own(loss: str) -> bool:
    """Return whether this is the name of a loss of one's own, as a run's files have it."""
    return _OWN.fullmatch(loss) is not None


def described(loss: str) -> Objective:
    """Return what the name of an own loss says of it; its form raises UserError, as the functions are not known."""
    name, kind, reduction, digest = parts(loss)

    def form(constants: Constants) -> Any:
        raise UserError(missing(loss))

    return Objective(
        title="a loss of one's own",
        data=kind,
        form=form,
        reduction=reduction,
        beta=None,
        learning_rate=_LEARNING_RATE,
        formula=f"{name}, digest {digest}",
        use="",
        source="written for this run",
    )


def parts(loss: str) -> tuple[str, str, str, str]:
    """Return name, kind, reduction and digest of an own loss's name."""
    found = _OWN.fullmatch(loss)
    assert found is not None
    return found[1], found[2], found[3], found[4]


def shown(loss: str) -> str:
    """Return what people call a loss."""
    return parts(loss)[0] if is_own(loss) else loss


def missing(loss: str) -> str:
    """Say that the functions of an own loss must be given."""
    return (
        f"--loss {shown(loss)} is a loss of one's own, whose code a run does not keep: give it again, as --loss FILE.py:NAME, "
        "in Python as dil.train(..., loss=...)"
    )
