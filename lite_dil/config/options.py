"""Read flags and YAML files, check them and build a TrainConfig."""

from __future__ import annotations

import argparse
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lite_dil.base.checked import DIGEST
from lite_dil.base.errors import UserError, did_you_mean, gather
from lite_dil.base.formats import KEY, RUN, check_format
from lite_dil.config.foreign import key_here
from lite_dil.config.train_config import FIELDS, ResolvedConfig, TrainConfig, flag
from lite_dil.data.arguments import FIELD
from lite_dil.objectives.own import is_own
from lite_dil.objectives.reward_table import REWARDS, identity, is_reward

_HINTS = typing.get_type_hints(TrainConfig)


def _types(name: str) -> tuple[type, bool]:
    """Return a field's type, and whether it may be None."""
    hint = _HINTS[name]
    if isinstance(hint, types.UnionType):
        inner = [t for t in typing.get_args(hint) if t is not type(None)]
        return inner[0], True
    return hint, False


def coerce(name: str, value: Any, where: str) -> Any:
    """Return `value` converted to the field's type, or raise UserError. Flags are text, and YAML reads 1e-5 as text."""
    kind, optional = _types(name)
    if value is None and optional:
        return None
    choices = FIELDS[name].metadata["choices"]
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    try:
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError
        elif (
            isinstance(value, (bool, list, dict, set, bytes))
            or value is None
            or (kind is not str and isinstance(value, str) and "_" in value)
        ):
            raise ValueError
        elif kind is int:
            value = int(value) if isinstance(value, str) else value
            if not isinstance(value, int):
                raise ValueError
        else:
            value = kind(value)
    except (ValueError, OverflowError, TypeError):  # TypeError: a date
        raise UserError(f"{where}: {value!r} is not {expected}") from None
    if choices and value not in choices and not (name == "loss" and (is_own(value) or is_reward(value))):
        raise UserError(f"{where}: {value!r}{did_you_mean(str(value), choices)} is not one of {', '.join(choices)}")
    return value


class Once(argparse.Action):
    """Stores a value, and refuses a second one, which would silently replace it."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _: str | None = None
    ) -> None:
        """Store the value."""
        if (first := getattr(namespace, self.dest, None)) is not None:
            name = flag(self.dest)
            parser.error(f"{name} is given twice, {first} and {values}; several sources are one list: {name} {first},{values}")
        setattr(namespace, self.dest, values)


def add_flags(parser: argparse.ArgumentParser, names: Iterable[str] = FIELDS) -> None:
    """Add a flag for each of the fields `names`, in groups. A flag that is not given sets no attribute."""
    groups: dict[str, Any] = {}
    for name in names:
        spec = FIELDS[name]
        meta = spec.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        kind, _ = _types(name)
        help = meta["help"]
        if spec.default is not None and kind is not bool:
            help += f" (default: {spec.default})"
        flags = [*meta["flags"], f"--{name.replace('_', '-')}"]
        common = {"dest": name, "default": argparse.SUPPRESS, "help": help.replace("%", "%%")}
        if kind is bool:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, **common)
        else:
            common |= {"action": Once} if name in ("data", "eval_data") else {}
            metavar = "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else meta["metavar"] or kind.__name__.upper()
            group.add_argument(*flags, metavar=metavar, **common)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a config file whose keys are flag names with underscores; a run's config.yaml also has a format number."""
    import yaml

    from lite_dil.base.yaml_file import read_yaml_file

    try:
        values = read_yaml_file(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected lines of the form 'key: value'")
    own = path.name == "config.yaml" and KEY in values
    if path.name == "config.yaml":  # may be a run's own
        check_format(values, RUN, path.parent)
        values.pop(KEY, None)
        values.pop(DIGEST, None)
        values.setdefault("eval_fraction", 0.0)  # of a version that held out what it was given alone
    problems, checked = [], {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        name = "load_in_4bit" if name == "4bit" else name
        if name == "reward_loss" and value in REWARDS:  # a file's name for --reward-loss
            name, value = "loss", identity(value)
        if name == "trust_remote_code" and own:
            value = False  # a run records it, and no file grants it
        if name == "trust_remote_code" and value:
            problems.append(f"key {key!r}: a file cannot grant this; give --trust-remote-code on the command line")
            continue
        if name not in FIELDS:
            ours = key_here(name, value)
            problems.append(f"unknown key {key!r}{f', which is {ours} here' if ours else did_you_mean(name, FIELDS)}")
            continue
        # These may be YAML lists.
        if name in ("target_modules", "data", "eval_data", "report_to") and isinstance(value, list):
            value = ",".join(map(str, value))
        if name == FIELD and isinstance(value, dict):
            value = json.dumps(value)
        if name in ("columns", "data", "eval_data") and isinstance(value, dict):
            value = ",".join(f"{part}={of}" for part, of in value.items())
        try:
            checked[name] = coerce(name, value, f"key {key!r}")
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(gather(problems, f"{path}:"))
    return checked


def chosen(given: Mapping[str, Any], base: Mapping[str, Any]) -> set[str]:
    """Return the options that --auto does not change: flags, and options that a file sets to a non-default value."""
    options = {**given, **{name: value for name, value in base.items() if value != FIELDS[name].default}}
    return {name for name, value in options.items() if value != "auto"}


def build(given: dict[str, Any], base: dict[str, Any]) -> ResolvedConfig:
    """Return the checked, resolved config: flags (text) override `base` (YAML or a resumed run), which overrides defaults."""
    problems, values = [], dict(base)
    for name, value in given.items():
        try:
            values[name] = coerce(name, value, f"argument {flag(name)}")
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    config = TrainConfig(**values)
    config.check()
    return config.resolved()
