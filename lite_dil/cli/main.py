"""The command line: ``lite-dil train`` and the commands around it."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lite_dil.base import shell
from lite_dil.base.disk import failing, flush, output_fails
from lite_dil.base.errors import TrainingDiverged, UserError
from lite_dil.base.start import quiet_bars, start
from lite_dil.base.text import printable
from lite_dil.base.version import __version__
from lite_dil.cli.own_code import reward_functions
from lite_dil.cli.own_loss import load_loss, named_file
from lite_dil.cli.parser import Parser
from lite_dil.cli.reward import add_loss, loss_of
from lite_dil.config.options import Once, add_flags, build, chosen, read_yaml
from lite_dil.config.resume import resumed
from lite_dil.config.train_config import FIELDS, POLICY_FIELDS, ResolvedConfig, flag
from lite_dil.data.sources import EMBEDDED
from lite_dil.models.find import EMBEDDED_MODEL
from lite_dil.objectives.own import OwnLoss
from lite_dil.rewards.spec import joined, resolved

_TRAIN = """\
Train a LoRA adapter on preference data. Without flags: the demo's training, SmolLM2-135M-Instruct on the embedded data.

  lite-dil train --model meta-llama/Llama-3.1-8B-Instruct --4bit --data prefs.jsonl
"""
_DATA = """\
Show what would be trained on, without loading a model: how the rows are read and which cannot be used, token lengths, what
--max-length cuts, what may spoil the training, whether held-out rows are also training rows, and three examples with their
tokens. Exit code 2 if train would stop.

  lite-dil data prefs.jsonl --model meta-llama/Llama-3.1-8B-Instruct
"""
_PLAN = """\
Show whether a run fits into memory, and what would help, before the model is downloaded: only its config.json is read.
Takes the flags of train, and with --reward-loss those of reward. Exit code: 0 if it fits, 1 if it does not, 2 for errors.

  lite-dil plan --model meta-llama/Llama-3.1-8B-Instruct --4bit --memory 12
"""
_DEMO = """\
Train the embedded 135M model on the embedded data (about 3 minutes on 2 CPU cores), then show its answers to held-out
questions before and after. Takes the flags of train.
"""
# The flags of train that decide which data is read and how the loss uses it.
_DATA_FLAGS = (
    "model",
    "trust_remote_code",
    "chat_template_kwargs",
    "eval_data",
    "eval_fraction",
    "data_format",
    "columns",
    "chat",
    "max_rows",
    "skip_bad_rows",
    "max_length",
    "loss",
    "sample_rejected",
    "seed",
)
# Commands in their own modules, each with HELP (one line), DESCRIPTION, add_arguments(parser) and run(args), which returns
# the exit code. They import nothing heavy before `run`.
_MODULES: tuple[str, ...] = (
    "reward",
    "score",
    "compare",
    "eval",
    "chat",
    "generate",
    "label",
    "export",
    "doctor",
    "runs",
)


def main(argv: list[str] | None = None) -> int:
    """Run a command; return its exit code.

    0; 1 if training diverged or a plan does not fit; 2 for user errors; 130 if stopped.
    """
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # a terminal or pipe that is not UTF-8 shows escapes
            reconfigure(errors="backslashreplace")
    try:
        with failing():
            code = _run(sys.argv[1:] if argv is None else argv)
            flush()
            return code
    except UserError as error:
        print(f"lite-dil: {printable(str(error))}", file=sys.stderr)
        if output_fails():  # it would fail again, with a traceback, when Python exits
            _drop_output()
        return 2
    except TrainingDiverged as error:
        print(f"lite-dil: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lite-dil: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has closed it, as `| head` does
        _drop_output()
        return 141
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        print(f"lite-dil: {printable(str(error.filename))[:200]}: {error.strerror}; give another name", file=sys.stderr)
        return 2


def _drop_output() -> None:
    """Discard what has not been written to standard output yet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser of the whole command line, and each command's parser by name."""
    parser = Parser(prog="lite-dil", description="Preference training of language models by Direct Imitation Learning.")
    parser.add_argument("--version", action="version", version=f"lite-dil {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, text: str, help: str) -> argparse.ArgumentParser:
        layout = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, help=help, description=text, formatter_class=layout, allow_abbrev=False)

    for name, text, help in (
        ("plan", _PLAN, "show whether a run fits into memory, before anything is downloaded"),
        ("train", _TRAIN, "train an adapter on preference data"),
        ("data", _DATA, "show what would be trained on: lengths, problems, samples"),
        ("demo", _DEMO, "train the embedded model and see its answers before and after"),
    ):
        command = add(name, text, help)
        add_flags(command, {"data": _DATA_FLAGS, "plan": FIELDS}.get(name, POLICY_FIELDS))
        group = command.add_argument_group("files")
        group.add_argument("--config", metavar="FILE.yaml", help="options as 'key: value' lines; flags override them")
        if name != "demo":
            _add_file(command)
        if name == "data":
            group.add_argument(
                "--json",
                action="store_true",
                help="print one JSON object instead; lite_dil/data/inspect/findings.py describes its fields",
            )
        elif name == "plan":
            _add_plan(command)
        else:
            group.add_argument(
                "--resume",
                nargs="?",
                const="auto",
                metavar="DIR",
                help="continue a run as if it had never stopped: its folder, one of its checkpoints, or auto (the newest run "
                "in --output-dir or under runs/, or a new run if there is none); auto if no DIR is given",
            )
            group.add_argument(
                "--accept-changes",
                action="store_true",
                help="with --resume: go on although the run's config.yaml, base model or data changed, and list the changes",
            )
    for name in _MODULES:
        _module(name).add_arguments(add(name, _module(name).DESCRIPTION, _module(name).HELP))
    return parser, commands.choices


