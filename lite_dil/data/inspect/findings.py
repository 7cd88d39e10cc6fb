"""What `lite-dil data` finds in data before a model is loaded: figures, warnings, and a few samples.

``report`` returns the object that ``lite-dil data --json`` prints. Its fields:

* ``model``, ``data``, ``loss``: the options.
* ``form``: "pairs", "unpaired" or "demonstrations"; ``chat``: whether prompts are chat messages. Empty and false without rows.
* ``sources``: for each its ``name``, ``weight`` (how often an epoch takes its rows), ``format``, ``kept`` (rows), ``left_out``
  (for each reason: ``reason``, ``rows``, and ``stories``, up to 3 different messages, each with its ``first`` place and its
  ``message``), ``notes`` (changes to rows: ``note``, ``rows``) and ``unread``, the columns that nothing is read of.
* ``answers``: the numbers of ``chosen`` and ``rejected`` responses.
* ``tokens``: for ``prompt``, ``chosen``, ``rejected`` and ``whole`` (the prompt once and its responses) the lengths ``p50``,
  ``p90``, ``p95``, ``p99``, ``max`` and ``mean``, before cutting; a side without responses is absent.
* ``all_rows``: the tokens of all rows after cutting: ``computed``, each prompt once, and ``trained``, those of the responses.
* ``max_length``: ``given``; what it cuts, ``prompts_cut``, ``prompts_halved`` (less than half is left), ``answers_cut``,
  ``examples_cut``; the smallest value that ``cuts_none`` and that ``cuts_one_percent`` of the examples at most.
* ``length_bias`` (pairs only): the shares ``chosen_longer`` and ``rejected_longer``, the ``mean_difference``, chosen minus
  rejected, in tokens, and whether chosen is longer ``beyond_chance``.
* ``duplicates``, ``contradictions``: ``rows`` with the prompt and the responses of an earlier row, and the same or opposite
  preference; the place of the ``first`` such row and of the ``earlier`` one.
* ``marks``: texts that look like a template's control tokens: ``mark``, ``rows``, ``first``, and whether it is the model's own
  and read ``as_token``.
* ``private``: e-mail addresses, phone numbers, and keys or passwords in responses: ``kind``, ``number``, ``responses`` that
  have any, and the ``first`` row. No sample is of a row with them.
* ``losses``: the losses that can train on this data.
* ``samples``: up to 3 examples as they are trained on: ``place`` and ``parts``, each with its ``side`` ("prompt", "chosen",
  "rejected"), ``trained``, ``ids``, ``text`` and ``pieces``, which are [text, number of tokens, whether a control token], one
  per token unless several tokens make one character; ``cut``: tokens that --max-length removed.
* ``held_out``: null if nothing is held out, else its content: ``data`` (the option), ``form``, ``chat``, ``sources`` (none if
  it is a part of the training data) and ``answers``, as above; ``in_training``: of the held-out rows (``of``), how many are
  also training rows, with the same prompt and responses (``rows``), or share at least the prompt with one (``prompts``),
  including rows that a loss leaves out.
* ``warnings``: what may harm the training or its figures.
* ``stops``: for each reason why ``lite-dil train`` would stop, ``why`` and the fix, ``mend``; empty if it would run.

* ``time`` (added by the command, if train would run): the ``steps`` with the default options, and, if a ``rate`` of the model
  on this machine is known, about how many ``seconds`` they take.

Without usable rows the fields from ``tokens`` to ``samples`` are absent.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from lite_dil.base.errors import UserError
from lite_dil.base.signs import CHOSEN, REJECTED
from lite_dil.base.streams import named
from lite_dil.base.text import count
from lite_dil.data.dataset import DataSet, Source, halved, load
from lite_dil.data.encoder import Encoder, Example
from lite_dil.data.formats import kind_of_prompts
from lite_dil.data.held_out import split
from lite_dil.data.inspect.pieces import pieces
from lite_dil.data.inspect.survey import Survey, enough_for, length_bias, lengths
from lite_dil.data.mismatched import mismatched
from lite_dil.data.options import InspectOptions
from lite_dil.data.overlap import Overlap, overlap
from lite_dil.data.reader import NO_RESPONSE
from lite_dil.objectives.accepts import check_data
from lite_dil.objectives.table import OBJECTIVES, objective_of

_SAMPLES = 3
STORIES = 3
SIDES = {CHOSEN: "chosen", REJECTED: "rejected"}


def report(options: InspectOptions, encoder: Encoder) -> dict[str, Any]:
    """Read all of ``--data`` and return the object described at the top of this file.

    Raises:
        UserError: a source cannot be read at all, or the sources do not go together.
    """
    survey = Survey(encoder)
    data = load(options.data, "train", encoder, options, watch=survey.add, strict=False)
    found: dict[str, Any] = {
        "model": options.model,
        "data": options.data,
        "loss": options.loss,
        **_read(data),
        "held_out": None,
    }
    stops = _bad_rows(options, data)
    if len(survey):
        found |= _figures(options, data, survey)
        found["samples"] = [_sample(data.store[i], i, survey, options) for i in _drawn(survey, options.seed)]
        if refusal := _refusal(options, data, survey):
            stops.append({"why": refusal, "mend": _fix(data, found["losses"])})
    found["warnings"] = _warnings(options, found, data, encoder.rendering.chats) if len(survey) else []
    if not options.eval_data and len(survey) and not stops:
        try:
            _, part = split(data, options.eval_fraction)
        except UserError as error:
            stops.append({"why": str(error), "mend": "take a larger --eval-fraction"})
        else:
            found["held_out"] = part and {
                "data": options.data,
                **_read(part),
                "in_training": Overlap(len(part.examples), 0, 0)._asdict(),
            }
    if options.eval_data:
        survey = Survey(encoder)
        held_out = load(options.eval_data, "test", encoder, options, watch=survey.add, strict=False)
        shared = overlap(data, held_out)
        found["held_out"] = {"data": options.eval_data, **_read(held_out), "in_training": shared._asdict()}
        found["warnings"] += [shared.warning] if shared.warning else []
        stops += _bad_rows(options, held_out)
        if len(survey) and (refusal := _refusal(replace(options, data=options.eval_data), held_out, survey)):
            stops.append({"why": f"held-out data: {refusal}", "mend": "give --eval-data of the training data's form"})
    return found | {"stops": stops}


def source_facts(source: Source) -> dict[str, Any]:
    """Return what was read from a source, as an entry of the field ``sources``."""
    kinds = Counter(problem.kind for problem in source.problems)
    first: dict[str, dict[str, str]] = {kind: {} for kind in kinds}  # for each kind, the first place of each message
    for problem in source.problems:
        if len(first[problem.kind]) < STORIES:
            first[problem.kind].setdefault(problem.message, problem.place)
    return {
        "name": source.name,
        "weight": source.weight,
        "format": source.format,
        "kept": source.kept,
        "left_out": [
            {
                "reason": kind,
                "rows": rows,
                "stories": [{"first": place, "message": message} for message, place in first[kind].items()],
            }
            for kind, rows in kinds.most_common()
        ],
        "notes": [{"note": note, "rows": rows} for note, rows in source.notes.most_common()],
        "unread": source.unread,
    }


def _read(data: DataSet) -> dict[str, Any]:
    """Return how a data set was read."""
    return {
        "form": data.form,
        "chat": data.chat,
        "sources": [source_facts(source) for source in data.sources],
        "answers": {side: data.answers[sign] for sign, side in SIDES.items()},
    }


def _figures(options: InspectOptions, data: DataSet, survey: Survey) -> dict[str, Any]:
    sides = {SIDES[sign]: values for sign, values in survey.answers.items() if values}
    found: dict[str, Any] = {
        "tokens": {
            name: lengths(values) for name, values in {"prompt": survey.prompt, **sides, "whole": survey.whole}.items()
        },
        "all_rows": {"computed": survey.computed, "trained": survey.trained},
        "max_length": {
            "given": options.max_length,
            "prompts_cut": survey.prompts_cut,
            "prompts_halved": data.prompts_halved,
            "answers_cut": survey.answers_cut,
            "examples_cut": survey.examples_cut,
            "cuts_none": data.cuts_none,
            "cuts_one_percent": enough_for(survey.needed, 1),
        },
    }
    if data.form == "pairs":
        found["length_bias"] = length_bias(survey.answers[CHOSEN], survey.answers[REJECTED])
    for name, repeat in zip(("duplicates", "contradictions"), survey.repeats(), strict=True):
        places = {
            which: None if row is None else data.store[row].place
            for which, row in (("first", repeat.first), ("earlier", repeat.earlier))
        }
        found[name] = {"rows": repeat.rows, **places}
    found["marks"] = [
        {"mark": mark, "rows": rows, "first": survey.first_with[mark], "as_token": survey.is_token(mark)}
        for mark, rows in survey.marks.most_common()
    ]
    found["private"] = [
        {"kind": kind, "number": number, "responses": responses, "first": first}
        for kind, (number, responses, first) in survey.private.items()
    ]
    plain = replace(options, sample_rejected=None)
    found["losses"] = [name for name in OBJECTIVES if not _refusal(replace(plain, loss=name), data, survey)]
    return found


def _bad_rows(options: InspectOptions, data: DataSet) -> list[dict[str, str]]:
    """Return the unusable rows that would stop training before its first step, and the fix."""
    stops = []
    for source in data.sources:
        bad = len(source.problems)
        if not source.kept and {problem.kind for problem in source.problems} == {NO_RESPONSE}:
            stops.append(
                {
                    "why": f"{source.name}: {count(bad, 'prompt')} without responses",
                    "mend": f"make pairs of them with lite-dil label {source.name}, or responses with lite-dil generate",
                }
            )
        elif not source.kept and not bad:
            stops.append(
                {
                    "why": f"{source.name}: no rows are left; all are {', '.join(source.notes)}",
                    "mend": "take rows in which one response is better",
                }
            )
        elif not source.kept:
            stops.append(
                {
                    "why": f"{source.name}: none of {count(bad, 'row')} can be used",
                    "mend": "fix the rows, or describe them with --data-format and --columns",
                }
            )
        elif bad and not options.skip_bad_rows:
            stops.append(
                {
                    "why": f"{source.name}: {bad:,} of {count(source.kept + bad, 'row')} cannot be used",
                    "mend": "fix these rows, or leave them out with --skip-bad-rows",
                }
            )
    return stops


def _fix(data: DataSet, losses: list[str]) -> str:
    """Return the fix for a loss that cannot train on this data."""
    fix = f"take --loss {' or '.join(losses)}" if losses else "add chosen responses"
    return f"{fix}, or draw rejected responses with --sample-rejected 1" if data.form == "demonstrations" else fix


def _refusal(options: InspectOptions, data: DataSet, survey: Survey) -> str:
    """Return why the loss cannot train on this data, or nothing."""
    try:
        check_data(options.loss, data.form, set(data.answers), options.data, options.sample_rejected is not None)
        if objective_of(options.loss).baseline:
            mismatched(survey.two_prompts, options.loss, options.max_length)
    except UserError as error:
        return str(error)
    return ""


def _warnings(options: InspectOptions, found: dict[str, Any], data: DataSet, has_template: bool) -> list[str]:
    """Return what does not stop training but may harm it."""
    warnings = []
    plain = kind_of_prompts(found["chat"], [source.format for source in data.sources]) == "plain text"
    if has_template and plain and not any(mark["as_token"] for mark in found["marks"]):
        warnings.append(
            "the prompts are plain text, which the responses continue without the model's chat template; a model for chat "
            "learns more from messages: --chat makes user messages of the prompts"
        )
    if found.get("length_bias", {}).get("beyond_chance"):
        warnings.append(_length_warning(options, found["length_bias"]))
    repeats = found["contradictions"]
    if repeats["rows"]:
        warnings.append(
            f"{count(repeats['rows'], 'row')} with the opposite preference of an earlier row with the same prompt and "
            f"responses (first {repeats['first']}, against {repeats['earlier']}): they cancel each other; keep one side"
        )
    repeats = found["duplicates"]
    if repeats["rows"]:
        warnings.append(
            f"{count(repeats['rows'], 'row')} that repeat an earlier one (first {repeats['first']} of {repeats['earlier']}): "
            "duplicates count twice"
        )
    if lost := halved(data, options.max_length):
        warnings.append(lost)
    if cut := found["max_length"]["answers_cut"]:
        warnings.append(
            f"{count(cut, 'response')} without an end token, cut by --max-length {options.max_length}, so they do not teach "
            f"the model to stop; --max-length {found['max_length']['cuts_none']} cuts none"
        )
    for private in found["private"]:
        warnings.append(
            f"{private['number']:,} {private['kind']} in {count(private['responses'], 'response')} (first {private['first']}; "
            "not shown here): the model may learn to repeat them"
        )
    if marks := [mark for mark in found["marks"] if not mark["as_token"]]:
        listed = ", ".join(f"{mark['mark']!r} in {count(mark['rows'], 'row')} (first {mark['first']})" for mark in marks)
        warnings.append(
            f"marks of another model's template or of a transcript, which this model learns as ordinary text: "
            f"{listed}; remove them, or split the text into messages there"
        )
    return warnings


def _length_warning(options: InspectOptions, bias: dict[str, Any]) -> str:
    objective, loss = objective_of(options.loss), f"--loss {options.loss}"
    text = (
        f"the chosen response is the longer one in {bias['chosen_longer']:.0%} of the pairs, more than by chance: "
        "the model also learns that longer is better. "
    )
    if objective.data == "chosen":
        return f"{text}{loss} learns the lengths of the chosen responses"
    if options.logp_reduction == "mean":
        text += f"{loss} averages log-probs over a response's tokens here, so length by itself gains nothing"
    else:
        averaging = ", ".join(name for name, other in OBJECTIVES.items() if other.reduction == "mean")
        text += (
            f"{loss} sums log-probs over a response's tokens here, so length by itself gains; it does not if they are "
            f"averaged: --logp-reduction mean, or --loss simpo or another that averages by default ({averaging})"
        )
    return f"{text}. What the responses teach about length depends on the pairs: drop some whose longer response won"


def _drawn(survey: Survey, seed: int) -> list[int]:
    rows = np.flatnonzero(np.frombuffer(survey.shown, np.int8))
    return sorted(int(i) for i in named("data/samples", seed).choice(rows, min(_SAMPLES, len(rows)), replace=False))


def _sample(example: Example, number: int, survey: Survey, options: InspectOptions) -> dict[str, Any]:
    """Return an example of the store, row `number` of the survey, with its tokens as pieces of text."""
    used = {CHOSEN} if objective_of(options.loss).data == "chosen" else {CHOSEN, REJECTED}
    parts = []
    for sign, ids, cut in zip(
        (0, *example.signs), (example.prompt, *example.responses), survey.cut(number, example), strict=True
    ):
        spelled = pieces(survey.encoder.tokenizer, ids, example.prompt if sign else ())
        parts.append(
            {
                "side": SIDES.get(sign, "prompt"),
                "trained": sign in used,
                "cut": cut,
                "ids": list(ids),
                "text": "".join(piece.text for piece in spelled),
                "pieces": [list(piece) for piece in spelled],
            }
        )
    return {"place": example.place, "parts": parts}
