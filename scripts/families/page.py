"""docs/models.md, made from the results."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from families.one import Result

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
PACKAGES: Mapping[str, Sequence[str]] = {"cpu": ("torch", "transformers", "peft"), "mlx": ("mlx", "mlx-lm")}
TITLES = {"cpu": "CUDA, CPU", "mlx": "MLX"}
HEAD = """# Models

Which families of models train, on CUDA and CPU (torch) and on MLX. Find yours in the table: its name is `model_type` in the
model's config.json; `_text` is the text model alone, where that has a name of its own. What is not there may train all the
same: what decides is a check when a model is loaded, not a list.

- **trains**: exactly. A tiny checkpoint of the family, {sizes}, was trained for three steps and compared with transformers'
  own model and PEFT in float32: the log-ratio of a fresh adapter is 0 and its first lsif loss -1/2; log-probs of the base and
  of the trained model, the gradient of every adapter weight, the adapter saved and loaded by PEFT, and the merged export are
  the same, within {logps} nats a token and {gradient} of a gradient's norm. Where log-probs differ by more, by no more than
  twice float32's own error (at most {rounding} nats is put down to it), the table says by how much.
- **refused**: the tiny checkpoint was refused when it was loaded, in one sentence; the reasons are below the table. A reason
  that names a setting (a window, a width) is about that checkpoint, and may not hold for yours.
- **shared prompts**: each prompt is computed once for both of its responses. Other families repeat it, which costs time and
  memory and changes no result.

## What is left out

- **Experts** of mixtures get no adapter, and stay in 16 bits under `--4bit`. Their routers get one only if `--target-modules`
  names them.
- **Mamba layers**: `out_proj` and `dt_proj` get no adapter, since GPU kernels read their weights past it.
- **Towers** for images and sound are not trained; a merged export has them unchanged.
- On MLX, layers whose weights mlx-lm holds in another form than transformers get no adapter (dense Granite 4's MLP, the first
  dense layers of LFM2-MoE). A line at the start names them. On torch, and so also on MLX, some shared experts of Laguna get
  none, since PEFT would not find them again.
- On MLX, MiniCPM 3 with a tied head and RecurrentGemma are mended at load: mlx-lm computes them otherwise than transformers.
  Plain mlx-lm does not have that, so that exports of such a MiniCPM 3 for mlx-lm are refused; `--format merged` is whole.
- With `--gradient-checkpointing full` a layer keeps only its input. It changes no result (the table's second size has it on).

## Weights that are packed already

Bases packed by GPTQ, AWQ, FP8, or bitsandbytes in 8 bits are refused, for training and for `chat`, `generate` and `export`
with an adapter. What is computed on them depends on the machine's kernels, in 8 bits even on whether gradients are computed,
so that a fresh adapter's log-ratio is not 0. Give the 16-bit model that they were made from, with `--4bit` where memory is
short. 4 bits of bitsandbytes (NF4) train as they are on CUDA and CPU, folders packed by mlx-lm on MLX, and gpt-oss' MXFP4 on
both, unpacked to 16 bits on CUDA and CPU.

## Without torch, on a Mac

MLX is compared with transformers at every load, on a small copy of the model with random weights. Without torch it is compared
with figures of a small model of the same family that come with the package (`backends/families.json`, made by
`python scripts/families --figures`). Settings in which yours differs are named, and so is a family without figures.
`pip install torch` gives the whole comparison.

## The table

Made by `python scripts/families` (`--quick` runs one size and prints it only).
"""


def page(results: Sequence[Result], bounds: tuple[float, float, float]) -> str:
    """Return the page.

    Args:
        bounds: the largest accepted differences, of log-probs and of gradients, and what of the first is put down to float32.
    """
    of = {backend: [result for result in results if result.backend == backend] for backend in PACKAGES}
    sizes = "in two sizes" if any(result.size == 2 for result in results) else "in one size"
    lines = [HEAD.format(logps=f"{bounds[0]:g}", gradient=f"{bounds[1]:g}", rounding=f"{bounds[2]:g}", sizes=sizes)]
    for backend, packages in PACKAGES.items():
        names = sorted({result.family for result in of[backend]})
        exact = sum(all(r.status == "exact" for r in of[backend] if r.family == name) for name in names)
        versions = ", ".join(f"{package} {version(package)}" for package in packages)
        both = sum(any(r.size == 2 for r in of[backend] if r.family == name) for name in names)
        lines.append(f"- {TITLES[backend]}: {exact} of {len(names)} train, {both} were tried in two sizes ({versions}).")
    lines += [f"- Python {platform.python_version()}.", ""]
    lines += ["| family | CUDA, CPU | shared prompts | MLX | shared prompts |", "|---|---|---|---|---|"]
    reasons = []
    for name in sorted({result.family for result in results}):
        cells = []
        for backend in PACKAGES:
            found = [result for result in of[backend] if result.family == name]
            status = next((result.status for result in found if result.status != "exact"), "trains") if found else "not tried"
            layouts = {result.found["layout"] for result in found if result.found}
            rounding = max((result.found.get("rounding", 0.0) for result in found if result.found), default=0.0)
            if status == "trains" and rounding:
                status += f" (rounding: {_furthest(found):.1g})"
            cells += [status, "yes" if layouts and "plain" not in layouts else "no" if layouts else ""]
            reasons += [(name, backend, result.text) for result in found if result.status != "exact"][:1]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if reasons:
        lines += ["", "## Refused", "", "| family | on | reason and way out |", "|---|---|---|"]
        lines += [f"| {name} | {TITLES[backend]} | {text.replace('--model MODEL: ', '')} |" for name, backend, text in reasons]
    return "\n".join(lines) + "\n"


def _furthest(results: Sequence[Result]) -> float:
    """Return the largest difference of a log-prob."""
    return max(result.found[name] for result in results if result.found for name in ("logps", "reloaded", "merged"))
