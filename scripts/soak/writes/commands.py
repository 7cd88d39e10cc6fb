"""The commands that are killed, cut off and refused: tiny models and data, and what each command must leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from soak.tiny_world import make_model, write_rows


def no_keys(folder: Path) -> str:
    return ""


@dataclass(frozen=True)
class Command:
    """A command, run in a folder of its own with relative paths.

    Attributes:
        again: what a user starts after a failure; several are taken in turn.
        run: whether the folder holds a finished run at the start.
        added: the files of rows that are on disk, each once it was added.
        keys: what is typed, for the state of the folder.
    """

    name: str
    argv: list[str]
    again: list[list[str]] = field(default_factory=list)
    run: bool = False
    added: tuple[str, ...] = ()
    keys: Callable[[Path], str] = no_keys


def commands(place: Path) -> list[Command]:
    """Return the commands; `make` has written what they read to `place`."""
    model = ["--model", str(place / "model")]
    common = [*model, "--dtype", "float32", "--lora-r", "2", "--learning-rate", "1e-2", "--target-modules", "q_proj"]
    common += ["--output-dir", "run", "--batch-size", "2"]
    pairs = ["--data", str(place / "pairs.jsonl")]
    long = [*common, *pairs, "--eval-data", str(place / "held_out.jsonl"), "--eval-steps", "2", "--report-samples", "1"]
    long += ["--max-steps", "4", "--save-steps", "1", "--save-total-limit", "2"]
    short = [*common, "--max-steps", "2", "--report-samples", "0"]
    drawn = [*short, "--data", str(place / "demonstrations.jsonl"), "--sample-rejected", "1", "--sample-file", "drawn.jsonl"]
    drawn += ["--sample-max-tokens", "3"]
    found = [_train(f"train, {backend}", [*long, "--backend", backend]) for backend in ("cpu", "mlx")]
    found.append(_train("train --precompute-reference, cpu", [*short, *pairs, "--backend", "cpu", "--precompute-reference"]))
    for backend in ("cpu", "mlx"):
        again = ["--sample-file", "drawn.jsonl"]
        found.append(_train(f"train --sample-rejected, {backend}", [*drawn, "--backend", backend], ("drawn.jsonl",), again))
    tuned = ["--adapter", "run", "--backend", "cpu"]
    asked = [str(place / "prompts.txt"), *tuned, "--max-new-tokens", "3", "--output"]
    found.append(_same("generate, cpu", ["generate", *asked, "answers.jsonl", "--batch-size", "2"], ("answers.jsonl",)))
    found.append(_same("label, cpu", ["label", *asked, "labels.jsonl"], ("labels.jsonl", "labels.bad.jsonl"), _keys))
    rows = ["--check-data", str(place / "held_out.jsonl"), "--check-rows", "1"]
    for format, more in (("merged", rows), ("adapter", rows), ("gguf", ["--no-check"])):
        found.append(_same(f"export --format {format}", ["export", *tuned, "--format", format, "--output", "out", *more]))
    return found


def _train(name: str, flags: list[str], added: tuple[str, ...] = (), resume: Sequence[str] = ()) -> Command:
    argv = ["train", *flags]
    return Command(name, argv, [["train", "--resume", "run", *resume], [*argv, "--resume"]], added=added)


def _same(name: str, argv: list[str], added: tuple[str, ...] = (), keys: Callable[[Path], str] = no_keys) -> Command:
    return Command(name, argv, [argv], run=True, added=added, keys=keys)


def _keys(folder: Path) -> str:
    """Both first answers are bad; then the first answer is always the better one."""
    bad, pairs = (folder / "labels.bad.jsonl", folder / "labels.jsonl")
    there = [path.is_file() and path.read_bytes().rstrip(b"\0").count(b"\n") for path in (bad, pairs)]
    return ("" if any(there) else "b\n") + "1\n" * 20


def make(place: Path) -> None:
    """Write a tiny model and its data."""
    make_model(place / "model", hidden=64)
    for number, (name, rows) in enumerate((("pairs", 8), ("held_out", 3), ("demonstrations", 4))):
        write_rows(place / f"{name}.jsonl", rows, seed=number, words=6, pairs=name != "demonstrations")
    (place / "prompts.txt").write_text("what is Paris\nmake tea\nhow do you make bread\n", encoding="utf-8")
