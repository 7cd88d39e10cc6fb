"""Train a tiny checkpoint of every model family on both backends, compare it with an independent model, and make a table.

    python scripts/families                       # everything, two sizes of each family, written to docs/models.md
    python scripts/families --quick               # one size, printed only
    python scripts/families gemma4_text glm --backend mlx   # some, printed only

A family is exact if a fresh adapter's log-ratio is 0 and its first loss -1/2, log-probs and gradients equal those of
transformers and PEFT, and the saved adapter and the merged export give the same log-probs. Otherwise the model must be refused
with the reason. The exit status is 1 if one is wrong or ends in a traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # scripts/, where this package and other scripts are
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors; --jobs share the cores
os.environ["HF_HUB_OFFLINE"] = "1"

from families.figures import write_figures
from families.one import Result, run, server
from families.page import PAGE, page
from families.zoo import NAMES

BACKENDS = ("cpu", "mlx")
_STATUSES = ("exact", "refused", "wrong", "error")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("families", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="rows of the table (default: all); --list shows them")
    parser.add_argument("--list", action="store_true", help="print the names and run none")
    parser.add_argument("--backend", choices=BACKENDS, help="one backend (default: both)")
    parser.add_argument("--quick", action="store_true", help="one size of each family instead of two")
    parser.add_argument("--jobs", type=int, default=2, help="families at once (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep figures in FILE; what it has already is not run again")
    parser.add_argument("--figures", action="store_true", help="only write the figures that come with the package")
    args = parser.parse_args(argv)
    if args.figures:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{write_figures(Path(folder))} families")
        return 0
    if args.list:
        print("\n".join(NAMES))
        return 0
    if unknown := set(args.families) - set(NAMES):
        parser.error(f"no such families: {', '.join(sorted(unknown))}; --list shows them")
    backends = (args.backend,) if args.backend else BACKENDS
    jobs = [
        (family, backend, size)
        for size in ((1,) if args.quick else (1, 2))
        for family in args.families or NAMES
        for backend in backends
    ]
    context, results = server(), []
    kept = _kept(args.json) if args.json and args.json.exists() else {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        for result in pool.map(lambda job: kept.get(job) or run(context, Path(folder), *job), jobs):
            results.append(result)
            kept[result.family, result.backend, result.size] = result
            print(_line(result), flush=True)
            if args.json:
                args.json.write_text(json.dumps([asdict(one) for one in kept.values()], indent=1), encoding="utf-8")
    if not args.families and not args.backend and not args.quick:
        from families.exact import GRADIENT, LOGPS, ROUNDING

        bounds = max(LOGPS.values()), max(GRADIENT.values()), ROUNDING
        PAGE.write_text(page(results, bounds), encoding="utf-8")
        print(f"written: {PAGE}")
    print(_summary(results))
    return 0 if all(result.ok for result in results) else 1


def _kept(file: Path) -> dict[tuple[str, str, int], Result]:
    found = [Result(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
    return {(one.family, one.backend, one.size): one for one in found}


def _line(result: Result) -> str:
    figures = result.found
    text = result.text or (
        f"{figures['layout']}: log-probs {figures['logps']:.1e}, gradients {figures['gradient']:.1e}, "
        f"saved {figures['reloaded']:.1e}, merged {figures['merged']:.1e}"
        + (f", rounding widened the bound by {figures['rounding']:.1e}" if figures.get("rounding") else "")
    )
    return f"{result.family:24} {result.size} {result.backend:4} {result.status:8} {text}"


def _summary(results: Sequence[Result]) -> str:
    counts = {
        backend: {status: sum(r.backend == backend and r.status == status for r in results) for status in _STATUSES}
        for backend in BACKENDS
    }
    return "\n".join(f"{backend}: " + ", ".join(f"{n} {s}" for s, n in found.items()) for backend, found in counts.items())


if __name__ == "__main__":
    sys.exit(main())
