"""A command-line parser that reports errors in one line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NoReturn

from lite_dil.base.errors import UserError, did_you_mean, gather
from lite_dil.config.foreign import here
from lite_dil.config.train_config import FIELDS, POLICY_FIELDS, flag

_OURS = set(map(flag, FIELDS))
_OF_REWARDS = _OURS - set(map(flag, POLICY_FIELDS))


class Parser(argparse.ArgumentParser):
    """Raises a one-line UserError that suggests the nearest flag."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse a command line; flags of other tools are refused, with their equivalents here."""
        if args is not None and not {"--loss", "--reward-loss"}.isdisjoint(self._option_string_actions):
            found = list(self._foreign(args))
            if len(found) == 1:
                raise UserError(f"{found[0]}; see {self.prog} --help")
            if found:
                raise UserError(gather(found, f"flags of other tools; see {self.prog} --help:"))
        return super().parse_args(args, namespace)

    def _foreign(self, args: Sequence[str]) -> Iterator[str]:
        """Yield the equivalent of each flag of another tool."""
        for word, behind in zip_longest(args, args[1:], fillvalue=""):
            if word == "--":
                return
            name, equals, value = word.partition("=")
            if not word.startswith("--") or name in self._option_string_actions or name in _OURS:
                continue
            given = value if equals else None if behind.startswith("--") or not behind else behind
            if ours := here(name[2:], given):
                said = f"{name} {given}" if given is not None else name
                yield f"{said}: {ours}" if ours.startswith("leave") else f"{said} is {ours} here"

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as a UserError."""
        if unknown := message.partition("unrecognized arguments: ")[2]:
            first = unknown.split()[0].partition("=")[0]
            flags = [option for action in self._actions for option in action.option_strings]
            files = [action.metavar for action in self._actions if not action.option_strings]
            message = f"unknown argument {first}{did_you_mean(first, flags)}"
            if first == "--data" and files:
                message = f"{files[0]} is named without a flag here, as in {self.prog} prefs.jsonl"
            elif first == "--resume" or first in _OURS:
                owner = "reward" if first in _OF_REWARDS else "train"
                message = f"{first} is of lite-dil {owner} and changes nothing here{did_you_mean(first, flags)}"
        raise UserError(f"{message}; see {self.prog} --help")
