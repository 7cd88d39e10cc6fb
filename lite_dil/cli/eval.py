"""``lite-dil eval``: benchmarks and preferences of an adapter beside its base."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_dil.config.options import add_flags
from lite_dil.data.prompts import FLAGS
from lite_dil.models.options import MODEL_FIELDS

if TYPE_CHECKING:
    from lite_dil.cli.progress import Terminal

HELP = "measure an adapter on benchmarks and preferences, beside its base"
DESCRIPTION = """\
Did it get better, and did it forget anything? Measure one or several adapters beside their base, which is in memory once, on
benchmarks (lm-eval's, or rows of questions) and on preferences, with intervals and tests. Answers to benchmarks are
kept: if stopped, the same command continues, and the base is computed only once. docs/evaluation.md explains each figure.

  lite-dil eval --adapter runs/my-run --tasks arc_challenge,gsm8k --limit 200
  lite-dil eval --adapter runs/a --adapter runs/b --tasks questions.jsonl
  lite-dil eval --adapter runs/my-run --preferences held_out.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--adapter",
        metavar="DIR",
        action="append",
        default=[],
        help="a run's folder, one of its checkpoints, or an adapter's folder; may be given several times (default: none, the "
        "bare --model)",
    )
    group.add_argument(
        "--tasks",
        metavar="TASKS",
        default="",
        help="comma-separated: names of lm-eval, its FILE.yaml, FILE.jsonl with question, choices and answer; or paper, "
        "the benchmarks of the DIL paper",
    )
    group.add_argument(
        "--preferences",
        metavar="FILE",
        default="",
        help="pairs of chosen and rejected responses, in any format that train takes; a column 'subset' groups them",
    )
    group.add_argument("--strength", metavar="X", type=float, default=1.0, help="factor on a single adapter (default: 1)")
    asked = parser.add_argument_group("how it is asked")
    asked.add_argument("--limit", metavar="N", type=int, help="only the first N items of each task, and the first N pairs")
    asked.add_argument("--shots", metavar="N", type=int, help="examples in each prompt (default: the task's own)")
    asked.add_argument(
        "--template",
        choices=("auto", "none", "chat"),
        help="the model's chat template: none, chat for all tasks, or auto for those that generate text (default: auto)",
    )
    asked.add_argument(
        "--samples", metavar="N", type=int, help="prompts of --preferences that each model answers (default: 32)"
    )
    asked.add_argument("--sample-tokens", metavar="N", type=int, help="longest such answer (default: 128)")
    asked.add_argument("--seed", metavar="N", type=int, help="of these answers (default: 0)")
    files = parser.add_argument_group("files")
    files.add_argument(
        "--output",
        metavar="DIR",
        help="folder for eval.json and eval_samples.jsonl (default: a new one in evaluations/ of each adapter's run)",
    )
    files.add_argument("--store", metavar="DIR", help="folder of computed results (default: in the cache folder)")
    add_flags(parser, FLAGS)
    add_flags(parser, MODEL_FIELDS)


def run(args: argparse.Namespace) -> int:
    """Evaluate; return 0, or 130 if it was stopped."""
    from rich.console import Console

    from lite_dil.cli.progress import Terminal
    from lite_dil.recipes.evaluation import EvaluationRequest, evaluate

    display = Terminal(Console(highlight=False, soft_wrap=True))
    given: dict[str, Any] = {name: value for name, value in vars(args).items() if name in MODEL_FIELDS}
    reading = {name: value for name, value in vars(args).items() if name in FLAGS and value is not None}
    asked = EvaluationRequest(
        adapters=tuple(args.adapter),
        tasks=args.tasks,
        preferences=args.preferences,
        given=given,
        reading=reading,
        limit=args.limit,
        shots=args.shots,
        template=args.template,
        strength=args.strength,
        samples=args.samples,
        sample_tokens=args.sample_tokens,
        seed=args.seed,
        output=Path(args.output) if args.output else None,
        store=Path(args.store) if args.store else None,
    )
    try:
        found = evaluate(asked, display)
    except KeyboardInterrupt:
        display.say("stopped; the same command continues from what was computed")
        return 130
    show(found.content, display)
    for folder in found.folders:
        display.say(f"results in {folder}")
    return 0


def show(content: dict[str, Any], display: Terminal) -> None:
    """Print the tables and what they show."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    from lite_dil.reports.scores import CAUTION, score_sentences, score_tables, setting_lines

    for each in score_tables(content):
        table = Table(title=each.title, box=SIMPLE, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
        for number, heading in enumerate(each.head):
            table.add_column(heading, justify="left" if number < 2 and heading != "pairs" else "right", overflow="fold")
        for row in each.rows:
            table.add_row(*map(Text, row))
        display.console.print(table, soft_wrap=False)
    for line in score_sentences(content):
        display.say(line)
    settings = setting_lines(content)
    for line in settings:
        display.say(f"asked: {line}")
    if settings:
        display.say(CAUTION)
