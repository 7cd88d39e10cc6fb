"""Compare lite-dil with other current libraries on this machine, on the same pairs.

python scripts/benchmark.py --quick                  # under 10 minutes on two CPU cores
python scripts/benchmark.py                          # everything: more pairs, more cases, three repeats
python scripts/benchmark.py --case hh --batch 8 --bits 4 --contestant lite-dil trl --json out.json
python scripts/benchmark.py --gpu                    # a Llama-3.1-8B shape in NF4: pairs/s, memory, the longest pair
python scripts/benchmark.py --gpu --device cpu --tiny   # the same code on a toy, to check that it runs

To install the others: pip install -c constraints.txt trl datasets; pip install --no-deps mlx-lm-lora; on a GPU unsloth, in an
separate environment: --python unsloth=FOLDER/bin/python. The table says what is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import benchmark_cases as cases
import benchmark_models as models
from benchmark_cases import CASES, Job
from benchmark_worker import CONTESTANTS

Result = dict[str, Any]

CAPTION = """Each figure is from fresh processes. A step is forward, backward and optimiser; pairs/s counts steps only.
here/there: pairs/s of the fastest lite-dil that also computes the reference (its first epoch), divided by theirs.
memory MB: peak above the loaded model, adapter and optimiser; in brackets lite-dil's divided by it, with equal checkpointing.
of peak: the operations these pairs need (each prompt once, no padding), divided by the measured matrix-product rate.
lite-dil trains {loss}, the others dpo.
{notes}"""


def main(argv: list[str]) -> int:
    if argv[:1] == ["_run"]:  # a fresh process of one measurement
        from benchmark_worker import measure

        Path(argv[2]).write_text(json.dumps(measure(Job.read(Path(argv[1]).read_text()))))
        return 0
    if argv[:1] == ["_make"]:  # in another process, so that CUDA's context does not stay in this one
        models.make_llama(Path(argv[1]), json.loads(argv[2]), nf4=True, device=argv[3])
        return 0
    options = parse(argv)
    jobs = gpu_jobs(options) if options.gpu else cpu_jobs(options)
    jobs = [job for job in jobs if not options.contestant or job.contestant in (*options.contestant, "matmul")]
    if all(job.contestant == "matmul" for job in jobs):
        print("nothing to run: no such contestant in these cases", file=sys.stderr)
        return 2
    results: dict[str, list[Result]] = {job.key: [] for job in jobs}
    for repeat in range(options.repeats):  # A B A B, so that a machine that slows down slows everyone
        for number, job in enumerate(jobs, 1):
            before = results[job.key]
            if before and before[-1]["status"] != "ok":
                continue
            named = f"{job.case} {job.contestant} batch {job.batch} {job.bits}-bit checkpointing {job.checkpointing}"
            print(f"[{repeat + 1}/{options.repeats} {number}/{len(jobs)}] {named}", file=sys.stderr, flush=True)
            before.append(run(job, options))
            print(f"    {brief(before[-1])}", file=sys.stderr, flush=True)
    rows = [summary(job, results[job.key], jobs, results) for job in jobs]
    if options.json:
        machine = {"platform": platform.platform(), "processor": processor(), "threads": options.threads}
        Path(options.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1), encoding="utf-8")
    show(rows, options)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="contestants: " + "; ".join(f"{name}: {who.about}" for name, who in CONTESTANTS.items()),
    )
    parser.add_argument("--quick", action="store_true", help="few pairs, only the main cases, one repeat")
    parser.add_argument(
        "--case", nargs="+", choices=CASES, help="; ".join(f"{name}: {about}" for name, about in CASES.items())
    )
    parser.add_argument("--contestant", nargs="+", choices=CONTESTANTS, metavar="NAME", help="default: all of the case")
    parser.add_argument(
        "--batch", nargs="+", type=int, metavar="PAIRS", help="pairs per step (default: 1 and 8 for hh, else 4)"
    )
    parser.add_argument("--bits", nargs="+", type=int, choices=(4, 16), help="bits of the frozen weights (default: 16)")
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "selective", "full"), help="default: off and full")
    parser.add_argument("--pairs", type=int, help="timed pairs per round (default: 24; 64 on MLX; with --quick one batch)")
    parser.add_argument("--rounds", type=int, help="passes over the pairs in a process (default: 1; 3 on MLX)")
    parser.add_argument("--repeats", type=int, help="fresh processes per contestant, interleaved (default: 3; with --quick 1)")
    parser.add_argument("--loss", default="lsif", help="lite-dil's objective; the cost is the same for all (default: lsif)")
    parser.add_argument("--model", metavar="FOLDER", help="default: the embedded 135M model; on MLX a tiny one made here")
    parser.add_argument(
        "--data", metavar="FILE", help="use the lengths of this preference data for hh instead of the built-in list"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads per process (default: all cores)")
    parser.add_argument("--timeout", type=int, default=3600, metavar="SECONDS", help="limit for one process (default: 3600)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the torch cases")
    parser.add_argument(
        "--python", nargs="+", default=[], metavar="NAME=PATH", help="a different interpreter for a contestant"
    )
    parser.add_argument("--json", metavar="FILE", help="write all measurements to this file")
    parser.add_argument("--gpu", action="store_true", help="a Llama-3.1-8B shape with random NF4 weights on one GPU")
    parser.add_argument("--tokens", nargs="+", type=int, help="with --gpu: tokens per sequence, half of them the prompt")
    parser.add_argument("--limit", nargs="+", type=float, metavar="GB", help="with --gpu: memory limits for the longest pair")
    parser.add_argument("--head-bits", type=int, choices=(4, 8), help="with --gpu: quantise lite-dil-lean's head")
    parser.add_argument("--tiny", action="store_true", help="with --gpu: a toy model and short pairs")
    parser.add_argument("--folder", metavar="FOLDER", help="folder for generated models (default: the cache folder)")
    options = parser.parse_args(argv)
    options.repeats = options.repeats or (1 if options.quick or options.gpu else 3)
    options.python = dict(pair.split("=", 1) for pair in options.python)
    unknown = sorted(set(options.python) - set(CONTESTANTS))
    if unknown:
        parser.error(f"--python {unknown[0]}: no such contestant; expected {', '.join(CONTESTANTS)}")
    return options


def cpu_jobs(options: argparse.Namespace) -> list[Job]:
    """Return the measurements of a run without --gpu: the embedded model with torch, a tiny one with MLX."""
    from lite_dil.models.find import EMBEDDED_MODEL, resolve_model

    jobs: list[Job] = []
    device = on_device(options)
    wanted = options.case or (list(CASES) if find_spec("torch") else ["mlx"])
    model = resolve_model(options.model or EMBEDDED_MODEL) if set(wanted) - {"mlx"} else ""
    data = cases.lengths_in(options.data, model) if options.data and model else []
    for case in (case for case in wanted if case != "mlx"):
        batches = options.batch or ([8] if options.quick and case == "hh" else [1, 8] if case == "hh" else [4])
        for batch in batches:
            for bits in options.bits or [16]:
                pairs = options.pairs or (max(batch, 4) if options.quick else 24)
                lengths = cases.lengths_of(case, -(-pairs // batch) * batch, data)
                job = Job(case, "", device, model, lengths, batch, bits, rounds=options.rounds or 1, loss=options.loss)
                if device == "cuda":
                    job = replace(job, warmup="full", rounds=options.rounds or 3)
                jobs += torch_jobs(job, options)
    if device == "cpu" or options.case:
        jobs += mlx_jobs(options, data) if "mlx" in wanted else []
    return with_matmul(jobs)


def torch_jobs(job: Job, options: argparse.Namespace) -> list[Job]:
    modes = options.checkpointing or ["off", "full"]
    chosen = [("lite-dil", mode) for mode in modes]
    if "off" in modes:
        chosen += [("lite-dil-cached", "off"), ("lite-dil-plain", "off")]
    if "full" in modes:
        chosen += [("trl", "full")]
    chosen += [("trl-best", mode) for mode in modes if mode != "selective"]
    if options.quick:
        skipped = {("trl-best", "full")} | ({("lite-dil-plain", "off")} if job.case != "hh" else set())
        chosen = [one for one in chosen if one not in skipped]
    elif job.case == "hh" and job.batch > 1 and "off" in modes:
        chosen += [("trl-sorted", "off")]
    if "full" in modes and (job.device == "cuda" or (job.case == "hh" and job.batch > 1)):  # elsewhere a row gives the reason
        chosen += [("unsloth", "full"), ("unsloth-best", "full")]
    return [replace(job, contestant=name, checkpointing=mode) for name, mode in chosen]


def mlx_jobs(options: argparse.Namespace, data: Any) -> list[Job]:
    batch = (options.batch or [8])[0]
    pairs = options.pairs or (2 * batch if options.quick else 64)
    from lite_dil.models.find import resolve_model

    tiny = models_folder(options) / "benchmark-tiny"
    folder = resolve_model(options.model) if options.model else models.make_llama(tiny, models.TINY, nf4=False)
    lengths = cases.lengths_of("mlx", -(-pairs // batch) * batch, data)
    job = Job("mlx", "", "mlx", folder, lengths, batch, rounds=options.rounds or (2 if options.quick else 3), warmup="full")
    modes = options.checkpointing or ["off"]
    names = ["lite-dil", "lite-dil-cached", "lite-dil-plain", "mlx-lm-lora", "two-models", "unsloth-mlx"]
    return [replace(job, contestant=name, checkpointing=mode, loss=options.loss) for mode in modes for name in names]


def gpu_jobs(options: argparse.Namespace) -> list[Job]:
    """Return the measurements on a large model: pairs/s and memory by length, and the longest pair under limits."""
    device = on_device(options)
    if device == "cpu" and not options.tiny:
        raise SystemExit("--gpu needs a CUDA GPU; --gpu --device cpu --tiny tests the code on a toy")
    shape, name = (models.TINY, "benchmark-tiny-nf4") if options.tiny else (models.LLAMA_8B, "benchmark-llama-8b-nf4")
    folder = str(models_folder(options) / name)
    made = subprocess.run(
        [sys.executable, __file__, "_make", folder, json.dumps(shape), device], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise SystemExit(f"--gpu: the model could not be made in {folder}: {made.stderr.strip().splitlines()[-1]}")
    jobs = []
    for tokens in options.tokens or ([64, 128] if options.tiny else [1024, 2048, 4096, 8192]):
        half = (tokens // 2, tokens - tokens // 2, tokens - tokens // 2)
        rounds = options.rounds or (1 if options.tiny else 5)
        job = Job(f"2 x {tokens}", "", device, folder, (half,), 1, 4, "full", rounds, "full", head_bits=None)
        names = ["lite-dil", "lite-dil-cached", "lite-dil-lean", "trl", "trl-best", "unsloth", "unsloth-best"]
        for contestant in names:
            bits = options.head_bits if contestant == "lite-dil-lean" else None
            jobs.append(replace(job, contestant=contestant, head_bits=bits))
    cap = 128 if options.tiny else 131072
    for limit in options.limit or ([6.0] if options.tiny else [6.0, 8.0, 12.0, 16.0, 24.0]):
        half = (32, 32, 32)
        search = Job("longest", "lite-dil-lean", device, folder, (half,), 1, 4, "full", memory_limit=limit, longest=True)
        jobs.append(replace(search, longest_cap=cap, head_bits=options.head_bits))
    return with_matmul(jobs)


def with_matmul(jobs: list[Job]) -> list[Job]:
    """Prepend one measurement of the matrix-product rate for each model and device."""
    rates = dict.fromkeys(Job("matmul", "matmul", job.device, job.model, ((1, 1, 1),), 1) for job in jobs)
    return [*rates, *jobs]


def on_device(options: argparse.Namespace) -> str:
    if options.device != "auto":
        return options.device
    if not find_spec("torch"):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def models_folder(options: argparse.Namespace) -> Path:
    from lite_dil.models.find import cache_dir

    return Path(options.folder) if options.folder else cache_dir()


def run(job: Job, options: argparse.Namespace) -> Result:
    """Measure in a fresh process; any outcome becomes a row of the table."""
    threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    python = options.python.get(job.contestant, sys.executable)
    if python != sys.executable:
        quiet["PYTHONPATH"] = str(Path(__file__).parent.parent)  # which may not have lite-dil installed
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        asked, answer, log = (Path(folder) / name for name in ("job.json", "result.json", "log"))
        asked.write_text(job.key, encoding="utf-8")
        command = [python, __file__, "_run", str(asked), str(answer)]
        with log.open("w") as out:
            try:
                code = subprocess.run(
                    command,
                    stdout=out,
                    stderr=out,
                    timeout=options.timeout,
                    env={**os.environ, **quiet, **threads},
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                return {"status": "failed", "reason": f"not done after {options.timeout} s"}
        if not answer.is_file():
            lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
            killed = "killed, perhaps out of memory: " if code < 0 else ""
            return {"status": "failed", "reason": f"{killed}{lines[-1]}", "log": "\n".join(lines)[-4000:]}
        result = json.loads(answer.read_text())
    return {**result, "process_seconds": time.perf_counter() - start}


def brief(result: Result) -> str:
    if "pairs_per_second" in result:
        above = (result["peak_bytes"] - result["base_bytes"]) / 1e6
        return f"{result['pairs_per_second']:.3f} pairs/s, {above:.0f} MB, {result['process_seconds']:.0f} s"
    if result["status"] == "ok":
        return ", ".join(f"{name} {result[name]:.4g}" for name in ("flops", "longest") if name in result)
    return f"{result['status']}: {result['reason']}"


def summary(job: Job, own: list[Result], jobs: list[Job], results: dict[str, list[Result]]) -> Result:
    """Return a row: medians over the repeats, and ratios to lite-dil's in the same group."""
    good = [result for result in own if result["status"] == "ok"]
    who = CONTESTANTS[job.contestant]
    row: Result = {
        **{
            name: getattr(job, name)
            for name in ("case", "contestant", "device", "batch", "bits", "checkpointing", "memory_limit")
        },
        "pairs": len(job.lengths),
        "tokens": sum(map(sum, job.lengths)),
        "reference_pass": who.reference_pass,
        "measured": own,
    }
    if len(good) < len(own) or not good:
        return {**row, "status": own[-1]["status"], "reason": own[-1]["reason"]}
    row |= {"status": "ok", "description": good[-1].get("description", "")}
    row |= {name: median(r[name] for r in good) for name in ("flops", "longest", "prepare_seconds") if name in good[0]}
    if "pairs_per_second" not in good[0]:
        return row
    row["pairs_per_second"] = median(r["pairs_per_second"] for r in good)
    row["memory_mb"] = median(r["peak_bytes"] - r["base_bytes"] for r in good) / 1e6
    row["peak_mb"] = median(r["peak_bytes"] for r in good) / 1e6
    needed = cases.operations(cases.read_config(job.model), job.lengths, job.rank, who.reference_pass)
    row["gflop_per_pair"] = needed / 1e9
    rates = [r for other in jobs if other.contestant == "matmul" and (other.device, other.model) == (job.device, job.model)
             for r in results[other.key] if r["status"] == "ok"]  # fmt: skip
    if rates:
        row["of_peak"] = needed * row["pairs_per_second"] / median(r["flops"] for r in rates)
    ours = [(o, results[o.key]) for o in jobs if o.group == job.group and o.contestant == "lite-dil"]
    done = [(o, [r for r in rs if "pairs_per_second" in r]) for o, rs in ours]
    done = [(o, rs) for o, rs in done if rs]
    if done:
        best = max(median(r["pairs_per_second"] for r in rs) for _, rs in done)
        row["speed_ratio"] = best / row["pairs_per_second"]
    same = [rs for o, rs in done if o.checkpointing == job.checkpointing]
    if same and row["memory_mb"] > 0:
        row["memory_ratio"] = median(r["peak_bytes"] - r["base_bytes"] for r in same[0]) / 1e6 / row["memory_mb"]
    return row


