"""eval.json, what lite-dil eval found, as tables and sentences for the terminal, the report, the card and lists of runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lite_dil.base.checked import read_object, with_digest
from lite_dil.base.errors import UserError
from lite_dil.base.files import make_folder, replace_file
from lite_dil.base.formats import EVALUATION, KEY, check_format
from lite_dil.models.fingerprint import fingerprint
from lite_dil.training.options import ReferenceOptions
from lite_dil.training.reference_cache import cache_folder

EVAL = "eval.json"
EVALUATIONS = "evaluations"  # in the folder of a run or of a comparison: a folder for each evaluation
HEADING = "## Benchmarks and preferences"
_OWN = "Summed up by lm-eval, without an interval"
_REDUCTIONS = {"sum": "summed log-ratios", "mean": "log-ratios per token"}
CAUTION = "Scores of other templates, numbers of examples or limits are other scores: compare only what has the same ones."


class ScoreTable(NamedTuple):
    """A table: its title, headings, and rows of cells."""

    title: str
    head: list[str]
    rows: list[list[str]]


class Evaluations(NamedTuple):
    """The evaluations of a run or a comparison.

    Attributes:
        current: their contents, newest first.
        outdated: folders of those whose adapter has changed since or is gone: their figures are of another model.
    """

    current: list[dict[str, Any]]
    outdated: list[Path]


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


def read_evaluations(folder: Path) -> Evaluations:
    """Return what a run or a comparison was evaluated on. Raises UserError if a file is damaged or newer."""
    found = Evaluations([], [])
    for path in sorted((folder / EVALUATIONS).glob(f"*/{EVAL}")):
        if content := read_scores(path.parent):
            changed = any(adapter_print(folder / each["adapter"]) != each["weights"] for each in content["adapters"])
            (found.outdated if changed else found.current).append(path.parent if changed else content)  # type: ignore[arg-type]
    found.current.sort(key=lambda content: str(content["made"]), reverse=True)
    return found


def adapter_print(adapter: Path) -> str:
    """Return what tells an adapter's weights from others, "" if they are not there."""
    try:
        return fingerprint(adapter, cache_folder(ReferenceOptions()))
    except UserError:  # no weights in that folder
        return ""


def score_tables(content: Mapping[str, Any]) -> list[ScoreTable]:
    """Return the tables of an evaluation."""
    tables = []
    names = [each["name"] for each in content["adapters"]]
    if shown := [figure for figure in content["figures"] if not figure["part"]]:
        for name in names or [""]:
            rows = [_row(figure, name) for figure in shown]
            head = ["task", "metric", "base", *(["tuned", "difference, 95 %", "+/-", "p"] if name else [])]
            tables.append(ScoreTable(_titled("Benchmarks", name), head, rows))
    if content["own_figures"]:
        rows = [_own_row(figure) for figure in content["own_figures"]]
        tables.append(ScoreTable(_OWN, ["task", "metric", "by", "base", *names], rows))
    for name, found in content["preferences"].items():
        rows = []
        for each in found["subsets"]:
            rules = ("implicit reward", "mean log-prob", "mean log-prob of the base", "the longer answer")
            rows.append([each["subset"], f"{each['pairs']:,}", *(f"{each[rule]['mean']:.3f}" for rule in rules)])
        head = ["subset", "pairs", "implicit reward", "log-prob", "base's", "longer wins"]
        tables.append(ScoreTable(_titled("Preferences", name), head, rows))
    return tables


def _titled(title: str, name: str) -> str:
    return f"{title}: {name}" if name else title


def _own_row(figure: Mapping[str, Any]) -> list[str]:
    values = [figure["base"], *(each["value"] for each in figure["adapters"])]
    return [figure["task"], figure["metric"], figure["by"], *("-" if value is None else f"{value:.4g}" for value in values)]


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
            f"sigmoid({found['beta']:g} x margin of the {_REDUCTIONS[found['reduction']]}) is off by "
            f"{found['calibration']['error']:.3f} on average."
        )
        if away := found.get("distance"):
            kl, length = away["kl"], away["length"]
            lines.append(
                f"{said}KL to the reference on {away['answers']} own answers: {kl['mean']:.2f} nats per answer (95 % interval "
                f"{kl['low']:.2f} to {kl['high']:.2f}). Their length: {length['tuned']:.0f} tokens, the base's "
                f"{length['base']:.0f} (change {length['low']:+.0f} to {length['high']:+.0f}){_cut(away)}."
            )
    return lines


def _cut(away: Mapping[str, Any]) -> str:
    """Return how many of the answers were cut at the longest length, which bounds KL and length."""
    cut = away["cut"]
    return f"; cut at the longest length: {cut['tuned']} of them, {cut['base']} of the base's" if any(cut.values()) else ""