def _module(name: str) -> Any:
    return importlib.import_module(f"lite_dil.cli.{name}")


def _run(argv: list[str]) -> int:
    name = argv[0] if argv else ""
    parser, commands = parsers()
    # Parsed by the sub-parser itself, so that an unknown flag is compared with that command's flags.
    chosen = commands.get(name)
    args = chosen.parse_args(argv[1:]) if chosen else parser.parse_args(argv)
    start(training=name in ("train", "demo", "reward", "compare"))
    args.argv = argv
    if getattr(args, "trust_remote_code", False):
        print("--trust-remote-code: Python files that come with the model are run, with all your rights", file=sys.stderr)
    if name in _MODULES:
        return int(_module(name).run(args))
    args.own_loss = _own_loss(args)
    rewards = joined(getattr(args, "reward", None), getattr(args, "eval_reward", None))
    args.functions = reward_functions(rewards) if rewards else {}
    if name == "data":
        return _show_data(args)
    if name == "plan":
        return _show_plan(args)
    from lite_dil.cli.progress import Terminal

    display = Terminal()
    config, resume, fixed = _config(args, display.say)
    if name == "demo" and (config.online or (config.model, config.data) != (EMBEDDED_MODEL, EMBEDDED)):
        raise UserError(
            "the demo is the embedded model on the embedded data; use lite-dil train for --model, --data and --reward"
        )

    from lite_dil.cli import next_steps
    from lite_dil.cli.demo import MEASURED, show
    from lite_dil.recipes.given import Given

    if name == "demo" and "report_samples" not in fixed:
        config = replace(config, report_samples=MEASURED)
    given = Given(loss=args.own_loss, rewards=args.functions, accept_changes=args.accept_changes)
    if config.online:
        from lite_dil.recipes import online

        trained = online.train(config, display, resume, given=given)
    else:
        from lite_dil.recipes import preference

        trained = preference.train(config, display, resume, fixed, given=given)
    if name == "demo" and not trained.stopped:
        show(trained, display)
    for line in [] if trained.stopped else next_steps.lines(trained.folder, config):
        display.say(line)
    return 130 if trained.stopped else 0


def _add_file(command: argparse.ArgumentParser) -> None:
    """Accept the data as a positional argument."""
    what = FIELDS["data"].metadata["help"].partition(". lite-dil data")[0]
    command.add_argument(
        "data", nargs="?", metavar="FILE", action=Once, default=argparse.SUPPRESS, help=f"{what} (default: {EMBEDDED})"
    )


