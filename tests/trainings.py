"""Runs through the command line, and what they leave that a clock does not decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from lite_dil.cli.main import main

# What a clock or the machine decides; everything else in a line is the same in every run of the same options.
# A run that comes second finds the reference in the cache.
MEASURED = {"tokens_per_second", "examples_per_second", "seconds_per_step", "peak_memory_mb", "reference_passes"}


def run(flags: list[str], folder: Path, *more: str) -> list[dict[str, Any]]:
    assert main(["train", *flags, "--output-dir", str(folder), *more]) == 0
    return metrics(folder)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(next(folder.glob("adapter*.safetensors")))


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def export(run: Path, output: Path, *flags: str) -> dict[str, Any]:
    """Export by the command, which must succeed; return export.json."""
    assert main(["export", "--adapter", str(run), "--output", str(output), *flags]) == 0
    return json.loads((output / "export.json").read_text())
