"""report.html: a run on one page without a script or a request, by day and by night, on a desk and on a phone.

Everything that comes from data, model, flags or paths goes through `escaped`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape

from lite_dil.config.train_config import FIELDS, TrainConfig, flag
from lite_dil.objectives.own import shown
from lite_dil.reports import outcome
from lite_dil.reports.charts import Drawn, charts, draw
from lite_dil.reports.outcome import RunRecord
from lite_dil.reports.samples import MAX_NEW_TOKENS, Sample
from lite_dil.runs.history import POINTS

_EVALUATIONS = 40  # of the table of evaluations at most
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark; --ink: #1c1d1f; --dim: #5a5d63; --paper: #fcfcfa; --card: #fff; --soft: #f1f1ec;
  --line: #dcdcd5; --warn: #fdf3dc; --edge: #b7791f; --good: #e6f3ec; --leaf: #1e7d4f;
  --curve-0: #0072b2; --curve-1: #d55e00; --curve-2: #008f68; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9e8e4; --dim: #a9abb0; --paper: #141517; --card: #1b1d20;
  --soft: #24262a; --line: #34373c; --warn: #33290f; --edge: #d9a441; --good: #14281d; --leaf: #5cc08f;
  --curve-0: #56b4e9; --curve-1: #f08a4b; --curve-2: #35c79d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; font: 1rem/1.55 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .8rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; }
.lead { max-width: 52rem; } .lead p { margin: .5rem 0; } .outcome { font-size: 1.12rem; }
.dim { color: var(--dim); font-size: .85rem; }
.state { display: inline-block; font-size: .8rem; font-weight: 600; padding: .1rem .6rem; border-radius: 1rem;
  background: var(--soft); color: var(--dim); vertical-align: .2rem; }
.note { max-width: 52rem; padding: .6rem .9rem; border-left: .25rem solid var(--edge); border-radius: .2rem;
  background: var(--warn); margin: .6rem 0; }
.note.good { border-color: var(--leaf); background: var(--good); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1.4rem 0 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.3rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: .7rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .6rem .4rem; }
figcaption { font-weight: 600; font-size: .92rem; padding: 0 .3rem .3rem; }
figcaption span { font-weight: 400; color: var(--dim); }
svg { display: block; width: 100%; height: auto; font-family: system-ui, sans-serif; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; overflow-wrap: normal; } th:first-child, td:first-child { text-align: left; }
.text td, .text th { text-align: left; } .text td:last-child { min-width: 12rem; }
.sample { border-top: 1px solid var(--line); padding: .8rem 0 .4rem; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .7rem; margin-top: .5rem; }
.said { white-space: pre-wrap; background: var(--soft); border-radius: .4rem; padding: .5rem .8rem; unicode-bidi: plaintext;
  max-height: 28rem; overflow-y: auto; }
.prompt { white-space: pre-wrap; font-weight: 600; unicode-bidi: plaintext; max-height: 20rem; overflow-y: auto; }
details { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .8rem; margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
code { font: .9em ui-monospace, monospace; }
"""


def escaped(value: object) -> str:
    """Return text that is safe in HTML, in an attribute too: no tag, no control character, no half of a surrogate pair."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value).replace("\r\n", "\n"))
    return escape(text, quote=True)


def render(record: RunRecord) -> str:
    """Return the page of a run."""
    drawn = [found for chart in charts(record.per) if (found := draw(chart, record.history))]
    config = record.config
    name = f"{shown(config['loss'])} on {config['model'].rstrip('/').rpartition('/')[2]}"
    parts = [
        f"<h1>{escaped(name)} <span class='state'>{escaped(record.facts['state'])}</span></h1>",
        f'<div class="lead"><p class="outcome">{escaped(outcome.outcome(record))}</p>'
        f"<p>{escaped(outcome.what(record))}</p></div>",
        *_notes(record),
        _tiles(record),
        _charts(drawn, bool(record.history.held_out.number)),
        _samples(record),
        _evaluations(record),
        _lengths(record),
        _data(record),
        _machine(record),
        _options(record),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lite-dil: {escaped(name)}</title>
<style>{STYLE}</style>
</head>
<body>
{chr(10).join(part for part in parts if part)}
<p class="dim">Made by lite-dil {escaped(record.facts["version"])} from the files in {escaped(record.folder)}.</p>
</body>
</html>
"""


