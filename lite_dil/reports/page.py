"""report.html: a run on one page, without scripts or requests, for light and dark mode, desktops and phones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lite_dil.base.display import duration
from lite_dil.config.train_config import FIELDS, TrainConfig, flag
from lite_dil.data.formats import kind_of_prompts
from lite_dil.objectives.own import shown
from lite_dil.reports import html, outcome
from lite_dil.reports.charts import Drawn, charts, draw, draw_margins
from lite_dil.reports.difference import difference
from lite_dil.reports.drawn_answers import DrawnAnswers, draw_reward_and_kl, outcome_of, read_drawn, warnings_of
from lite_dil.reports.pairs import page_of
from lite_dil.reports.record import RunRecord, shared
from lite_dil.reports.samples import MAX_NEW_TOKENS, Sample
from lite_dil.reports.scores import page_scores
from lite_dil.runs.history import POINTS

_EVALUATIONS = 40  # the most rows in the table of evaluations
_TILES = (
    ("rewards/margins", "margin"),
    ("log_ratio/chosen", "log-ratio chosen"),
    ("log_ratio/rejected", "log-ratio rejected"),
)
_REWARD_TILES = (("margin", "margin"), ("reward/chosen", "reward chosen"), ("reward/rejected", "reward rejected"))
_LENGTH_TILES = (
    ("eval_longer_accuracy", 'accuracy of "the longer one is better", held out'),
    ("eval_length_correlation", "correlation of scores with length, held out"),
)
_Rows = list[list[Any]]


def render(record: RunRecord) -> str:
    """Return the page of a run."""
    config, facts, online = record.config, record.facts, bool(record.config.get("reward"))
    drawn = [found for chart in charts(record.per, record.reward, online) if (found := draw(chart, record.history))]
    if online and (plane := draw_reward_and_kl(record.history)):
        drawn.insert(0, plane)
    answers = read_drawn(record.folder) if online else None
    changed, options = _options(config)
    return html.render(
        "report.html",
        name=f"{shown(config['loss'])} on {config['model'].rstrip('/').rpartition('/')[2]}",
        state=facts["state"],
        reward=record.reward,
        outcome=outcome_of(record.history) if online else outcome.outcome(record),
        what=outcome.what(record),
        warnings=[*record.damage, *warnings_of(record.history, answers)] if online else outcome.warnings(record),
        drawn_answers=_drawn_answers(answers),
        tiles=_tiles(record),
        charts=drawn,
        charts_note=_charts_note(drawn, bool(record.history.held_out.number)),
        pairs=_pairs(record),
        samples=[_sample(sample, config["max_length"]) for sample in record.samples],
        samples_note=_samples_note(record.samples),
        scores=page_scores(record.scores),
        evaluations=_evaluations(record),
        lengths=_lengths(record),
        answer_lengths=_answer_lengths(record),
        data=[(data["use"], _data(data)) for data in facts["data"]],
        machine=_machine(record),
        changed=changed,
        options=options,
        version=facts["version"],
        folder=record.folder,
    )


def _drawn_answers(answers: DrawnAnswers | None) -> dict[str, Any] | None:
    """Return what is shown of the answers that an on-policy run drew."""
    if answers is None:
        return None
    by_length = "not defined, since one of them is constant" if answers.correlation is None else f"{answers.correlation:+.2f}"
    note = f"The correlation of an answer's length with its reward is {by_length}, over the last quarter of the steps."
    moments = [
        {
            "title": f"Step {step}",
            "answers": [
                (
                    f"{name}: reward {row['reward']:.3g}, {len(row['ids'])} tokens, log-ratio {row['log_ratio']:.3g}",
                    row["prompt"],
                    row["response"],
                )
                for name, row in rows
            ],
        }
        for step, rows in answers.moments
    ]
    return {"note": note, "moments": moments}


def _tiles(record: RunRecord) -> list[tuple[str, str]]:
    history, tiles = record.history, []
    if record.accuracy:
        share, error, _ = record.accuracy
        tiles.append((f"{share:.1%}", f"held-out accuracy, \u00b1\u00a0{error:.1%}"))
    for key, unit in (
        ("reward", "reward of new answers"),
        ("eval_reward", "held-out reward of new answers"),
        ("kl/answer", "KL, nats per answer"),
    ):
        if (value := history.train.recent(key)) is not None:
            tiles.append((f"{value:.3g}", unit))
    for key, label in _REWARD_TILES if record.reward else _TILES:
        value, place = record.figure(key)
        if value is not None:
            unit = f", nats per {record.per}" if label.startswith("log-ratio") else ""
            tiles.append((f"{value:+.3g}", f"{label}{unit}, {place}"))
    for key, label in _LENGTH_TILES:
        if (found := history.held_out.last(key)) is not None:
            tiles.append((f"{found:+.2f}" if "correlation" in label else f"{found:.1%}", label))
    if (speed := history.train.recent("tokens_per_second")) is not None:
        tiles.append((f"{speed:,.0f}", "tokens per second"))
    if (memory := history.train.last("peak_memory_mb")) is not None:
        tiles.append((f"{memory / 1024:.2f} GB", "peak memory"))
    if history.train.number:
        tiles.append((duration(history.seconds), "training time"))
    return tiles


def _charts_note(drawn: Sequence[Drawn], held_out: bool) -> str:
    note = "Thin lines show training, thick lines with marks held-out data; a" if held_out else "A"
    note += " gap is a value that was not finite."
    if (size := max((found.bin for found in drawn), default=1)) > 1:
        note += f" The run is long: each point is the mean of up to {size:,} lines, at most {POINTS} points per curve."
    return note


def _pairs(record: RunRecord) -> dict[str, Any] | None:
    if record.pairs is None:
        return None
    of, unit = ("score", "reward") if record.reward else ("log-ratio", "beta x nats")
    return page_of(record.pairs, of) | {"chart": draw_margins(record.pairs.finite, unit), "step": f"{record.pairs.step:,}"}


def _samples_note(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    return (
        f"Prompts of the {'held-out' if samples[0].held_out else 'training'} data, drawn by the seed, answered greedily in at "
        f"most {MAX_NEW_TOKENS} tokens: before with the adapter off, after by the policy at step {samples[0].step:,}. "
        "Where the two have much in common, dots underline what only the first has, a line what only the second has."
    )


def _sample(sample: Sample, max_length: int) -> dict[str, Any]:
    """Return a prompt as roles (None for plain text) with texts, what was cut from it, and both answers in marked pieces."""
    if isinstance(sample.prompt, str):
        prompt: list[Any] = [(None, sample.prompt)]
    else:
        prompt = [(message.get("role", ""), message.get("content") or "") for message in sample.prompt]
    seen = (
        f"cut at its start by --max-length {max_length}: the model saw {sample.prompt_seen:,} of the prompt's "
        f"{sample.prompt_tokens:,} tokens"
    )
    before, after = difference(sample.before, sample.after)
    sides = (
        ("before", "del", before, sample.before_tokens, sample.before_cut),
        ("after", "ins", after, sample.after_tokens, sample.after_cut),
    )
    answers = [
        (f"{name}, {tokens} tokens{', cut there' if cut else ''}", mark, pieces) for name, mark, pieces, tokens, cut in sides
    ]
    return {"prompt": prompt, "cut": seen if sample.prompt_seen < sample.prompt_tokens else "", "answers": answers}


def _evaluations(record: RunRecord) -> dict[str, Any] | None:
    held_out = record.history.held_out
    names = {
        "eval_loss": "loss",
        "eval_rewards/accuracies": "accuracy",
        "eval_rewards/margins": "margin",
        "eval_log_ratio/chosen": "log-ratio chosen",
        "eval_log_ratio/rejected": "log-ratio rejected",
        "eval_logps/chosen": "log-prob chosen",
        "eval_logps/rejected": "log-prob rejected",
        "eval_kl": "kl",
        "eval_accuracy": "accuracy",
        "eval_margin": "margin",
        "eval_reward/chosen": "reward chosen",
        "eval_reward/rejected": "reward rejected",
        "eval_longer_accuracy": "the longer one",
        "eval_length_correlation": "correlation with length",
        "eval_log_v": "log V",
    }
    if not held_out.number:
        return None
    shown = {name: title for name, title in names.items() if name in held_out}
    every = -(-held_out.number // _EVALUATIONS)
    lines = sorted({*range(held_out.number - 1, -1, -every)})
    rows = [[f"{held_out.at(i, 'step') or 0:.0f}", *(_number(held_out.at(i, name)) for name in shown)] for i in lines]
    return {"head": ["step", *shown.values()], "rows": rows, "every": every, "of": f"{held_out.number:,}"}


def _lengths(record: RunRecord) -> _Rows:
    return [
        [f"{data['use']}: {side}", *(f"{values[name]:,.0f}" for name in ("mean", "p50", "p90", "p99", "max"))]
        for data in record.facts["data"]
        for side, values in data["tokens"].items()
    ]


def _answer_lengths(record: RunRecord) -> str:
    if not (means := outcome.answer_lengths(record)):
        return ""
    return f"Sample answers: {means[0]:.0f} tokens before, {means[1]:.0f} after (means of {len(record.samples)})."


def _data(data: dict[str, Any]) -> _Rows:
    number, formats = data["answers"], [source["format"] for source in data["sources"]]
    rows = [
        ["source", data["source"]],
        ["form", f"{data['form']}, {kind_of_prompts(data['chat'], formats)}"],
        ["examples per epoch", f"{data['examples']:,}"],
        ["responses", f"{number['chosen']:,} chosen, {number['rejected']:,} rejected" if any(number.values()) else "drawn"],
        ["cut by --max-length", f"{data['prompts_cut']:,} prompts, {data['answers_cut']:,} responses"],
    ]
    if data.get("without_end"):
        rows.append(["left out, cut before the end token", f"{data['without_end']:,} examples"])
    if "in_training" in data:
        rows.append(["in the training data", str(shared(data)) or "none of these prompts"])
    for source in data["sources"]:
        weight = "" if source["weight"] == 1 else f", {source['weight']:g} times per epoch"
        rows.append([source["name"], f"{source['kept']:,} rows read as {source['format']}{weight}"])
        rows += [
            ["left out", f"{reason['rows']:,} {reason['reason']} (first: {reason['stories'][0]['first']})"]
            for reason in source["left_out"]
        ]
        rows += [["note", f"{note['rows']:,} rows: {note['note']}"] for note in source["notes"]]
    return rows


def _machine(record: RunRecord) -> _Rows:
    facts, train = record.facts, record.history.train
    rows = [
        ["device", facts["device"]],
        ["layout", facts["layout"]],
        ["machine", facts["machine"]],
        ["software", facts["software"]],
    ]
    if train.number:
        examples, step = train.recent("examples_per_second", by="seconds_per_step"), train.recent("seconds_per_step")
        rows.append(["speed", f"{_number(examples)} examples per second, {_number(step)} seconds per step, at the end"])
        rows.append(["tokens", f"{train.last('num_tokens') or 0:,.0f}"])
    if facts["memory"]:
        rows.append(["memory", facts["memory"].removeprefix("memory: ")])
    return rows


def _options(config: dict[str, Any]) -> tuple[_Rows, _Rows]:
    """Return the options that differ from the defaults for this loss and data, and all options."""
    known = {name: value for name, value in config.items() if name in FIELDS}
    plain = TrainConfig(**{name: known[name] for name in ("loss", "data", "init_adapter", "sample_rejected") if name in known})
    default = plain.resolved().as_dict()
    rows = {name: [flag(name), "none" if value is None else value] for name, value in known.items()}
    changed = [row for name, row in rows.items() if name == "loss" or known[name] != default[name]]
    return changed, list(rows.values())


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"
