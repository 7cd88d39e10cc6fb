"""What is damaged: runs, caches, a comparison and files of rows on a tiny model, and the commands that read them back."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soak import forks, tiny_world

from lite_dil.base.files import write
from lite_dil.base.hashing import file_pieces, sha256

MADE, HERE = "made", "here"
# What a clock or the machine decides.
_MEASURED = {"tokens_per_second", "examples_per_second", "seconds_per_step", "peak_memory_mb", "reference_passes"}
_LIMIT = 60.0  # seconds of a case


@dataclass(frozen=True)
class Command:
    """What reads files back, and what it leaves.

    Attributes:
        work: runs it in the folder of a world; returns the exit code.
        result: reads what it left, to compare with what it leaves without damage.
    """

    name: str
    work: Callable[[Path], int]
    result: Callable[[Path], Any]


class World:
    """A folder with a model, its rows, and what two series of runs left: `made`, and `other` of another model.

    Each case works on a copy of `made` at the same place, since some files hold paths. With `short` there is no other model's
    series and no comparison.
    """

    def __init__(self, root: Path, backend: str, short: bool) -> None:
        self.root, self.backend, self.short = root, backend, short
        self.here, self.other, self.model = root / HERE, root / "other", root / "model-1"
        self.commands = {command.name: command for command in _commands(self)}
        self._undamaged: dict[str, tuple[Any, list[str]]] = {}

    def make(self) -> None:
        """Make it, in forks."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        tiny_world.write_rows(self.root / "rows.jsonl", 8, words=2, pairs=False)
        tiny_world.write_rows(self.root / "held_out.jsonl", 3, 1, words=2, pairs=False)
        tiny_world.write_rows(self.root / "pairs.jsonl", 8, words=2)
        (self.root / "prompts.txt").write_text("what is tea\nhow do you make bread\n", encoding="utf-8")
        for number, place in enumerate(("other", MADE)):
            if self.short and place != MADE:
                continue
            self.model = tiny_world.make_model(self.root / f"model-{number}", seed=number)
            self.here.mkdir()
            self._fill(_flags(number))
            self.here.rename(self.root / place)

    def fresh(self) -> None:
        """Put the whole files in place."""
        shutil.rmtree(self.here, ignore_errors=True)
        shutil.copytree(self.root / MADE, self.here)

    def run(self, work: Callable[[Path], int]) -> forks.Ended:
        """Run `work` in a fork."""
        return forks.call(lambda: work(self.here), self.root / "log", {"LITE_DIL_CACHE": str(self.here / "cache")}, _LIMIT)

    def undamaged(self, name: str) -> tuple[Any, list[str]]:
        """Return what a command leaves, and says, without damage."""
        if name not in self._undamaged:
            self.fresh()
            ended = self.run(self.commands[name].work)
            if ended.code:
                raise RuntimeError(f"{name}, without damage: {ended.said}")
            self._undamaged[name] = (self.commands[name].result(self.here), ended.said.splitlines())
        return self._undamaged[name]

    def train(self, *flags: str) -> Callable[[Path], int]:
        """Return what trains by the command line."""
        own = ["--model", str(self.model), "--backend", self.backend, "--dtype", "float32", "--lora-r", "2"]
        own += ["--data", str(self.root / "rows.jsonl"), "--eval-data", str(self.root / "held_out.jsonl")]
        own += ["--max-length", "64", "--sample-rejected", "1", "--sample-max-tokens", "4", "--batch-size", "2"]
        own += ["--max-steps", "3", "--save-steps", "1", "--report-samples", "1", "--target-modules", "q_proj,v_proj"]
        return _main("train", *own, *flags, "--sample-file", str(self.here / "sampled.jsonl"))

    def compare(self, *flags: str) -> Callable[[Path], int]:
        """Return what compares two losses by the command line."""
        own = ["--model", str(self.model), "--backend", self.backend, "--dtype", "float32", "--lora-r", "2"]
        own += ["--data", str(self.root / "pairs.jsonl"), "--max-length", "64", "--losses", "lsif,dpo", "--max-steps", "2"]
        own += ["--batch-size", "2", "--sample-prompts", "1", "--sample-tokens", "4", "--eval-fraction", "0.3"]
        return _main("compare", *own, *flags, "--output", str(self.here / "compared"))

    def generate(self, output: str, *flags: str) -> Callable[[Path], int]:
        """Return what answers prompts by the command line."""
        own = [str(self.root / "prompts.txt"), "--adapter", str(self.here / "done"), "--output", str(self.here / output)]
        return _main("generate", *own, *flags, "--max-new-tokens", "4", "--batch-size", "1")

    def _fill(self, flags: tuple[str, ...]) -> None:
        steps = [
            self.train("--output-dir", str(self.here / "done"), *flags),
            self.generate("answers.jsonl"),
            *([] if self.short else [self.compare(*flags)]),
            _label,
            self._keep_rate,
        ]
        for work in steps:
            if (ended := self.run(work)).code:
                raise RuntimeError(f"the world of {self.backend}: {ended.said}")
        # A run that was killed after its second checkpoint, and answers of which the second is missing.
        shutil.copytree(self.here / "done", self.here / "run")
        for path in ("checkpoints/step-3", "adapter"):
            shutil.rmtree(self.here / "run" / path)
        answers = self.here / "answers.jsonl"
        answers.write_bytes(answers.read_bytes().splitlines(keepends=True)[0])

    def _keep_rate(self, _: Path) -> int:
        from lite_dil.runs.rates import Rate, Setting, keep

        setting = Setting(str(self.model), self.backend, "float32", False, "plain")
        keep(Rate(setting, 1234.5, 56.7, 10, "2026-01-01"))
        return 0