def _notes(record: RunRecord) -> list[str]:
    warnings = outcome.warnings(record)
    if not warnings and record.facts["state"] == "finished":
        return ['<div class="note good">Nothing here looks wrong.</div>']
    return [f'<div class="note" role="note">{escaped(text)}</div>' for text in warnings]


def _tiles(record: RunRecord) -> str:
    history, tiles = record.history, []
    if record.accuracy:
        share, error, _ = record.accuracy
        tiles.append((f"{share:.1%}", f"held-out accuracy, \u00b1\u00a0{error:.1%}"))
    for key, label in (("rewards/margins", "margin"), ("log_ratio/chosen", "chosen"), ("log_ratio/rejected", "rejected")):
        value, place = record.figure(key)
        if value is not None:
            unit = "margin" if label == "margin" else f"log-ratio {label}, nats a {record.per}"
            tiles.append((f"{value:+.3g}", f"{unit}, {place}"))
    if (speed := history.train.recent("tokens_per_second")) is not None:
        tiles.append((f"{speed:,.0f}", "tokens a second"))
    if (memory := history.train.last("peak_memory_mb")) is not None:
        tiles.append((f"{memory / 1024:.2f} GB", "peak memory"))
    if history.train.number:
        tiles.append((_time(history.seconds), "training time"))
    cells = "".join(f'<div class="tile"><b>{escaped(v)}</b><span class="dim">{escaped(t)}</span></div>' for v, t in tiles)
    return f'<div class="tiles">{cells}</div>' if tiles else ""


def _charts(drawn: Sequence[Drawn], held_out: bool) -> str:
    if not drawn:
        return ""
    figures = "".join(
        f"<figure><figcaption>{escaped(found.chart.title)} <span>{escaped(found.chart.unit)}</span></figcaption>"
        f'<div role="img" aria-label="{escaped(found.sentence)}">{found.svg}</div></figure>\n'
        for found in drawn
    )
    note = "Thin lines are training, thick ones with marks held-out data; a" if held_out else "A"
    note += " gap is a value that was not finite."
    if (size := max(found.bin for found in drawn)) > 1:
        note += f" The run is long: each point is the mean of up to {size:,} lines, {POINTS} points a curve at most."
    return f'<h2>During training</h2><div class="charts">{figures}</div><p class="dim">{escaped(note)}</p>'


def _samples(record: RunRecord) -> str:
    samples = record.samples
    if not samples:
        return ""
    note = (
        f"Prompts of the {'held-out' if samples[0].held_out else 'training'} data, drawn by the seed, answered greedily in at "
        f"most {MAX_NEW_TOKENS} tokens: before with the adapter off, after by the policy at step {samples[0].step:,}."
    )
    return f'<h2>Answers before and after</h2><p class="dim">{escaped(note)}</p>' + "".join(
        _sample(sample, record.config["max_length"]) for sample in samples
    )


def _sample(sample: Sample, max_length: int) -> str:
    if isinstance(sample.prompt, str):
        prompt = f'<div class="prompt" dir="auto">{escaped(sample.prompt)}</div>'
    else:
        prompt = "".join(
            f'<div class="dim">{escaped(m.get("role", ""))}</div>'
            f'<div class="prompt" dir="auto">{escaped(m.get("content") or "")}</div>'
            for m in sample.prompt
        )
    if sample.prompt_seen < sample.prompt_tokens:
        seen = (
            f"cut at its start by --max-length {max_length}: the model saw {sample.prompt_seen:,} of the prompt's "
            f"{sample.prompt_tokens:,} tokens"
        )
        prompt += f'<div class="dim">{escaped(seen)}</div>'
    sides = (
        ("before", sample.before, sample.before_tokens, sample.before_cut),
        ("after", sample.after, sample.after_tokens, sample.after_cut),
    )
    blocks = "".join(
        f'<div><div class="dim">{name}, {number} tokens{", cut there" if cut else ""}</div>'
        f'<div class="said" dir="auto">{escaped(text) or "(nothing)"}</div></div>'
        for name, text, number, cut in sides
    )
    return f'<div class="sample">{prompt}<div class="two">{blocks}</div></div>\n'


