"""Score responses with a reward model into a file: the best of several, and pairs of the best and the worst."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.base.checked import mark_of, with_mark
from lite_dil.base.errors import UserError, first_line
from lite_dil.base.hashing import digest
from lite_dil.base.jsonl import JSONLines
from lite_dil.base.shares import standard_error
from lite_dil.base.signs import CHOSEN
from lite_dil.base.strict_json import parse_json
from lite_dil.data.answers import AnswerRow
from lite_dil.data.encoder import Encoder, Example, truncate
from lite_dil.data.files import RowError
from lite_dil.data.messages import Completion
from lite_dil.data.options import DataOptions
from lite_dil.data.reader import Problem, Row, refuse
from lite_dil.rewards.source import Scorer
from lite_dil.training.reward_metrics import by_length

_TOGETHER = 64  # rows that are scored before they are written
_BEST = "best"


@dataclass(frozen=True)
class ToScore:
    """A response to score.

    Attributes:
        group: responses with the same group answer the same prompt.
        number: the response's place among those of its row.
        tokens: of the response, with its end token.
        ended: whether it has its end token; it is scored only then.
        content: identifies prompt and response by their tokens: equal ones are scored once, since batches round differently.
        key: identifies it and the reward model in a file of scores. Rows that are the same in everything have their own keys.
    """

    row: AnswerRow
    answer: Completion
    group: str
    number: int
    tokens: int
    ended: bool
    content: str
    key: str


@dataclass(frozen=True)
class Encoded:
    """A row's tokens, and its responses."""

    example: Example
    candidates: list[ToScore]


def encode_answers(
    rows: Sequence[AnswerRow],
    encoder: Encoder,
    options: DataOptions,
    ends: Collection[int],
    reward: str,
    say: Callable[[str], None],
) -> list[Encoded]:
    """Tokenise rows, cut to ``--max-length`` as training cuts them.

    Args:
        ends: the tokens that end a response.
        reward: identifies the reward model.

    Raises UserError if the model's template refuses a row, unless `options.skip_bad_rows` leaves it out.
    """
    found, problems, seen = list[Encoded](), list[Problem](), Counter[str]()

    def key(*parts: Any) -> str:
        first = digest(reward, options.max_length, *parts)[:16]
        seen[first] += 1
        return first if seen[first] == 1 else digest(first, seen[first])[:16]

    for row in rows:
        prompt = row.prompt
        signs = (CHOSEN,) * len(row.answers)
        try:
            whole = encoder.encode(
                Row(prompt.prompt, row.answers, signs, prompt.place, "demonstrations", prompt.tools, prompt.arguments)
            )
        except RowError as error:
            problems.append(Problem(error.kind, prompt.place, str(error)))
            continue
        example, *_ = truncate(whole, options.max_length)
        candidates = [
            ToScore(
                row,
                answer,
                prompt.key,
                number,
                len(ids),
                ids[-1] in ends and not row.cut,
                digest(example.prompt, ids),
                key(str(row.id), number, prompt.key, ids),
            )
            for number, (answer, ids) in enumerate(zip(row.answers, example.responses, strict=True))
        ]
        found.append(Encoded(example, candidates))
    refuse("answers", [] if options.skip_bad_rows and found else problems, len(found), "prompts with responses")
    if problems:
        say(f"{len(problems)} rows that the model cannot take are left out; the first: {problems[0].place}")
    return found


