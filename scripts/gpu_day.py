"""A day with a card: whether training on this GPU is right, what memory it takes, and how fast it is.

    python scripts/gpu_day.py                                   # all three parts, at most six minutes each
    python scripts/gpu_day.py correctness                       # or memory, or speed
    python scripts/gpu_day.py correctness --device cpu --tiny   # the same checks on toys, to see that they run

Called again it goes on where it was: what passed or failed before is not repeated (--again: all; --again failed: those). A
model of the shape of Llama 3.1 8B is made on the card, a layer at a time, of random weights in 4 bits; nothing is downloaded.
Needs what `pip install -e ".[cuda]"` installs; trl, datasets, liger-kernel and unsloth are measured too where they are.
Exit code: 1 where a check failed, 2 for errors.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gpu_day_record import FAILED, LEFT_OUT, NOT_RUN, PASSED, Check, Record, status_of, table

from lite_dil.base.errors import UserError, first_line
from lite_dil.base.start import quiet_bars, start

PARTS = ("correctness", "memory", "speed")
PATIENCE = 5  # a check may take so many times what it is said to take, and at least LEAST seconds
LEAST = 120.0
TIME_UP = "not done when the part's time was up"


def main(argv: list[str] | None = None) -> int:
    """Run the parts and print the table; return 0, 1 where a check failed, 2 for errors."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    try:
        start(training=True)
        if options.worker:
            work(options)
            return 0
        record = Record.open(Path(options.json), machine_of(options))
        shown: list[str] = []
        for part in [options.part] if options.part else PARTS:
            shown += run_part(part, options, record, argv if options.part else [part, *argv])
    except UserError as error:
        print(f"gpu_day: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu_day: stopped; the same command goes on", file=sys.stderr)
        return 130
    print(", ".join(f"{name} {value}" for name, value in record.machine.items()))
    print(table(record, shown))
    return 1 if any(record.checks.get(key, {}).get("status") == FAILED for key in shown) else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_day.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=PARTS, help="default: all three")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and short pairs")
    parser.add_argument(
        "--minutes", type=float, default=6.0, help="for each part; what no longer fits is left out (default: 6)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="the checks whose names have one of these in them"
    )
    parser.add_argument("--again", nargs="?", const="all", choices=("all", "failed"), help="repeat what was done before")
    parser.add_argument(
        "--json", default="gpu_day.json", metavar="FILE", help="what came of the checks (default: gpu_day.json)"
    )
    parser.add_argument("--folder", metavar="FOLDER", help="where models that are made are kept (default: the cache folder)")
    parser.add_argument("--python", nargs="+", default=[], metavar="NAME=PATH", help="speed: another interpreter for a peer")
    parser.add_argument("--worker", type=float, metavar="UNTIL", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu is for --tiny: what a GPU takes seconds for would take hours")
    if any("=" not in pair for pair in options.python):
        parser.error("--python: expected NAME=PATH, as unsloth-best=FOLDER/bin/python")
    return options


def machine_of(options: argparse.Namespace) -> dict[str, str]:
    """Return what figures depend on: the device, the libraries, and whether the models are tiny."""
    found = {"device": "CPU", "models": "tiny" if options.tiny else "8B"}
    for name in ("lite-dil", "torch", "transformers", "peft", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    if options.device == "cuda":  # asked in a process of its own: a context here would hold memory that is to be measured
        asked = subprocess.run([sys.executable, "-c", _CARD], capture_output=True, text=True, check=False)
        if asked.returncode:
            raise UserError("torch finds no CUDA GPU here; --device cpu --tiny runs the same checks on toys")
        found["device"] = asked.stdout.strip()
    return found


_CARD = """import torch
_, total = torch.cuda.mem_get_info()
print(f"{torch.cuda.get_device_name()}, {total / 2**30:.1f} GiB")"""


def checks_of(part: str, options: argparse.Namespace) -> dict[str, Check]:
    """Return a part's checks that are asked for, by their names in the record."""
    module = importlib.import_module(f"gpu_day_{part}")
    named = {f"{part}: {check.name}": check for check in module.CHECKS}
    return {key: check for key, check in named.items() if not options.only or any(text in key for text in options.only)}


def run_part(part: str, options: argparse.Namespace, record: Record, argv: list[str]) -> list[str]:
    """Run a part's checks, in processes of their own, until its time is over; return the names of all of them."""
    until, record.running = time.time() + 60 * options.minutes, None
    checks = checks_of(part, options)
    if options.again:
        record.forget(list(checks), (PASSED, FAILED) if options.again == "all" else (FAILED,))
    record.forget(list(checks), (NOT_RUN, LEFT_OUT))
    before = sum(key in record.checks for key in checks)
    say(f"{part}: {len(checks)} checks, {before} of them done before")
    for key, check in checks.items():
        if key not in record.checks and check.cuda and options.device == "cpu":
            record.end(key, NOT_RUN, reason="needs a GPU")
    while left := [key for key in checks if key not in record.checks]:
        if time.time() > until:
            for key in left:
                record.end(key, LEFT_OUT, reason="no time was left")
            break
        supervise(argv, record, checks, until)
        if left == [key for key in checks if key not in record.checks]:
            raise UserError(f"{part}: the process of the checks does nothing; see {log_of(record)}")
    return list(checks)


def supervise(argv: list[str], record: Record, checks: dict[str, Check], until: float) -> None:
    """Start a process that runs checks, and watch it: what ends it, or takes too long, is that check's failure."""
    log, shown = log_of(record), len(record.checks)
    command = [sys.executable, __file__, *argv, "--worker", str(until)]
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        cut = ""
        try:
            while process.poll() is None and not cut:
                time.sleep(0.2)
                record.read()
                shown = tell(record, shown)
                cut = overdue(record, checks, until)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it started itself
            process.wait()
    record.read()
    shown = tell(record, shown)
    if record.running:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
        reason = cut or f"its process ended with code {process.returncode}: {lines[-1]}"
        record.end(record.running["check"], LEFT_OUT if cut == TIME_UP else FAILED, reason=reason)
        tell(record, shown)
    elif process.returncode:
        raise UserError(f"the process of the checks ended with code {process.returncode}; see {log}")


def overdue(record: Record, checks: dict[str, Check], until: float) -> str:
    """Return why the running check is to be stopped, or nothing."""
    if record.running is None:
        return ""
    limit = max(LEAST, PATIENCE * checks[record.running["check"]].seconds)
    if time.time() - record.running["since"] > limit:
        return f"not done after {limit:.0f} s"
    return TIME_UP if time.time() > until else ""


def tell(record: Record, shown: int) -> int:
    """Say what came of the checks after the first `shown`; return how many there are."""
    for key in list(record.checks)[shown:]:
        found = record.checks[key]
        say(f"  {key}: {found['status']}, {found['seconds']:.0f} s {found['reason']}".rstrip())
    return len(record.checks)


def work(options: argparse.Namespace) -> None:
    """Run the checks that have no result yet, in this process; one that is to be alone ends it."""
    from gpu_day_models import NotRun, Place

    quiet_bars()
    place, ran, record = Place(options), 0, Record(Path(options.json), {})
    record.read()
    for key, check in checks_of(options.part, options).items():
        if key in record.checks:
            continue
        if check.alone and ran:
            return
        needed, left = place.needs(check.seconds), options.worker - time.time()
        if left < needed:
            record.end(key, LEFT_OUT, reason=f"needs about {needed:.0f} s, and {max(0.0, left):.0f} s are left")
            continue
        record.begin(key)
        try:
            findings = check.run(place)
            record.end(key, status_of(findings), findings)
        except NotRun as reason:
            record.end(key, NOT_RUN, reason=str(reason))
        except UserError as error:
            record.end(key, FAILED, reason=first_line(error))
        ran += 1
        if check.alone:
            return


def log_of(record: Record) -> Path:
    """Return where the processes of the checks write what they say."""
    return record.path.with_suffix(".log")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
