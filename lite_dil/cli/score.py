"""``lite-dil score``: score responses with a reward model, mark the best of several, and make pairs of the best and worst."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_dil.base.disk import writing
from lite_dil.base.errors import UserError
from lite_dil.base.signals import StopSignal
from lite_dil.config.options import add_flags
from lite_dil.data import prompts
from lite_dil.data.answers import ANSWERS_HELP
from lite_dil.models.options import MODEL_FIELDS

if TYPE_CHECKING:
    from lite_dil.base.display import Display
    from lite_dil.evaluation.score import Encoded, ScoreFile
    from lite_dil.rewards.source import Scorer

HELP = "score responses with a reward model, and make pairs of the best and the worst"
DESCRIPTION = """\
Score responses with a reward model of lite-dil reward: one JSON object a response, with its score; of several responses to a
prompt the best is marked. If stopped, the same command continues.

  lite-dil score answers.jsonl --reward runs/rm --pairs pairs.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("answers", metavar="ANSWERS", help=ANSWERS_HELP)
    parser.add_argument(
        "--reward",
        metavar="DIR|hf:MODEL",
        required=True,
        help="a run of lite-dil reward, one of its checkpoints, or its adapter's folder; model and quantisation are the run's "
        "unless given. Or hf: with the folder or hub id of a sequence classifier of transformers with one label",
    )
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--output",
        metavar="FILE.jsonl",
        help="file for the scores; - is standard output, from which nothing can be continued (default: NAME.scores.jsonl)",
    )
    group.add_argument(
        "--pairs",
        metavar="FILE.jsonl",
        type=Path,
        help="also write a pair (chosen, rejected) for each prompt with several responses: the best against the worst",
    )
    group.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="whether plain-text prompts are user messages (default: as the reward model's data was read)",
    )
    add_flags(parser, prompts.FLAGS)
    add_flags(parser, MODEL_FIELDS)


def run(args: argparse.Namespace) -> int:
    """Score; return the exit code."""
    from rich.console import Console

    from lite_dil.cli.progress import Terminal
    from lite_dil.config.reward_source import find_scorer, open_reward
    from lite_dil.data.answers import read_answers
    from lite_dil.evaluation.score import ScoreFile, check_pairs, encode_answers, make_pairs, summary

    display = Terminal(Console(stderr=True, highlight=False, soft_wrap=True))
    found = find_scorer(args.reward, vars(args), display.say)
    options = found.data_options(vars(args))
    chat = found.chat if args.chat is None else args.chat
    rows = read_answers(args.answers, options, chat, display.say)
    output = None if args.output == "-" else Path(args.output or f"{Path(args.answers).stem}.scores.jsonl")
    _check_outputs(args.answers, output, args.pairs)
    encoder = found.encoder(display.say)
    encoded = encode_answers(rows, encoder, options, encoder.end_ids(), found.identity, display.say)
    wanted = [one for each in encoded for one in each.candidates]
    if args.pairs:
        check_pairs(args.pairs, wanted)
    file = ScoreFile(output, wanted)
    if file.file and file.file.torn:
        display.say(file.file.torn)
    if output and len(file):
        display.say(f"{len(file)} of {len(file.wanted)} scores are in {output}")
    if len(file) < len(file.wanted):
        with open_reward(found, display.say) as head:
            if not _score(head, encoded, file, display):
                again = f" and in {output}; the same command continues from there" if output else ""
                display.say(f"stopped: {len(file)} of {len(file.wanted)} responses are scored{again}")
                return 130
    file.finish()
    for line in summary(file):
        display.say(line)
    if output:
        display.say(f"all {len(file)} scores are in {output}")
    if args.pairs:
        made = make_pairs(file)
        _write(args.pairs, made.rows)
        ties = f"; {made.ties} prompts left out, whose responses all have the same score" if made.ties else ""
        display.say(f"{len(made.rows)} pairs are in {args.pairs}{ties}")
    return 0


def _score(head: Scorer, encoded: list[Encoded], file: ScoreFile, display: Display) -> bool:
    """Score everything that is missing; return False if Ctrl-C ended it early."""
    from lite_dil.evaluation.score import score_all

    with StopSignal("stopping after these responses") as stop, display.bar(len(file.wanted), len(file)) as bar:
        for done in score_all(head, encoded, file):
            bar.update(done, None)
            if stop.asked and done < len(file.wanted):
                return False
    return True


def _check_outputs(answers: str, output: Path | None, pairs: Path | None) -> None:
    """Raise UserError if a file would be written over another one of this command."""
    from lite_dil.data.sources import split_sources

    for flag, path in (("--output", output), ("--pairs", pairs)):
        if path and any(_same(path, Path(source)) for source, _ in split_sources(answers)):
            raise UserError(f"{flag} {path} is the file of answers; give another one")
    if output and pairs and _same(pairs, output):
        raise UserError(f"--pairs {pairs} is the file of scores; give another one")


def _same(one: Path, other: Path) -> bool:
    """Return whether two paths are the same file, or will be."""
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    from lite_dil.base.files import make_folder, replace_file

    with writing(path, "--pairs"):
        make_folder(path.parent)
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
