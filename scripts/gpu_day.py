"""Check on a GPU that training is right, what memory it takes and how fast it is.

    python scripts/gpu_day.py                                   # all three parts, at most six minutes each
    python scripts/gpu_day.py correctness                       # or memory, or speed
    python scripts/gpu_day.py correctness --device cpu --tiny   # the same checks on toys, to see that they run

Needs what `pip install -e ".[cuda]"` installs, and a C compiler, as training does. On a machine that has torch, transformers,
PEFT and accelerate and no network, put the wheels of bitsandbytes, platformdirs, rich, markdown-it-py, mdurl and pygments in a
folder WHEELS, and run in the repository

    pip install --no-index --no-deps WHEELS/*.whl && pip install --no-index --no-deps --no-build-isolation -e .

If trl, datasets, liger-kernel and unsloth are installed, their speed is measured too. Nothing is downloaded: a model of the
shape of Llama 3.1 8B is made on the card, layer by layer, of random weights in 4 bits (5.7 GB in --folder).

Each check runs in its own process with its own time limit, several at once except those of `speed`. Checks take single steps
of the backend, because gradients, bytes and loss scales of a step are what they examine; the training loop around it needs no
GPU to be tested. Each result is written to the JSON file at once. The same command continues an earlier one: checks that
passed or failed are not repeated (use --again failed, or --again all), those left out for lack of time are run. With all peers
installed, `speed` takes two calls on an H200. The table is printed at the end and saved beside the JSON file as .txt. The exit
code is 1 if a check failed, 2 for errors.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from gpu_day_costs import CORES_A_CHECK, RATE
from gpu_day_record import FAILED, LEFT_OUT, NOT_RUN, PASSED, Check, Record, status_of, table
from gpu_day_run import Run

from lite_dil.base.errors import UserError, first_line
from lite_dil.base.start import start

PARTS = ("correctness", "memory", "speed")
AT_A_TIME = {"correctness": 8, "memory": 4, "speed": 1}  # checks, at most, where there are cores for them


def main(argv: list[str] | None = None) -> int:
    """Run the parts and print the table; return 0, 1 where a check failed, 2 for errors."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    try:
        start(training=True)
        if options.worker:
            work(options)
            return 0
        card = Card.here() if options.device == "cuda" else Card("CPU", 0.0, True, RATE)
        record = Record.open(Path(options.json), machine_of(options, card))
        shown: list[str] = []
        for part in [options.part] if options.part else PARTS:
            shown += run_part(part, options, card, record, argv if options.part else [part, *argv])
    except UserError as error:
        print(f"gpu_day: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu_day: stopped; the same command goes on", file=sys.stderr)
        return 130
    text = "\n".join(
        [", ".join(f"{name} {value}" for name, value in record.machine.items()), card.warning, table(record, shown)]
    )
    record.path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if any(record.checks.get(key, {}).get("status") == FAILED for key in shown) else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_day.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=PARTS, help="default: all three")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and short pairs")
    parser.add_argument(
        "--minutes", type=float, default=6.0, help="for each part; checks for which no time is left are left out (default: 6)"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="only checks whose names contain one of these")
    parser.add_argument("--again", nargs="?", const="all", choices=("all", "failed"), help="repeat what was done before")
    parser.add_argument("--json", default="gpu_day.json", metavar="FILE", help="results of the checks (default: gpu_day.json)")
    parser.add_argument("--folder", metavar="FOLDER", help="where models that are made are kept (default: the cache folder)")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="checks at once, except in speed (default: 8 or 4, or fewer by cores and free memory)",
    )
    parser.add_argument(
        "--patience", type=float, metavar="TIMES", help="lengthen the checks' time limits (default: 1, on a CPU 5)"
    )
    parser.add_argument("--python", nargs="+", default=[], metavar="NAME=PATH", help="speed: another interpreter for a peer")
    parser.add_argument("--worker", nargs=3, metavar=("CHECK", "RESULT", "LIMIT"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu is for --tiny: what a GPU takes seconds for would take hours")
    options.patience = options.patience or (5.0 if options.device == "cpu" else 1.0)
    if any("=" not in pair for pair in options.python):
        parser.error("--python: expected NAME=PATH, as unsloth-best=FOLDER/bin/python")
    return options


class Card(NamedTuple):
    """The card: its name, its memory, whether it adds 1 and 1, and how fast it multiplies matrices in 16 bits."""

    name: str
    gib: float
    computes: bool
    flops: float

    @classmethod
    def here(cls) -> Card:
        """Ask in a separate process: a CUDA context in this one would hold memory that is to be measured."""
        asked = subprocess.run([sys.executable, "-c", _CARD], capture_output=True, text=True, check=False)
        if asked.returncode:
            last = (asked.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"torch finds no CUDA GPU here ({last}); --device cpu --tiny runs the same checks on toys")
        return cls(*json.loads(asked.stdout.strip().splitlines()[-1]))

    @property
    def slower(self) -> float:
        """How many times longer a check takes than on an H200."""
        return max(1.0, RATE / max(self.flops, 1.0))

    @property
    def warning(self) -> str:
        """Lines above the table."""
        if not self.computes:
            return "THIS DEVICE DOES NOT ADD 1 AND 1: no figure below that comes of arithmetic, or of time, means anything."
        return (
            f"matrix products: {self.flops / 1e12:.0f} TFLOP/s" if self.gib else "on a CPU: no figure of time means anything"
        )


_CARD = """import json, time, torch
_, total = torch.cuda.mem_get_info()
computes = bool((torch.ones(8, device="cuda") + 1 == 2).all())
a = torch.ones(4096, 4096, device="cuda", dtype=torch.float16)
for repeats in (3, 20):
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(repeats):
        a @ a
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begun) / repeats
print(json.dumps([torch.cuda.get_device_name(), total / 2**30, computes, 2 * 4096**3 / seconds]))"""


def machine_of(options: argparse.Namespace, card: Card) -> dict[str, str]:
    """Return what figures depend on: the device, the libraries, and whether the models are tiny."""
    device = f"{card.name}, {card.gib:.1f} GiB" if card.gib else card.name
    found = {"device": device, "models": "tiny" if options.tiny else "8B"}
    for name in ("lite-dil", "torch", "transformers", "peft", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def checks_of(part: str, options: argparse.Namespace) -> dict[str, Check]:
    """Return the checks of a part that were asked for, by name in the record, with those they need."""
    module = importlib.import_module(f"gpu_day_{part}")
    named = {f"{part}: {check.name}": check for check in module.CHECKS}
    asked = {key for key in named if not options.only or any(text in key for text in options.only)}
    needed = any(named[key].models for key in asked)
    return {key: check for key, check in named.items() if key in asked or (check.first and needed)}


def run_part(part: str, options: argparse.Namespace, card: Card, record: Record, argv: list[str]) -> list[str]:
    """Run a part's checks until its time is over; return the names of all of them."""
    from gpu_day_models import Place

    place, checks = Place(options), checks_of(part, options)
    if options.again:
        record.forget(checks, (PASSED, FAILED) if options.again == "all" else (FAILED,))
    record.forget(checks, (NOT_RUN, LEFT_OUT))
    record.forget([key for key, check in checks.items() if check.there and not check.there(place)], (PASSED, FAILED))
    before = sum(key in record.checks for key in checks)
    jobs = jobs_of(part, options)
    say(f"{part}: {len(checks)} checks, {before} of them done before, {jobs} at a time")
    left = {key: check for key, check in checks.items() if key not in record.checks}
    for key in [key for key, check in left.items() if check.cuda and options.device == "cpu"]:
        del left[key]
        record.end(key, NOT_RUN, reason="needs a GPU")
    Run(options, record, [sys.executable, __file__, *argv], card.slower, card.gib, jobs, say).all(left)
    return list(checks)


def jobs_of(part: str, options: argparse.Namespace) -> int:
    """Return how many checks run at once."""
    from lite_dil.base.memory import GIB, available

    if part == "speed" or options.device == "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = available() // (3 * GIB)  # a process had 1.0 to 1.5 GB resident, and files are to stay in memory
    return options.jobs or max(1, min(AT_A_TIME[part], cores // CORES_A_CHECK, room))


def work(options: argparse.Namespace) -> None:
    """Run one check in this process; write each finding as it is found, then the check's result."""
    from gpu_day_models import NotRun, Place

    key, result, limit = options.worker[0], Path(options.worker[1]), float(options.worker[2])
    faulthandler.enable()
    faulthandler.dump_traceback_later(0.9 * limit)  # says where it is, before it is stopped
    with result.open("w", encoding="utf-8") as out:

        def write(line: dict[str, Any]) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        verdicts: list[bool | None] = []
        try:
            for finding in checks_of(options.part, options)[key].run(Place(options)):
                write(asdict(finding))
                verdicts.append(finding.passed)
            write({"status": status_of(verdicts), "reason": ""})
        except NotRun as reason:
            write({"status": status_of(verdicts), "reason": str(reason)})
        except UserError as error:
            traceback.print_exc()  # into what is kept of a failed check
            write({"status": FAILED, "reason": first_line(error)})
    faulthandler.cancel_dump_traceback_later()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
