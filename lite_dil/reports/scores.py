"""eval.json of a run, what lite-dil eval found, as tables and sentences for the terminal, the report, the card and lists."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lite_dil.base.checked import read_object, with_digest
from lite_dil.base.files import make_folder, replace_file
from lite_dil.base.formats import EVALUATION, KEY, check_format

EVAL = "eval.json"
CAUTION = "Scores of other templates, numbers of examples or limits are other scores: compare only what has the same ones."


class ScoreTable(NamedTuple):
    """A table: its title, headings, and rows of cells."""

    title: str
    head: list[str]
    rows: list[list[str]]


def write_scores(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write eval.json into a folder; return its path."""
    make_folder(folder)
    path = folder / EVAL
    replace_file(path, json.dumps(with_digest({KEY: EVALUATION, **content}), indent=1, ensure_ascii=False) + "\n")
    return path


def read_scores(folder: Path) -> dict[str, Any] | None:
    """Return the content of a folder's eval.json, None without one. Raises UserError if it is damaged or newer."""
    path = folder / EVAL
    if not path.is_file():
        return None
    content = read_object(path, digest=True)
    check_format(content, EVALUATION, path)
    return content


def score_tables(content: Mapping[str, Any]) -> list[ScoreTable]:
    """Return the tables of an evaluation, each at most 80 characters wide with one adapter."""
    tables = []
    names = [each["name"] for each in content["adapters"]]
    if shown := [figure for figure in content["figures"] if not figure["part"]]:
        for name in names or [""]:
            rows = [_row(figure, name) for figure in shown]
            head = ["task", "metric", "base", *(["tuned", "difference, 95 %", "+/-", "p"] if name else [])]
            tables.append(ScoreTable(_titled("Benchmarks", name, names), head, rows))
    for name, found in content["preferences"].items():
        rows = []
        for each in found["subsets"]:
            rules = ("implicit reward", "mean log-prob", "mean log-prob of the base", "the longer answer")
            rows.append([each["subset"], f"{each['pairs']:,}", *(f"{each[rule]['mean']:.3f}" for rule in rules)])
        head = ["subset", "pairs", "implicit reward", "log-prob", "base's", "longer wins"]
        tables.append(ScoreTable(_titled("Preferences", name, names), head, rows))
    return tables


def _titled(title: str, name: str, names: list[str]) -> str:
    return f"{title}: {name}" if name and len(names) > 1 else title


def _row(figure: Mapping[str, Any], name: str) -> list[str]:
    cells = [figure["task"], figure["metric"], f"{figure['base']['mean']:.3f}"]
    for each in figure["adapters"]:
        if each["name"] == name:
            between = f"{each['difference_low']:+.3f} to {each['difference_high']:+.3f}"
            cells += [f"{each['mean']:.3f}", between, f"{each['gained']}/{each['lost']}", f"{each['p_holm']:.2g}"]
    return cells


def score_sentences(content: Mapping[str, Any]) -> list[str]:
    """Return what an evaluation shows, in words, and how it was asked."""
    lines = [each["sentence"] for figure in content["figures"] if not figure["part"] for each in figure["adapters"]]
    for name, found in content["preferences"].items():
        lines += found["sentences"]
        all_pairs, said = found["subsets"][0], f"{name}: " if len(content["preferences"]) > 1 else ""
        reward, longer = all_pairs["implicit reward"], all_pairs["the longer answer"]
        lines.append(
            f"{said}accuracy by implicit reward {reward['mean']:.3f} (95 % interval {reward['low']:.3f} to "
            f"{reward['high']:.3f}, {all_pairs['pairs']:,} pairs); the longer answer wins in {longer['mean']:.3f}. Confidence "
            f"sigmoid({found['beta']:g} x margin) is off by {found['calibration']['error']:.3f} on average."
        )
        if away := found.get("distance"):
            kl, length = away["kl"], away["length"]
            lines.append(
                f"{said}KL to the reference on {away['answers']} own answers: {kl['mean']:.2f} nats per answer (95 % interval "
                f"{kl['low']:.2f} to {kl['high']:.2f}). Their length: {length['tuned']:.0f} tokens, the base's "
                f"{length['base']:.0f} (change {length['low']:+.0f} to {length['high']:+.0f})."
            )
    return lines


def setting_lines(content: Mapping[str, Any]) -> list[str]:
    """Return how tasks were asked, those asked alike in one line."""
    alike: dict[str, list[str]] = {}
    for task, how in content["settings"].items():
        template = "chat template" if how["template"] == "chat" else "no chat template"
        words = [f"{how['shots']}-shot", template, "BOS" if how["bos"] else "no BOS"]
        words += [f"first {how['limit']:,} items"] if how["limit"] else []
        words += [f"{how['truncated']:,} contexts cut at their start"] if how["truncated"] else []
        alike.setdefault(", ".join(words), []).append(task)
    return [f"{', '.join(tasks) if len(tasks) < 8 else f'{len(tasks)} tasks'}: {how}" for how, tasks in alike.items()]


def page_scores(content: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what the report shows of an evaluation; None without one."""
    if content is None:
        return None
    settings = setting_lines(content)
    settings += [CAUTION] if settings else []
    return {"tables": score_tables(content), "sentences": score_sentences(content), "settings": settings}


def card_scores(content: Mapping[str, Any], adapter: Path, strength: float) -> Iterator[str]:
    """Yield the parts of a model card about one adapter; nothing if the evaluation was of another one."""
    names = [
        each["name"]
        for each in content["adapters"]
        if Path(each["adapter"]).absolute() == adapter.absolute() and each["strength"] == strength
    ]
    if not names:
        return
    one = {
        **content,
        "adapters": [each for each in content["adapters"] if each["name"] in names],
        "figures": [
            {**figure, "adapters": [each for each in figure["adapters"] if each["name"] in names]}
            for figure in content["figures"]
        ],
        "preferences": {name: found for name, found in content["preferences"].items() if name in names},
    }
    yield from markdown_scores(one)


def markdown_scores(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the paragraphs of a section in Markdown: tables, what they show, and how it was asked."""
    yield "## Benchmarks and preferences"
    for table in score_tables(content):
        lines = [table.head, ["---"] * len(table.head), *table.rows]
        yield f"**{table.title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)
    yield "\n".join(f"- {line}" for line in [*score_sentences(content), *setting_lines(content), CAUTION])


def score_words(content: Mapping[str, Any]) -> str:
    """Return the first figure of an evaluation for a list of runs, base and tuned: "arc acc 0.31>0.33"."""
    for figure in content["figures"]:
        if not figure["part"] and figure["adapters"]:
            shots = content["settings"].get(figure["task"], {}).get("shots")
            asked = "" if shots is None else f" {shots}-shot"
            return f"{figure['task']}{asked} {figure['base']['mean']:.3f}>{figure['adapters'][0]['mean']:.3f}"
    for found in content["preferences"].values():
        return f"preferences {found['subsets'][0]['implicit reward']['mean']:.3f}"
    return ""
