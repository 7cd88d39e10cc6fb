"""``lite-dil plan``: show whether a run fits, why, and what would help."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Set
from pathlib import Path

from lite_dil.base.errors import UserError
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.planning.plan import make, with_rate
from lite_dil.planning.plan_text import lines


def run(args: argparse.Namespace, config: ResolvedConfig, given: Set[str]) -> int:
    """Print the plan for the flags; return 0 if the run fits, else 1."""
    from rich.console import Console

    size, rate = _number(args.memory, "--memory"), _number(args.tokens_per_second, "--tokens-per-second")
    host = _number(args.host_memory, "--host-memory")
    if args.measure and size is not None:
        raise UserError("--measure measures this machine; leave out --memory")
    plan = make(config, given, size, rate, Path(args.like) if args.like else None, host)
    if args.measure and plan.fits:
        from lite_dil.cli.progress import Terminal
        from lite_dil.recipes.given import Given
        from lite_dil.recipes.measure import measure

        display = Terminal(Console(stderr=True, highlight=False, soft_wrap=True))
        plan = with_rate(plan, measure(config, display, given, Given(loss=args.own_loss, rewards=args.functions)))
    print(json.dumps(plan.as_json(), indent=2) if args.json else "\n".join(lines(plan)))
    return 0 if plan.fits else 1


def _number(text: str | None, flag: str) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e9:
        raise UserError(f"argument {flag}: {text!r} is not a number above 0")
    return value