class ScoreFile:
    """The scores written so far, a JSON object a response, in a file to which they are added at once.

    Args:
        path: the file; None is standard output, which gets all rows at the end.
        wanted: all responses to score, in order.

    Raises UserError if the file holds other rows.
    """

    def __init__(self, path: Path | None, wanted: Sequence[ToScore]) -> None:
        self.path, self.wanted = path, wanted
        self.rows: dict[str, dict[str, Any]] = {}
        self.file = JSONLines(path, "scores", alone=True) if path else None
        for number, key, whole, row in _own_rows(self.file.lines if self.file else (), wanted, f"--output {path}"):
            if not whole:
                raise UserError(f"--output {path} line {number} was changed; remove it, and its answer is scored again")
            self.rows[key] = row | {"key": key}

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, scored: Iterable[tuple[ToScore, np.ndarray | None]]) -> None:
        """Add responses with a head's outputs, None for one that is not scored."""
        new = [_row(each, outputs) for each, outputs in scored if each.key not in self.rows]
        self.rows |= {row["key"]: row for row in new}
        if self.file:
            self.file.add(*(with_mark(row, "key") for row in new))

    def score(self, candidate: ToScore) -> float | None:
        """Return a response's score, or None if it was cut."""
        value = self.rows[candidate.key]["score"]
        return None if value is None else float(value)

    def known(self) -> dict[str, np.ndarray]:
        """Return the outputs of the scored responses by their content."""
        found = {}
        for each in self.wanted:
            row = self.rows.get(each.key)
            if row and row["score"] is not None:
                found[each.content] = np.array([row[name] for name in ("score", "log_v") if name in row], np.float64)
        return found

    def finish(self) -> None:
        """Mark the best response to each prompt that has several, and put the rows into the order of the answers."""
        best = {max(group, key=lambda each: self.score(each) or 0.0).key for group in self.groups() if len(group) > 1}
        several = {each.key for group in self.groups() if len(group) > 1 for each in group}
        rows = []
        for each in self.wanted:
            row = {name: value for name, value in self.rows[each.key].items() if name not in (_BEST, "key")}
            marked = {_BEST: each.key in best} if each.key in several else {}
            rows.append(with_mark({**row, **marked, "key": each.key}, "key"))
        if self.file:
            self.file.rewrite(rows)
            return
        escape = sys.stdout.encoding.lower().replace("-", "") != "utf8"
        sys.stdout.write("".join(json.dumps(row, ensure_ascii=escape) + "\n" for row in rows))

    def groups(self) -> list[list[ToScore]]:
        """Return the scored responses to each prompt."""
        found: defaultdict[str, list[ToScore]] = defaultdict(list)
        for each in self.wanted:
            if self.score(each) is not None:
                found[each.group].append(each)
        return list(found.values())


def _own_rows(
    lines: Iterable[str | bytes], wanted: Sequence[ToScore], file: str
) -> Iterator[tuple[int, str, bool, dict[str, Any]]]:
    """Yield the number of each line, its key, whether it is as it was written, and its row.

    Raises UserError if a line has no key of a response in `wanted`. `file` names it: its flag and its path.
    """
    keys = {each.key for each in wanted}
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            key, whole = mark_of(row, "key")
        except (ValueError, KeyError, TypeError):  # not JSON, not an object, or not one of our rows
            key, whole, row = "", True, {}
        if key not in keys:
            raise UserError(
                f"{file} line {number} is not from this command, but of other answers or another reward model; "
                f"give another {file.partition(' ')[0]}, or remove the file"
            )
        yield number, key, whole, row


def _row(candidate: ToScore, outputs: np.ndarray | None) -> dict[str, Any]:
    label = candidate.row.labels[candidate.number]
    figures: dict[str, Any] = {"score": None if outputs is None else float(outputs[0])}
    if outputs is not None and len(outputs) > 1:
        figures["log_v"] = float(outputs[1])
    if label is not None:
        figures["label"] = label
    return {
        "id": candidate.row.id,
        "response": candidate.number,
        **candidate.row.prompt.row(completion=candidate.answer),
        **figures,
        "key": candidate.key,
    }


