"""``lite-dil generate``: answer files of prompts, as rows that are ready to train on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_dil.backends.types import Sampling
from lite_dil.base.checked import mark_of, with_mark
from lite_dil.base.errors import UserError
from lite_dil.base.hashing import digest
from lite_dil.base.jsonl import JSONLines
from lite_dil.base.signals import StopSignal
from lite_dil.base.strict_json import parse_json
from lite_dil.cli import adapter_flags
from lite_dil.config.options import add_flags
from lite_dil.data import prompts
from lite_dil.data.prompts import Prompt
from lite_dil.generation import policy
from lite_dil.generation.asked import answer_seed
from lite_dil.generation.policy import AdapterSource, Policy

if TYPE_CHECKING:
    from lite_dil.backends.types import Generated
    from lite_dil.base.display import Display
    from lite_dil.data.encoder import Encoder
    from lite_dil.generation.batch_generator import BatchGenerator

HELP = "generate the model's answers to a file of prompts"
DESCRIPTION = """\
Answer every prompt of a file, with a run's adapter or the bare model. The rows written are demonstrations, ready to train on;
"finish_reason" is "length" if --max-new-tokens cut an answer, else "stop". If stopped, the same command continues.

  lite-dil generate prompts.jsonl --adapter runs/mine --output answers.jsonl
"""
_VERSION = "2"
# The field that records how an answer ended, by the answer's field.
_ENDED = {"completion": "finish_reason", "base": "base_finish_reason"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_common(parser, temperature=0.0)
    group = parser.add_argument_group("answers")
    group.add_argument("--output", metavar="FILE.jsonl", required=True, help="file for the answers; - is standard output")
    group.add_argument("--num-answers", metavar="N", type=int, default=1, help="answers per prompt, one row each (default: 1)")
    group.add_argument(
        "--base", action="store_true", help="also write the base model's answer (adapter off), in the field 'base'"
    )
    group.add_argument(
        "--batch-size",
        dest="rows",
        metavar="N",
        type=int,
        help="maximum answers per batch (default: what 8 passes hold)",
    )


def add_common(parser: argparse.ArgumentParser, temperature: float) -> None:
    """Add the arguments shared by commands that answer files of prompts."""
    parser.add_argument("prompts", metavar="PROMPTS", help=prompts.PROMPTS_HELP)
    adapter_flags.add_arguments(parser, required=False)
    add_flags(parser, prompts.FLAGS)
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="whether plain-text prompts are sent as user messages or continued as they are (default: lines of "
        "a .txt file are sent as messages if the model has a chat template, rows are continued)",
    )
    group.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="maximum tokens per answer (default: 256)")
    group.add_argument(
        "--temperature",
        metavar="X",
        type=float,
        default=temperature,
        help=f"0 always takes the most likely token, 1 samples from the model's distribution (default: {temperature:g})",
    )
    group.add_argument(
        "--top-p",
        metavar="X",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens up to this probability (default: 1)",
    )
    group.add_argument("--seed", dest="draw_seed", metavar="N", type=int, default=0, help="seed of sampling (default: 0)")


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError if one of these arguments is given and below 1."""
    for name in names:
        if (value := getattr(args, name)) is not None and value < 1:
            named = "--batch-size" if name == "rows" else f"--{name.replace('_', '-')}"
            raise UserError(f"{named} {value}: expected at least 1")


@dataclass(frozen=True)
class _Wanted:
    """One row to write: answer number `number` to `asked`."""

    asked: Prompt
    number: int
    room: int
    seed: int
    key: str

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return self.asked.ids


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from rich.console import Console

    from lite_dil.batching.schedule import row_tokens
    from lite_dil.cli.progress import Terminal
    from lite_dil.generation.batch_generator import ROWS, batched

    check_counts(args, "max_new_tokens", "num_answers", "rows")
    sampling = Sampling(args.temperature, args.top_p)
    if args.num_answers > 1 and args.temperature == 0:
        raise UserError(f"--num-answers {args.num_answers} at --temperature 0 gives equal answers; try --temperature 1")
    source = adapter_flags.find(args)
    if args.base and source.adapter is None:
        raise UserError("--base also writes the answer without the adapter; give --adapter")
    display = Terminal(Console(stderr=True, highlight=False, soft_wrap=True))
    options = adapter_flags.options_of(args)
    asked, chat = prompts.read_and_encode(args.prompts, options, source.options, args.chat, args.max_new_tokens, display.say)
    if args.chat is None and not asked[0].chat and chat:
        display.say("the prompts are plain text, which the model continues as is; --chat sends them as messages")
    wanted = _wanted(asked, args, source)
    answers = _AnswerFile(None if args.output == "-" else Path(args.output), wanted)
    if answers.file and answers.file.torn:
        display.say(answers.file.torn)
    if answers.path:
        display.say(f"{len(answers)} of {len(wanted)} answers are in {answers.path}, {len(wanted) - len(answers)} to generate")
    if len(answers) < len(wanted):
        model = policy.load(source, display.say)
        generator = model.generator(sampling)
        batches = batched(wanted, ROWS * row_tokens(options), args.rows)
        if not _draw(batches, generator, model, args.base, answers, display):
            display.say(f"stopped: {len(answers)} of {len(wanted)} answers are done" + answers.how_to_go_on)
            return 130
    answers.finish()
    if empty := answers.empty():
        display.say(f"empty answers: {empty}; training refuses them without --skip-bad-rows")
    if cut := answers.cut():
        display.say(f"cut by --max-new-tokens {args.max_new_tokens}: {cut}")
    if answers.path:
        display.say(f"all {len(wanted)} answers are in {answers.path}")
    return 0