def show(rows: list[Result], options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"lite-dil side by side, {processor()}, {options.threads} thread{'s' * (options.threads > 1)}",
        title_justify="left",
    )
    for column in ("case", "contestant", "checkpointing"):
        table.add_column(column, no_wrap=True)
    for column in ("pairs/s", "here/there", "memory MB", "of peak"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what it is")
    last: Any = None
    for row in rows:
        if row["case"] == "matmul":
            continue
        group = (row["case"], row["batch"], row["bits"], row["memory_limit"])
        if last is not None and group != last:
            table.add_section()
        first, last = group != last, group
        limit = f", {row['memory_limit']:g} GB" if row["memory_limit"] else ""
        named = f"{row['case']}, {row['batch']} pair{'s' * (row['batch'] > 1)}, {row['bits']}-bit{limit}" if first else ""
        table.add_row(named, row["contestant"], row["checkpointing"], *figures(row, options))
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(table)
    console.print(CAPTION.format(loss=options.loss, notes="\n".join(notes(rows, options))), style="dim", highlight=False)


def figures(row: Result, options: argparse.Namespace) -> Iterable[str]:
    if row["status"] != "ok":
        return "-", "-", "-", "-", f"{row['status']}: {row['reason']}"
    if "longest" in row:
        return "-", "-", "-", "-", f"longest pair: 2 x {row['longest']:.0f} tokens, half of them the prompt"
    ratio = f"{row['speed_ratio']:.2f}x" if "speed_ratio" in row else "-"
    share = f" ({row['memory_ratio']:.2f})" if "memory_ratio" in row else ""
    memory = f"{row['memory_mb']:.0f}{share}"
    if options.gpu:
        memory += f", all told {row['peak_mb']:.0f}"
    peak = f"{100 * row['of_peak']:.0f} %" if "of_peak" in row else "-"
    about = CONTESTANTS[row["contestant"]].about
    return f"{row['pairs_per_second']:.3f}", ratio, memory, peak, f"{about} [{row['description']}]".replace("[", "\\[")


def notes(rows: list[Result], options: argparse.Namespace) -> Iterable[str]:
    for row in rows:
        if "flops" in row:
            yield f"Matrix products on {row['device']}: {row['flops'] / 1e9:.0f} GFLOP/s ({row['description']})."
    if not options.gpu and not options.data:
        yield "HH: 64 pairs whose lengths are typical of HH helpful, in one order for everyone."
    if options.quick:
        yield (
            "Quick: one step per contestant is timed (more on MLX), after a warm-up step of tiny pairs, because TRL's "
            "defaults take about a minute per step on two cores; quote only figures from a run without --quick."
        )
    if any(row["contestant"].startswith("trl-") for row in rows):
        yield "trl-best, trl-sorted and lite-dil-cached compute the reference before the clock starts."


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
