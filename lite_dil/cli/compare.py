"""``lite-dil compare``: train several losses from the same start on the same data and compare them."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_dil.base.errors import UserError
from lite_dil.cli.own_loss import load_loss, named_file
from lite_dil.config.options import add_flags, read_yaml
from lite_dil.config.train_config import FIELDS
from lite_dil.evaluation.comparison import LOSSES, SAMPLE_PROMPTS, SAMPLE_TOKENS

if TYPE_CHECKING:
    from lite_dil.cli.progress import Terminal
    from lite_dil.evaluation.comparison.report import Findings
    from lite_dil.evaluation.comparison.settings import Comparison
    from lite_dil.objectives.own import OwnLoss

HELP = "train several losses from the same start and compare them side by side"
DESCRIPTION = """\
Train several losses from the same start on the same data, and compare side by side what each does to the model.

  lite-dil compare --data prefs.jsonl --losses lsif,ukl,bce,dpo,simpo
  lite-dil compare --data prefs.jsonl --eval-data held_out.jsonl --losses lsif,dpo --seeds 0,1,2 --max-steps 200

Also takes the flags of train. Writes into --output: index.html (one page with everything), table.md, table.json,
figure2.png and curves.json (log-probs of held-out responses during training), and the runs. After an interruption, the same
command with the same --output continues.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    group = parser.add_argument_group("comparison")
    losses = ",".join(LOSSES)
    group.add_argument(
        "--losses", default=losses, help=f"losses to compare: names, or FILE.py:NAME for your own (default: {losses})"
    )
    group.add_argument("--seeds", help="train every loss with each of these seeds, such as 0,1,2 (default: --seed, or 0)")
    group.add_argument(
        "--learning-rates", help="rates by loss, such as lsif=1e-4,dpo=5e-5 (default: --learning-rate, or each loss's own)"
    )
    group.add_argument(
        "--sample-prompts",
        type=_count,
        default=SAMPLE_PROMPTS,
        metavar="N",
        help=f"held-out prompts that every trained model answers (default: {SAMPLE_PROMPTS})",
    )
    group.add_argument(
        "--sample-tokens",
        type=_count,
        default=SAMPLE_TOKENS,
        metavar="N",
        help=f"maximum tokens per answer (default: {SAMPLE_TOKENS})",
    )
    group.add_argument(
        "--output",
        metavar="DIR",
        help="the comparison's folder; an interrupted one continues (default: new, under runs/)",
    )
    group.add_argument(
        "--eval",
        nargs="?",
        const="paper",
        metavar="TASKS",
        help="at the end also evaluate every adapter beside the base, as lite-dil eval --tasks does (without TASKS: paper)",
    )
    group.add_argument("--eval-limit", type=_count, metavar="N", help="only the first N items of each task of --eval")
    group.add_argument("--config", metavar="FILE.yaml", help="options of train as 'key: value' lines; flags override them")
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run a comparison; return 0, or 130 if it was stopped."""
    from lite_dil.cli.progress import Terminal
    from lite_dil.recipes.comparison import Benchmarks, compare
    from lite_dil.recipes.evaluation import check_tasks

    display = Terminal()
    if args.eval_limit and not args.eval:
        raise UserError("--eval-limit belongs to --eval, which is missing")
    comparison = settled(args, display)
    if args.eval:
        check_tasks(args.eval, None, display.say)
    try:
        findings = compare(comparison, display, benchmarks=Benchmarks(args.eval, args.eval_limit) if args.eval else None)
    except UserError as error:  # finished runs are kept; options that change no result, such as --row-tokens, may differ
        raise UserError(f"{error}\nonce that is fixed, continue with: {comparison.again}") from error
    except KeyboardInterrupt:
        findings = None
    if findings is None:
        print(f"lite-dil: stopped; continue with: {comparison.again}", file=sys.stderr)
        return 130
    _show(comparison, findings, display)
    return 0


def settled(args: argparse.Namespace, display: Terminal) -> Comparison:
    """Return the comparison described by the command line, checked."""
    from lite_dil.evaluation.comparison.settings import ComparisonRequest, settle

    given = {name: value for name, value in vars(args).items() if name in FIELDS}
    base = read_yaml(Path(args.config)) if args.config else {}
    seed = given.pop("seed", base.pop("seed", "0"))

    def again(output: Path) -> str:
        return shlex.join(["lite-dil", *args.argv, *([] if args.output else ["--output", str(output)])])

    asked = ComparisonRequest(
        losses=[_loss(name) for name in _names(args.losses)],
        seeds=_names(str(args.seeds or seed)),
        rates=_rates(args.learning_rates),
        sample_prompts=args.sample_prompts,
        sample_tokens=args.sample_tokens,
        output=Path(args.output) if args.output else None,
        given=given,
        base=base,
        again=again,
    )
    return settle(asked, display.say)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _loss(name: str) -> str | OwnLoss:
    found = named_file(name)
    return load_loss(*found) if found else name


def _rates(text: str | None) -> dict[str, Any]:
    rates = {}
    for item in _names(text or ""):
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--learning-rates: {item!r} is not of the form loss=rate")
        if name in rates:
            raise UserError(f"--learning-rates: {name} is given twice")
        rates[name] = value
    return rates


def _show(comparison: Comparison, findings: Findings, display: Terminal) -> None:
    """Print the table with a column per loss: with a row per loss it would be wider than a terminal."""
    from rich.box import SIMPLE
    from rich.table import Table

    from lite_dil.cli.eval import show
    from lite_dil.reports.scores import outdated_lines, read_evaluations

    title = f"{comparison.steps} steps, seeds {', '.join(map(str, comparison.seeds))}"
    table = Table(title=title, box=SIMPLE, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(findings.headings[0], no_wrap=True)
    for name, *cells in findings.cells:
        table.add_column(name, justify="right", no_wrap=not any("±" in cell for cell in cells), overflow="fold")
    for number, heading in enumerate(findings.headings[1:], 1):
        table.add_row(heading, *(line[number] for line in findings.cells))
    display.console.print(table)
    scores = read_evaluations(comparison.output)
    for content in scores.current:
        show(content, display)
    for line in outdated_lines(scores):
        display.say(line)
    for text in [*findings.sentences, "", f"everything on one page: {findings.page}"]:
        display.say(text)
