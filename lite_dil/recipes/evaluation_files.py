"""Where an evaluation is written: a folder of its own in each run or comparison, so that none replaces another."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lite_dil.base.display import Display
from lite_dil.base.errors import UserError
from lite_dil.base.files import make_folder, remove, replace_file
from lite_dil.evaluation.benchmarks import harness, measure
from lite_dil.evaluation.benchmarks.tasks import parts_of
from lite_dil.generation.policy import AdapterSource
from lite_dil.reports.card import write_card_scores
from lite_dil.reports.record import FACTS
from lite_dil.reports.run_report import write_report
from lite_dil.reports.scores import EVAL, EVALUATIONS, only, read_scores, write_scores
from lite_dil.runs.folder import RUNS, unused

EVAL_SAMPLES = "eval_samples.jsonl"
_LONGEST = 40  # characters of a folder's name


def folder_name(asked: str, tasks: str, preferences: str) -> str:
    """Return the name of an evaluation's folder: what is measured, and what tells it from others of that."""
    parts = [Path(part).stem for part in (*parts_of(tasks), preferences) if part]
    return f"{plain('-'.join(parts))[:_LONGEST]}-{asked[:8]}"


def plain(name: str) -> str:
    """Return a name as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", name)


def check_output(output: Path, asked: str) -> None:
    """Raise UserError if a folder has the results of an evaluation of something else."""
    if (found := read_scores(output)) and found.get("asked") != asked:
        raise UserError(f"--output {output}: it has the results of another evaluation; give another folder")


def places(
    names: Mapping[str, AdapterSource], output: Path | None, parent: Path | None, folder: str
) -> dict[Path, tuple[list[str], Path]]:
    """Return the folders to write into: for each the adapters whose results it gets, and what their paths are relative to.

    Args:
        names: the adapters by name.
        output: the folder itself; None makes one of the name `folder` in `parent`, or, without that, in each adapter's run.
    """
    if output is not None:
        return {output: (list(names), output)}
    if parent is not None:
        return {parent / EVALUATIONS / folder: (list(names), parent)}
    found: dict[Path, tuple[list[str], Path]] = {}
    for name, source in names.items():
        if source.run is None:
            break
        found.setdefault(source.run.path / EVALUATIONS / folder, ([], source.run.path))[0].append(name)
    else:
        if found:
            return found
    new = unused(RUNS / f"eval-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    return {new: (list(names), new)}


def write(
    folder: Path, names: Sequence[str], base: Path, found: Mapping[str, Any], measured: Mapping[str, measure.TaskScores]
) -> None:
    """Write the results of some adapters beside the base model's; the adapters' paths are relative to `base` if in it."""
    mine, above = only(found, names), base.absolute()
    for number, each in enumerate(mine["adapters"]):
        if (path := Path(each["adapter"])).is_relative_to(above):
            mine["adapters"][number] = {**each, "adapter": str(path.relative_to(above))}
    make_folder(folder)
    if (folder / EVAL).exists():  # last to be written and first to go: with it, the other files are of the same evaluation
        remove(folder / EVAL)
    if measured:
        sides = {name: measured[name] for name in names}
        base_scores = measured[measure.BASE]
        as_json = partial(json.dumps, ensure_ascii=False, default=harness.jsonable)
        rows = measure.sample_rows(base_scores, sides)
        replace_file(folder / EVAL_SAMPLES, "".join(as_json(row) + "\n" for row in rows))
        for name, scores in {measure.BASE: base_scores, **sides}.items():
            replace_file(folder / f"lm_eval_{plain(name)}.json", as_json(scores.results, indent=1) + "\n")
    write_scores(folder, mine)


def show_in_run(source: AdapterSource, display: Display) -> None:
    """Write a run's report, and the section of the card beside its final adapter, anew: both show the results."""
    if source.run is None or source.adapter is None:
        return
    if (source.run.path / FACTS).exists():
        write_report(source.run.path, display.say)
    if source.adapter.absolute() == source.run.adapter.absolute():
        write_card_scores(source.adapter, source)