def _flags(number: int) -> tuple[str, ...]:
    """Return the flags in which the two series of runs differ."""
    return "--seed", str(number), "--learning-rate", f"0.0{number + 1}"


def _main(*argv: str) -> Callable[[Path], int]:
    def work(_: Path) -> int:
        from lite_dil.cli.main import main

        _prepare()
        return main(list(argv))

    return work


def _prepare() -> None:
    """Draw nothing, which is four fifths of a tiny run's time and reads no file; keep the tokens of few rows, as of many."""
    cache: Any = importlib.import_module("lite_dil.data.token_cache")
    cache.SMALL = 0
    charts: Any = importlib.import_module("lite_dil.reports.charts")
    page: Any = importlib.import_module("lite_dil.evaluation.comparison.page")
    charts.svg = page.draw_curves = page.draw_accuracy = lambda *_, **__: ""


def _label(here: Path) -> int:
    """Write labels as `lite-dil label` does."""
    from lite_dil.data.prompts import Prompt
    from lite_dil.labelling.labels import Candidate, Labels

    labels = Labels(here / "labels.jsonl")
    for number, text in enumerate(("what is tea", "what is bread")):
        shown = [Candidate("a red house", "base"), Candidate("a blue house", "tuned-12345678")]
        labels.take(Prompt(text, ""), shown[number], shown)
    labels.reject(Prompt("what is a river", ""), [Candidate("small", "base")])
    return 0


def _read_labels(here: Path) -> int:
    """Read the files of labels as `lite-dil label` does, add a pair, and note what was read."""
    from lite_dil.data.prompts import Prompt
    from lite_dil.labelling.labels import Candidate, Labels

    def work() -> None:
        labels = Labels(here / "labels.jsonl")
        bad = labels.bad_of(Prompt("what is a river", ""))
        labels.take(Prompt("anew", ""), Candidate("a", "base"), [Candidate("b", "base")])
        found = [labels.rows, [each.text for each in bad], _rows(here / "labels.jsonl"), _rows(here / "labels.bad.jsonl")]
        write(here / "read.json", json.dumps(found))

    return _told(work)


def _rate(here: Path) -> int:
    """Note the rate that `lite-dil plan` would use."""
    from lite_dil.runs.rates import known

    return _told(lambda: write(here / "rate.json", json.dumps(str(known(str(here.parent / "model-1"))))))