def setting_lines(content: Mapping[str, Any]) -> list[str]:
    """Return how tasks were asked, those asked alike in one line."""
    alike: dict[str, list[str]] = {}
    for task, how in content["settings"].items():
        words = [_asked(how, full=True), "BOS" if how["bos"] else "no BOS"]
        words += [f"{how['truncated']:,} items with a context cut at its start"] if how["truncated"] else []
        alike.setdefault(", ".join(words), []).append(task)
    return [f"{', '.join(tasks) if len(tasks) < 8 else f'{len(tasks)} tasks'}: {how}" for how, tasks in alike.items()]


def _asked(how: Mapping[str, Any], full: bool = False) -> str:
    """Return what a score depends on; without `full` only what is not so by default."""
    words = [f"{how['shots']}-shot"]
    words += (
        ["chat template" if how["template"] == "chat" else "no chat template"] if full or how["template"] == "chat" else []
    )
    words += [f"first {how['limit']:,} items"] if how["limit"] else []
    return ", ".join(words)


def page_scores(found: Evaluations) -> dict[str, Any] | None:
    """Return what a page shows of evaluations; None without any."""
    if not found.current and not found.outdated:
        return None
    settings = [[f"asked: {line}" for line in setting_lines(content)] for content in found.current]
    parts = [
        {"tables": score_tables(content), "sentences": score_sentences(content), "settings": asked}
        for content, asked in zip(found.current, settings, strict=True)
    ]
    return {"parts": parts, "notes": ([CAUTION] if any(settings) else []) + outdated_lines(found)}


def outdated_lines(found: Evaluations) -> list[str]:
    """Return in words which evaluations are not shown."""
    names = ", ".join(folder.name for folder in found.outdated)
    why = "of adapters that have changed since or are gone, and not shown; evaluate again"
    return [f"In {EVALUATIONS}/: {names} {'is' if len(found.outdated) == 1 else 'are'} {why}."] if names else []


def card_scores(found: Evaluations, adapter: Path, strength: float) -> Iterator[str]:
    """Yield the parts of a model card about one adapter; nothing if no evaluation was of it."""
    weights = adapter_print(adapter) if found.current else ""
    mine = [only(content, names) for content in found.current if (names := _names_of(content, weights, strength))]
    yield from markdown_scores(Evaluations(mine, []))


def _names_of(content: Mapping[str, Any], weights: str, strength: float) -> list[str]:
    return [each["name"] for each in content["adapters"] if each["weights"] == weights and each["strength"] == strength]


def only(content: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the results of some adapters beside the base's."""

    def of(figures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{**each, "adapters": [one for one in each["adapters"] if one["name"] in names]} for each in figures]

    return {
        **content,
        "adapters": [each for each in content["adapters"] if each["name"] in names],
        "figures": of(content["figures"]),
        "own_figures": of(content["own_figures"]),
        "preferences": {name: found for name, found in content["preferences"].items() if name in names},
    }


def markdown_scores(found: Evaluations) -> Iterator[str]:
    """Yield the paragraphs of a section in Markdown: tables, what they show, and how it was asked; nothing without any."""
    if found.current or found.outdated:
        yield HEADING
    for content in found.current:
        for table in score_tables(content):
            lines = [table.head, ["---"] * len(table.head), *table.rows]
            yield f"**{table.title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)
        settings = setting_lines(content)
        yield "\n".join(f"- {line}" for line in [*score_sentences(content), *settings, *([CAUTION] if settings else [])])
    if found.outdated:
        yield "\n".join(f"- {line}" for line in outdated_lines(found))


def score_words(found: Evaluations) -> str:
    """Return the newest evaluation's first figure for a list of runs, base and tuned: "arc 0-shot 0.310>0.330"."""
    for content in found.current:
        for figure in content["figures"]:
            if not figure["part"]:
                how = _setting(content, figure["task"])
                first, where = figure["adapters"][0], _which(content["adapters"][0])
                scores = f"{figure['base']['mean']:.3f}>{first['mean']:.3f}"
                return f"{figure['task']} {figure['metric']}{f', {_asked(how)}' if how else ''} {scores}{where}"
        for name, pairs in content["preferences"].items():
            entry = next(each for each in content["adapters"] if each["name"] == name)
            return f"preferences {pairs['subsets'][0]['implicit reward']['mean']:.3f}{_which(entry)}"
        for figure in content["own_figures"]:
            _, metric, _, *values = _own_row(figure)
            return f"{figure['task']} {metric} {'>'.join(values[:2])}{_which(content['adapters'][0])}"
    return ""


def _setting(content: Mapping[str, Any], task: str) -> Mapping[str, Any] | None:
    """Return how a task was asked, or a group whose tasks were all asked alike; else None."""
    settings = [content["settings"][each] for each in content["groups"].get(task, [task])]
    return settings[0] if len({_asked(each, full=True) for each in settings}) == 1 else None


def _which(entry: Mapping[str, Any]) -> str:
    """Return which of a run's adapters a score is of, "" for the final one as it is."""
    return "" if entry["adapter"] == "adapter" and entry["strength"] == 1 else f" ({entry['name']})"
