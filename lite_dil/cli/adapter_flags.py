"""The flags of commands that use an adapter: --adapter, --strength, and those for loading the model."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lite_dil.backends import limits
from lite_dil.config.options import add_flags, build
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.data.prompts import FLAGS
from lite_dil.models.options import MODEL_FIELDS

if TYPE_CHECKING:
    from lite_dil.generation.policy import AdapterSource


def add_arguments(parser: argparse.ArgumentParser, required: bool = True, flags: Iterable[str] = MODEL_FIELDS) -> None:
    """Add --adapter, --strength, and `flags` of train for loading the model."""
    group = parser.add_argument_group("adapter")
    group.add_argument(
        "--adapter",
        metavar="DIR",
        required=required,
        help="a run's folder, one of its checkpoints, or a folder with an adapter in PEFT's or mlx-lm's format; model and "
        "quantisation are the run's unless given" + ("" if required else " (default: none, the bare --model)"),
    )
    group.add_argument(
        "--strength",
        metavar="X",
        type=float,
        default=1.0,
        help=f"factor on the adapter: 0 is the bare model, {limits.MAX_STRENGTH:g} the maximum (default: 1, as trained)",
    )
    add_flags(parser, flags)


def find(args: argparse.Namespace) -> AdapterSource:
    """Return the source named by --adapter and the model's flags. Raises as `lite_dil.config.adapter_source.find` does."""
    from lite_dil.config import adapter_source

    return adapter_source.find(args.adapter, vars(args), args.strength)


def options_of(args: argparse.Namespace) -> ResolvedConfig:
    """Return the options by which prompts are read, `FLAGS`, checked, with defaults for the others."""
    return build({name: value for name, value in vars(args).items() if name in FLAGS and value is not None}, {})