def _report(here: Path) -> int:
    """Write the report of the finished run from its files."""
    from lite_dil.reports.page import render
    from lite_dil.reports.run_report import read_record

    _prepare()

    def work() -> None:
        record = read_record(here / "done")
        print(*record.damage, sep="\n")
        write(here / "report.html", render(record))

    return _told(work)


def _newest(here: Path) -> int:
    """Note the checkpoint from which `--resume` would go on, whose files have been read by then."""
    from lite_dil.config.resume import saved_config
    from lite_dil.runs.folder import RunFolder

    def work() -> None:
        run = RunFolder(here / "run")
        found = run.whole(run.latest() or Path(), print)
        write(here / "newest.json", json.dumps([found.name, saved_config(found, print)]))

    return _told(work)


def _told(work: Callable[[], object]) -> int:
    """Run `work`; show an error for the user as the command line does."""
    from lite_dil.base.errors import UserError

    try:
        work()
    except UserError as error:
        print(f"lite-dil: {error}")
        return 2
    return 0


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _rows(path: Path) -> list[Any]:
    """Return the rows of a file that are JSON."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _run(folder: Path) -> Any:
    """Return what a run's folder holds, but for what a clock decides and what damage adds."""
    rows = _rows(folder / "metrics.jsonl")
    lines = [{name: value for name, value in line.items() if name not in _MEASURED} for line in rows]
    files: dict[str, Any] = {path.name: sha256(file_pieces(path)) for path in (folder / "adapter").glob("adapter*")}
    return lines, files, _rows(folder / "report_samples.jsonl"), _rows(folder / "held_out_pairs.json")


def _listed(log: Path) -> Any:
    text = log.read_text(encoding="utf-8")
    listed = json.loads(text[text.index("[") :])
    return [{name: value for name, value in run.items() if name not in ("changed", "seconds")} for run in listed]


def _files(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): sha256(file_pieces(path)) for path in files}


def _commands(world: World) -> list[Command]:
    here, sampled = world.here, ("--sample-file", str(world.here / "sampled.jsonl"))
    adapter = ("--adapter", str(here / "done"), "--no-check", "--output", str(here / "out"))
    initial = ("--init-adapter", str(here / "done" / "adapter"), "--reference", "initial-adapter")
    anew = ("--output-dir", str(here / "anew"))
    own = ["--model", str(world.model), "--backend", world.backend, "--dtype", "float32", "--max-steps", "1"]
    own += ["--data", str(world.root / "pairs.jsonl"), "--max-length", "64", "--report-samples", "0", "--eval-fraction", "0"]
    return [
        Command("resume", _main("train", "--resume", str(here / "run"), *sampled), lambda here: _run(here / "run")),
        Command("resume finished", _main("train", "--resume", str(here / "done"), *sampled), lambda here: _run(here / "done")),
        # Rows that were drawn from another model stay in the file, unused.
        Command("train", world.train(*_flags(1), *anew), lambda here: _run(here / "anew")),
        Command("train on", _main("train", *own, *initial, *anew), lambda here: _run(here / "anew")),
        Command("runs", _main("runs", str(here / "done"), "--json"), lambda here: _listed(here.parent / "log")),
        Command("report", _report, lambda here: _text(here / "report.html")),
        Command("generate", world.generate("new.jsonl"), lambda here: _rows(here / "new.jsonl")),
        Command("generate on", world.generate("answers.jsonl"), lambda here: _rows(here / "answers.jsonl")),
        Command("export", _main("export", *adapter, "--format", "adapter"), lambda here: _files(here / "out")),
        Command("merge", _main("export", *adapter, "--format", "merged"), lambda here: _files(here / "out")),
        Command("compare", world.compare(*_flags(1)), lambda here: _text(here / "compared" / "table.json")),
        Command("label", _read_labels, lambda here: _text(here / "read.json")),
        Command("plan", _rate, lambda here: _text(here / "rate.json")),
        Command("whole", _newest, lambda here: _text(here / "newest.json")),
    ]