def _evaluations(record: RunRecord) -> str:
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
    }
    shown = {name: title for name, title in names.items() if name in held_out}
    if not held_out.number:
        return ""
    every = -(-held_out.number // _EVALUATIONS)
    lines = sorted({*range(held_out.number - 1, -1, -every)})
    rows = [[f"{held_out.at(i, 'step') or 0:.0f}", *(_number(held_out.at(i, name)) for name in shown)] for i in lines]
    note = f'<p class="dim">One of {every} is shown, of {held_out.number:,} evaluations.</p>' if every > 1 else ""
    return f"<h2>Evaluations</h2>{_table(['step', *shown.values()], rows)}{note}"


def _lengths(record: RunRecord) -> str:
    rows = [
        [f"{data['use']}: {side}", *(f"{values[name]:,.0f}" for name in ("mean", "p50", "p90", "p99", "max"))]
        for data in record.facts["data"]
        for side, values in data["tokens"].items()
    ]
    means = outcome.answer_lengths(record)
    answers = (
        f"<p>Sample answers: {means[0]:.0f} tokens before, {means[1]:.0f} after (means of {len(record.samples)}).</p>"
        if means
        else ""
    )
    return f"<h2>Lengths in tokens</h2>{_table(['', 'mean', 'median', '90%', '99%', 'longest'], rows)}{answers}"


def _data(record: RunRecord) -> str:
    blocks = []
    for data in record.facts["data"]:
        answers = data["answers"]
        rows = [
            ["source", data["source"]],
            ["form", f"{data['form']}, {'chat messages' if data['chat'] else 'plain text'}"],
            ["examples an epoch", f"{data['examples']:,}"],
            ["answers", f"{answers['chosen']:,} chosen, {answers['rejected']:,} rejected"],
            ["cut by --max-length", f"{data['prompts_cut']:,} prompts, {data['answers_cut']:,} answers"],
        ]
        if "in_training" in data:
            rows.append(["in the training data", str(outcome.shared(data)) or "none of these prompts"])
        for source in data["sources"]:
            weight = "" if source["weight"] == 1 else f", {source['weight']:g} times an epoch"
            rows.append([source["name"], f"{source['kept']:,} rows read as {source['format']}{weight}"])
            rows += [
                ["left out", f"{reason['rows']:,} {reason['reason']} (first: {reason['stories'][0]['first']})"]
                for reason in source["left_out"]
            ]
            rows += [["note", f"{note['rows']:,} rows: {note['note']}"] for note in source["notes"]]
        blocks.append(f"<h3>{escaped(data['use'])}</h3>{_table(None, rows)}")
    return f"<h2>Data</h2>{''.join(blocks)}"


def _machine(record: RunRecord) -> str:
    facts, train = record.facts, record.history.train
    rows = [
        ["device", facts["device"]],
        ["layout", facts["layout"]],
        ["machine", facts["machine"]],
        ["software", facts["software"]],
    ]
    if train.number:
        examples, step = train.recent("examples_per_second", by="seconds_per_step"), train.recent("seconds_per_step")
        rows.append(["speed", f"{_number(examples)} examples a second, {_number(step)} seconds a step, at the end"])
        rows.append(["tokens", f"{train.last('num_tokens') or 0:,.0f}"])
    if facts["memory"]:
        rows.append(["memory", facts["memory"].removeprefix("memory: ")])
    return f"<h2>Speed and memory</h2>{_table(None, rows)}"


def _options(record: RunRecord) -> str:
    """Return the options: first what differs from the defaults of this loss and this data."""
    config = record.config
    known = {name: value for name, value in config.items() if name in FIELDS}
    plain = TrainConfig(**{name: known[name] for name in ("loss", "data", "init_adapter", "sample_rejected") if name in known})
    default = plain.resolved().as_dict()
    rows = {name: [flag(name), "none" if value is None else value] for name, value in known.items()}
    changed = [row for name, row in rows.items() if name == "loss" or known[name] != default[name]]
    whole = f"<details><summary>All options</summary>{_table(None, rows.values())}</details>"
    return f"<h2>Options</h2>{_table(None, changed)}{whole}"


def _table(head: Sequence[str] | None, rows: Iterable[Sequence[object]]) -> str:
    """Return a table; without a head one of names and texts."""
    title = (
        "" if head is None else "<thead><tr>" + "".join(f'<th scope="col">{escaped(h)}</th>' for h in head) + "</tr></thead>"
    )
    body = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table{"" if head else " class=text"}>{title}<tbody>{body}</tbody></table></div>'


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _time(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"
