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
HEAD = """# Models

Which families of models train, on which backend. `python scripts/families` makes this page: a tiny checkpoint of each
family, in two sizes, is trained for three steps and compared with transformers' own model with eager attention and PEFT, in
float32.

- **exact**: the log-ratio of a fresh adapter is 0 and its first lsif loss -1/2; log-probs of the base and of the trained
  model, the gradient of every adapter weight, the adapter saved and loaded by PEFT, and the merged export all equal the
  independent model's, within {logps} nats per token and {gradient} of a gradient's norm. On torch the second size recomputes
  its layers (`--gradient-checkpointing full`).
- **refused**: the model is refused when it is loaded, with the reason.

*Shared prompts* says whether each prompt is computed once for both of its responses (the packed layout on torch, prefix on
MLX). The others repeat it, which costs time and memory and changes no result.

No list of families decides this. When a model is loaded, its log-probs from hidden states are compared with its own logits,
the layout that shares prompts with the plain one, and every adapted layer must get a gradient. Routers of experts get an
adapter only if `--target-modules` names them. Experts themselves get none, and stay in 16 bits under `--4bit`.
"""


def page(results: Sequence[Result], bounds: tuple[float, float]) -> str:
    """Return the page. `bounds` are the largest accepted differences, of log-probs and of gradients."""
    of = {backend: [result for result in results if result.backend == backend] for backend in PACKAGES}
    lines = [HEAD.format(logps=f"{bounds[0]:g}", gradient=f"{bounds[1]:g}")]
    for backend, packages in PACKAGES.items():
        names = sorted({result.family for result in of[backend]})
        exact = sum(all(r.status == "exact" for r in of[backend] if r.family == name) for name in names)
        versions = ", ".join(f"{package} {version(package)}" for package in packages)
        lines.append(f"{'torch' if backend == 'cpu' else 'MLX'}: {exact} of {len(names)} exact ({versions}).\n")
    lines.append(f"Python {platform.python_version()}.\n")
    lines += ["| family | torch | shared prompts | MLX | shared prompts |", "|---|---|---|---|---|"]
    reasons = []
    for name in sorted({result.family for result in results}):
        cells = []
        for backend in PACKAGES:
            found = [result for result in of[backend] if result.family == name]
            status = next((result.status for result in found if result.status != "exact"), "exact") if found else "not tried"
            layouts = {result.found["layout"] for result in found if result.found}
            cells += [status, "yes" if layouts and "plain" not in layouts else "no" if layouts else ""]
            reasons += [(name, backend, result.text) for result in found if result.status != "exact"][:1]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if reasons:
        lines += ["", "## Refused", "", "| family | backend | reason |", "|---|---|---|"]
        lines += [f"| {name} | {'torch' if backend == 'cpu' else 'MLX'} | {text} |" for name, backend, text in reasons]
    return "\n".join(lines) + "\n"
