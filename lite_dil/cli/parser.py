"""The parser of a command line, whose errors are the user's in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lite_dil.base.errors import UserError, did_you_mean
from lite_dil.config.train_config import FIELDS, flag


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest flag, as a UserError."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError for what argparse found."""
        if unknown := message.partition("unrecognized arguments: ")[2]:
            first = unknown.split()[0].partition("=")[0]
            flags = [option for action in self._actions for option in action.option_strings]
            files = [action.metavar for action in self._actions if not action.option_strings]
            message = f"unknown argument {first}{did_you_mean(first, flags)}"
            if first == "--data" and files:
                message = f"{files[0]} is named without a flag here, as in {self.prog} prefs.jsonl"
            elif first in {"--resume", *map(flag, FIELDS)}:
                message = f"{first} is of lite-dil train and changes nothing here{did_you_mean(first, flags)}"
        raise UserError(f"{message}; see {self.prog} --help")