def _wanted(asked: Sequence[Prompt], args: argparse.Namespace, source: AdapterSource) -> list[_Wanted]:
    """Return the rows to write, in the order of the prompts. A row's key hashes everything that determines it."""
    room, out = args.max_new_tokens, []
    c, model = source.options, policy.identity(source)
    settings = (_VERSION, c.model, c.load_in_4bit, c.dtype, c.head_bits, model, room, args.temperature, args.top_p)
    for prompt in asked:
        for number in range(args.num_answers):
            seed = answer_seed(args.draw_seed, prompt, number)
            out.append(
                _Wanted(prompt, number, room, seed, digest(settings, seed, args.base, prompt.ids, prompt.key, number)[:16])
            )
    return out


def _draw(
    batches: list[list[_Wanted]], generator: BatchGenerator, model: Policy, base: bool, answers: _AnswerFile, display: Display
) -> bool:
    """Answer all batches that are not complete; return False if Ctrl-C ended it early."""
    total = sum(map(len, batches))
    with StopSignal("stopping after these answers") as stop, display.bar(total, len(answers)) as bar:
        for batch in batches:
            # Whole batches, even if a part is known: the results then equal those of an uninterrupted run.
            if all(each.key in answers.rows for each in batch):
                continue
            if stop.asked:
                return False
            found = {"completion": generator.draw(batch)}
            if base:
                with model.backend.adapter_off():
                    found["base"] = generator.draw(batch)
            sides = [dict(zip(found, each, strict=True)) for each in zip(*found.values(), strict=True)]
            answers.add([_row(each, side, model.encoder) for each, side in zip(batch, sides, strict=True)])
            bar.update(len(answers), None)
    return True


def _row(wanted: _Wanted, found: dict[str, Generated], encoder: Encoder) -> dict[str, Any]:
    """Return the row with the answers in `found`, by their fields, and how each ended."""
    answers = {name: wanted.asked.answer(encoder, answer.ids) for name, answer in found.items()}
    ended = {_ENDED[name]: "length" if answer.end is None else "stop" for name, answer in found.items()}
    return with_mark({**wanted.asked.row(**answers), **ended, "key": wanted.key}, "key")


class _AnswerFile:
    """The rows written so far, in a file to which each batch is added at once, or on standard output.

    Args:
        path: None is standard output, which gets rows in the order of the prompts, each as soon as no earlier one is missing.
        wanted: all rows to write, in order.

    Raises UserError if the file holds other rows.
    """

    def __init__(self, path: Path | None, wanted: Sequence[_Wanted]) -> None:
        self.path, self.wanted = path, wanted
        self.rows: dict[str, dict[str, Any]] = {}
        self._printed = 0
        self.file = JSONLines(path, "answers", alone=True) if path else None
        keys = {each.key for each in wanted}
        for number, line in enumerate(self.file.lines if self.file else (), 1):
            try:
                row = parse_json(line)
                key, whole = mark_of(row, "key")
            except (ValueError, KeyError, TypeError):  # not JSON, not an object, or not one of our rows
                key, whole = "", True
            if key not in keys:
                raise UserError(
                    f"--output {path} line {number} is not from this command, but from other prompts, another model, other "
                    "settings or an earlier version; give another --output, or remove the file"
                )
            if not whole:
                raise UserError(f"--output {path} line {number} was changed; remove it, and its answer is generated again")
            self.rows[key] = row

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add the rows that are not there yet."""
        new = {key: row for row in rows if (key := mark_of(row, "key")[0]) not in self.rows}
        self.rows |= new
        if self.file:
            self.file.add(*new.values())
            return
        escape = sys.stdout.encoding.lower().replace("-", "") != "utf8"  # by JSON's escapes, which read back as the same text
        while self._printed < len(self.wanted) and (row := self.rows.get(self.wanted[self._printed].key)):
            sys.stdout.write(json.dumps(row, ensure_ascii=escape) + "\n")
            self._printed += 1
        sys.stdout.flush()

    def empty(self) -> int:
        """Return how many answers have no text, including those of earlier runs of the command."""
        texts = (
            row["completion"] if isinstance(row["completion"], str) else row["completion"][0]["content"]
            for row in self.rows.values()
        )
        return sum(not text.strip() for text in texts)

    def cut(self) -> str:
        """Return a line on how many answers were cut, including earlier runs of the command, and what to do; "" if none."""
        own, base = (sum(row.get(field) == "length" for row in self.rows.values()) for field in _ENDED.values())
        if not own and not base:
            return ""
        counts = f"{own} of {len(self)} answers" + (f", {base} of the base model's" if base else "")
        elsewhere = " and another --output" if self.path else ""
        return (
            f"{counts} (their finish reason is 'length'); training on a cut answer teaches a model to stop too early; use "
            f"a larger --max-new-tokens{elsewhere}"
        )

    def finish(self) -> None:
        """Sort the file's rows, which were written by length, into the order of the prompts."""
        ordered = [each.key for each in self.wanted]
        if self.file and list(self.rows) != ordered:
            self.file.rewrite([self.rows[key] for key in ordered])

    @property
    def how_to_go_on(self) -> str:
        """How to continue after a stop."""
        return f" and in {self.path}; the same command continues from there" if self.path else ""
