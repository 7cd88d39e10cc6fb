"""Train a tiny model for many steps in this process, and print its memory, open files and times as JSON."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
from soak import tiny_world

import lite_dil as dil


class Watch(dil.Observer):
    """Notes after each step the resident memory in MB, the open files, and the CPU seconds since the step before."""

    def __init__(self) -> None:
        self.process, self.before = psutil.Process(), time.process_time()
        self.notes: list[tuple[float, int, float]] = []

    def after_step(self, event: dil.Event) -> None:
        """Note them."""
        now = time.process_time()
        self.notes.append((self.process.memory_info().rss / 2**20, self.process.num_fds(), now - self.before))
        self.before = now


def main(backend: str, steps: str, root: str) -> None:
    """Train `steps` steps in the folder `root`, and print for each quarter the medians, and the most open files."""
    place, watch = Path(root), Watch()
    model = str(tiny_world.make_model(place / "model", hidden=64))
    data = tiny_world.write_rows(place / "pairs.jsonl", 64, words=2)
    held_out = tiny_world.write_rows(place / "held_out.jsonl", 8, 1, words=2)
    policy = dil.load(model, backend=backend, dtype="float32", lora_r=4)
    often = max(1, int(steps) // 4)
    options: dict[str, Any] = {
        "max_steps": int(steps),
        "save_steps": often,
        "save_total_limit": 2,
        "eval_steps": often,
        "logging_steps": 5,
    }
    dil.train(
        policy,
        data,
        eval_data=held_out,
        observers=[watch],
        output_dir=place / "run",
        report_samples=0,
        batch_size=1,
        **options,
    )
    quarter = len(watch.notes) // 4
    found = []
    for number in range(4):
        memory, files, seconds = zip(*watch.notes[number * quarter : (number + 1) * quarter], strict=True)
        found.append([statistics.median(memory), max(files), statistics.median(seconds)])
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