def _add_plan(command: argparse.ArgumentParser) -> None:
    """Add the flags of `lite-dil plan` that train does not have."""
    group = command.add_argument_group("plan")
    add_loss(group, "plan for lite-dil reward with this loss")
    group.add_argument(
        "--memory",
        metavar="GB",
        help="memory to plan for: the GPU's, the Mac's, or with --backend cpu the computer's (default: what is free here)",
    )
    group.add_argument(
        "--host-memory",
        metavar="GB",
        help="memory of the computer with the NVIDIA GPU (default: what is free here; with --memory, unlimited)",
    )
    rate = group.add_mutually_exclusive_group()
    rate.add_argument("--tokens-per-second", metavar="X", help="training speed, to estimate the time of an epoch")
    rate.add_argument("--like", metavar="RUN_FOLDER", help="use the speed of this earlier run")
    rate.add_argument(
        "--measure",
        action="store_true",
        help="load the model and take a few steps here, with drawn answers too, to know its speed",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")


def _config(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[ResolvedConfig, Path | None, set[str]]:
    """Merge flags, YAML, a resumed run's options and the defaults, in this order; return also the options the user set."""
    given, base = _options(args)
    fixed = chosen(given, base)
    if not args.resume:
        if args.accept_changes:
            raise UserError("--accept-changes belongs to --resume, which is missing")
        return build(given, base), None, fixed
    return *resumed(given, base, args.resume, say, args.accept_changes), fixed


def _own_loss(args: argparse.Namespace) -> OwnLoss | None:
    """Return the loss of --loss FILE.py:NAME, else None."""
    found = named_file(getattr(args, "loss", ""))
    return None if found is None else load_loss(*found)


def _options(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options given as flags, and those of the --config file."""
    given = {name: value for name, value in vars(args).items() if name in FIELDS}
    if args.own_loss is not None:
        given["loss"] = args.own_loss.identity
    if reward := loss_of(args):  # of plan
        if "loss" in given:
            raise UserError(
                f"--reward-loss {args.reward_loss} plans for lite-dil reward, and --loss for lite-dil train; give one"
            )
        given |= reward
    given |= {name: resolved(given[name], args.functions) for name in ("reward", "eval_reward") if name in given}
    return given, read_yaml(Path(args.config)) if args.config else {}


def _show_plan(args: argparse.Namespace) -> int:
    """Print whether the run fits; return 0 if it does, else 1."""
    from lite_dil.cli import plan

    given, base = _options(args)
    return plan.run(args, build(given, base), chosen(given, base))


def _show_data(args: argparse.Namespace) -> int:
    """Print the report on the data; return 0 if training would accept it, else 2."""
    config = build(*_options(args))
    import json

    from rich.console import Console

    from lite_dil.cli.progress import Terminal
    from lite_dil.cli.show_data import Show
    from lite_dil.data.encoder import encoder_of
    from lite_dil.data.inspect.findings import report
    from lite_dil.models.find import resolve_model
    from lite_dil.planning import how_long

    aside = Terminal(Console(stderr=True, highlight=False, soft_wrap=True))
    quiet_bars()
    with aside.console.status("reading the data"):
        found = report(config, encoder_of(resolve_model(config.model, aside.say), config))
    if found["form"] and not found["stops"]:
        found["time"] = how_long.time_of(config, found)
    if args.json:
        print(json.dumps(found))
    else:
        Show(Console(highlight=False)).all(found, _as_train(args))
    return 2 if found["stops"] else 0


def _as_train(args: argparse.Namespace) -> str:
    """Return the training command for the data that `args` of lite-dil data show."""
    words = ["lite-dil", "train", *(["--config", args.config] if args.config else [])]
    for name, value in vars(args).items():
        if name in FIELDS and isinstance(value, bool):
            words.append(flag(name) if value else f"--no-{flag(name)[2:]}")
        elif name in FIELDS:
            words += [flag(name), value]
    return shell.command(*words)