def score_all(head: Scorer, encoded: Sequence[Encoded], file: ScoreFile) -> Iterator[int]:
    """Score what is not in the file yet, some rows at a time; yield how many responses are done after each of them.

    Raises UserError if a score is not finite.
    """
    left = [each for each in encoded if any(one.key not in file.rows for one in each.candidates)]
    found = file.known()
    for start in range(0, len(left), _TOGETHER):
        some = left[start : start + _TOGETHER]
        new: dict[str, ToScore] = {}
        examples = []
        for each in some:
            own = {one.content: one for one in each.candidates if one.ended and one.content not in found.keys() | new.keys()}
            new |= own
            responses = tuple(each.example.responses[one.number] for one in own.values())
            examples += [Example(each.example.prompt, responses, (CHOSEN,) * len(own))] if own else []
        outputs = (row for of_row in head.scores(examples) for row in of_row)
        for content, row in zip(new, outputs, strict=True):
            if not np.isfinite(row).all():
                place = new[content].row.prompt.place
                raise UserError(f"{place}: the score of response {new[content].number + 1} is not finite")
            found[content] = row
        file.add((one, found[one.content] if one.ended else None) for each in some for one in each.candidates)
        yield len(file)


@dataclass
class ScoredPairs:
    """Pairs of the best and the worst response to a prompt; `ties` counts prompts whose responses all have one score."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    ties: int = 0


def check_pairs(path: Path, wanted: Sequence[ToScore]) -> None:
    """Raise UserError if the file for pairs exists and is not one that this command has written, which it replaces."""
    if not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--pairs {path} cannot be read ({first_line(error)}); give another one") from None
    for number, _, whole, _ in _own_rows(lines, wanted, f"--pairs {path}"):
        if not whole:
            raise UserError(f"--pairs {path} line {number} was changed; give another --pairs, or remove the file")


def make_pairs(file: ScoreFile) -> ScoredPairs:
    """Return a pair for each prompt that has responses with unequal scores."""
    made = ScoredPairs()
    for group in file.groups():
        if len(group) < 2:
            continue
        scores = [file.score(each) or 0.0 for each in group]
        best, worst = group[int(np.argmax(scores))], group[int(np.argmin(scores))]
        if max(scores) == min(scores):
            made.ties += 1
            continue
        row = best.row.prompt.row(chosen=best.answer, rejected=worst.answer)
        row |= {"chosen_score": max(scores), "rejected_score": min(scores), "responses": len(group)}
        made.rows.append(with_mark({**row, "key": best.key}, "key"))
    return made


def summary(file: ScoreFile) -> list[str]:
    """Return what the scores show, for people: their spread, how they go with length, and the accuracy on labelled pairs."""
    scored = [each for each in file.wanted if file.score(each) is not None]
    lines, cut = [], len(file.wanted) - len(scored)
    if cut:
        lines.append(
            f"{cut} of {len(file.wanted)} responses are not scored: they were cut before their end token, which is what a "
            "score reads"
        )
    if not scored:
        return lines
    scores = np.array([file.score(each) for each in scored], np.float64)
    tokens = np.array([each.tokens for each in scored], np.float64)
    pairs = _labelled(scored)
    figures = by_length(scores, tokens, pairs)
    line = f"{len(scored)} responses: mean {scores.mean():+.3f}, standard deviation {scores.std():.3f}"
    if "length_correlation" in figures:
        line += f", correlation with length {figures['length_correlation']:+.2f}"
    lines.append(line)
    if number := len(pairs[0]):
        right = float((scores[pairs[0]] > scores[pairs[1]]).mean())
        error = standard_error(right, number)
        lines.append(
            f"{number} labelled pairs: the chosen response scores higher in {right:.1%} +- {error:.1%}; the longer response "
            f"is the chosen one in {figures['longer_accuracy']:.1%}"
        )
    return lines


def _labelled(scored: Sequence[ToScore]) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the chosen and of the rejected response of every row that has both."""
    sides: defaultdict[int, dict[bool, int]] = defaultdict(dict)
    for index, each in enumerate(scored):
        label = each.row.labels[each.number]
        if label is not None and len(each.row.answers) == 2:
            sides[id(each.row)][label] = index
    whole = [side for side in sides.values() if len(side) == 2]
    chosen, rejected = ([side[label] for side in whole] for label in (True, False))
    return np.array(chosen, np.int64), np.array(rejected, np.int64)
