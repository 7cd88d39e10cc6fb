"""``lite-dil reward``: train a reward model, an adapter and a head that score responses, on preference data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lite_dil.base import shell
from lite_dil.base.errors import UserError
from lite_dil.config.options import Once, add_flags, build, chosen, read_yaml
from lite_dil.config.resume import resumed
from lite_dil.config.train_config import FIELDS, NOT_OF_REWARDS
from lite_dil.models.options import trusting
from lite_dil.objectives.reward_table import REWARDS, identity

HELP = "train a reward model: a head that scores responses"
DESCRIPTION = """\
Train a reward model on preference data: a LoRA adapter and a head on the frozen base, which score a response by the state of
its end token. lite-dil score judges by it.

  lite-dil reward --data prefs.jsonl --reward-loss bt --output-dir runs/rm
"""
# Options that no reward loss has: those of a policy's losses, and those that its training alone needs.
_FLAGS = [
    name
    for name, field in FIELDS.items()
    if name not in NOT_OF_REWARDS
    and (field.metadata["group"] != "objective" or any(name in objective.options for objective in REWARDS.values()))
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "data", nargs="?", metavar="FILE", action=Once, default=argparse.SUPPRESS, help="the data, as --data names it"
    )
    add_loss(parser, "the loss", " (default: bt)")
    add_flags(parser, _FLAGS)
    group = parser.add_argument_group("files")
    group.add_argument("--config", metavar="FILE.yaml", help="options as 'key: value' lines; flags override them")
    group.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="DIR",
        help="continue a run as if it had never stopped: its folder, one of its checkpoints, or auto (the newest in "
        "--output-dir or under runs/); auto if no DIR is given",
    )
    group.add_argument(
        "--accept-changes",
        action="store_true",
        help="with --resume: go on although the run's config.yaml, base model or data changed, and list the changes",
    )


def add_loss(parser: argparse.ArgumentParser | argparse._ArgumentGroup, what: str, default: str = "") -> None:
    """Add --reward-loss, with `what` it is and its `default` for the help."""
    listed = ", ".join(f"{name} ({objective.title})" for name, objective in REWARDS.items())
    help_text = f"{what}; see docs/rewards.md: {listed}{default}"
    parser.add_argument("--reward-loss", metavar="{" + ",".join(REWARDS) + "}", help=help_text)


def loss_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the option that --reward-loss stands for; nothing if it is not given. Raises UserError for an unknown loss."""
    name = getattr(args, "reward_loss", None)
    if name is not None and name not in REWARDS:
        raise UserError(f"--reward-loss {name}: expected one of {', '.join(REWARDS)}")
    return {} if name is None else {"loss": identity(name)}


def run(args: argparse.Namespace) -> int:
    """Train; return the exit code."""
    from lite_dil.cli.progress import Terminal
    from lite_dil.recipes.given import Given
    from lite_dil.recipes.reward import train_reward

    display = Terminal()
    given: dict[str, Any] = {name: value for name, value in vars(args).items() if name in FIELDS} | loss_of(args)
    base = read_yaml(Path(args.config)) if args.config else {}
    new = {"loss": identity("bt")}
    if args.resume:
        config, checkpoint = resumed(given, base, args.resume, display.say, args.accept_changes, new=new)
    elif args.accept_changes:
        raise UserError("--accept-changes belongs to --resume, which is missing")
    else:
        config, checkpoint = build(given, new | base), None
    objects = Given(accept_changes=args.accept_changes)
    trained = train_reward(config, display, checkpoint, given=objects, fixed=chosen(given, base))
    if not trained.stopped:
        folder, trust = str(trained.folder), trusting(config)
        display.say("next:")
        display.say(f"  report  {trained.report.resolve().as_uri()}")
        display.say(f"  score   {shell.command('lite-dil', 'score', 'answers.jsonl', '--reward', folder, *trust)}")
    return 130 if trained.stopped else 0
