"""Rehearse the CUDA backend on a machine without a GPU: a CUDA build of torch on a stand-in card that computes nothing.

    make rehearse-cuda                                        # everything, in a separate environment
    .venv-cuda/bin/python scripts/rehearse_cuda train memory  # some parts: train, attention, out-of-memory, memory, fallbacks
    .venv-cuda/bin/python scripts/rehearse_cuda attention --all --only sm_75   # the full attention table, or part of it
    .venv-cuda/bin/python scripts/rehearse_cuda --table                        # print what is done of it

Allocators, streams, autograd's threads, Inductor, Triton, ptxas and a card's limits are real; kernels and products do
nothing, and read back as zeros. So it shows what is placed, allocated, compiled, refused and undone, and the memory
needed. It cannot show values or speed.

Prints one line per case, keeps each result in --output, and repeats only what failed there or was made by other sources. The
exit status is 1 if a case failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # scripts/, where this package and other scripts are

from rehearse_cuda.cases import PARTS, Case, cases
from rehearse_cuda.results import ROOT, Result, Results, heading, line, summary
from rehearse_cuda.stand_in import build, clean, environment
from rehearse_cuda.table import attention_table

from lite_dil.base.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run cases; return 0, 1 if one failed, 2 for user errors, 130 if stopped."""
    args = _parser().parse_args(argv)
    wanted = [
        case for case in cases(tuple(args.parts) or PARTS, args.all) if args.only in f"{case.part} sm_{case.card} {case.name}"
    ]
    if args.list:
        print("\n".join(case.title for case in wanted))
        return 0
    if args.table:
        print(attention_table(Results(args.output / "results")))
        return 0
    try:
        if not wanted:
            raise UserError(f"--only {args.only!r}: no case has this in its part, card or name; --list shows them")
        found = _run_all(wanted, args.output.resolve(), args.jobs, args.limit)
    except UserError as error:
        print(f"rehearse_cuda: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rehearse_cuda: stopped; the same command continues", file=sys.stderr)
        return 130
    print(summary(found))
    return 0 if all(result.ok for result in found) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "rehearse_cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--all", action="store_true", help="attention: the full table of widths, windows, caps and types")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their part, card or name")
    parser.add_argument("--list", action="store_true", help="print the cases and run none")
    parser.add_argument("--table", action="store_true", help="print the results of `attention --all` so far, and run none")
    parser.add_argument("--jobs", type=int, default=2, help="cases at once, each on one or two cores with 2 GB (default: 2)")
    parser.add_argument("--limit", type=int, default=900, help="maximum seconds per case (default: 900)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "rehearse_cuda", help="folder for results and caches")
    return parser


def _run_all(wanted: Sequence[Case], output: Path, jobs: int, limit: int) -> list[Result]:
    """Run the cases, a few at once, and print their lines in order."""
    library, results = build(output), Results(output / "results")
    print(heading(), flush=True)
    found = []
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        kept = {case.key: results.passed(case) for case in wanted}
        started = [None if kept[case.key] else pool.submit(run, case, library, output, limit) for case in wanted]
        try:
            for case, future in zip(wanted, started, strict=True):
                result = kept[case.key] or (future.result() if future else None)
                assert result is not None
                print(line(case, result, before=kept[case.key] is not None), flush=True)
                results.keep(case, result)
                found.append(result)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def run(case: Case, library: Path, output: Path, limit: int) -> Result:
    """Run a case in a separate process."""
    folder = output / "cases" / case.key
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run's
    folder.mkdir(parents=True)
    files = folder / "case.json", folder / "result.json"
    files[0].write_text(json.dumps(asdict(case)), encoding="utf-8")
    env = clean(os.environ) | environment(library, output / "caches", case.card, case.gib, case.lag)
    command = [sys.executable, str(Path(__file__).parent / "run_case.py"), str(files[0]), str(folder), str(files[1])]
    began, log = time.perf_counter(), folder / "log.txt"
    with log.open("w", encoding="utf-8") as out:
        try:
            code = subprocess.run(command, env=env, stdout=out, stderr=out, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return Result(False, f"not done after {limit} s; {log}", {}, limit)
    seconds = round(time.perf_counter() - began, 1)
    if files[1].exists():
        return Result(**json.loads(files[1].read_text(encoding="utf-8")), seconds=seconds)
    said = log.read_text(encoding="utf-8", errors="replace")
    return Result(False, f"ended with {code}: {last_error(said)[:160]} ({log.relative_to(output)})", {}, seconds)


def last_error(text: str) -> str:
    """Return the last line of an exception in a traceback, or the last line of the output."""
    lines = [one.strip() for one in text.splitlines() if one.strip()] or ["no output"]
    return next((one for one in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Unsupported)\b", one)), lines[-1])


if __name__ == "__main__":
    sys.exit(main())
