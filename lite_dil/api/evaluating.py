"""Evaluating adapters beside their base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lite_dil.api.notebook import display_of
from lite_dil.base.display import Display
from lite_dil.base.errors import UserError, did_you_mean
from lite_dil.base.start import start
from lite_dil.data.prompts import FLAGS
from lite_dil.models.options import MODEL_FIELDS
from lite_dil.recipes import evaluation
from lite_dil.recipes.evaluation import Evaluated, EvaluationRequest

_KNOWN = (*MODEL_FIELDS, *FLAGS)


def evaluate(
    *adapters: str | Path,
    tasks: str = "",
    preferences: str = "",
    limit: int | None = None,
    shots: int | None = None,
    template: str | None = None,
    strength: float = 1.0,
    samples: int | None = None,
    sample_tokens: int | None = None,
    seed: int | None = None,
    output_dir: str | Path | None = None,
    store: str | Path | None = None,
    display: Display | None = None,
    **options: Any,
) -> Evaluated:
    """Measure adapters beside their base, on benchmarks and preferences; answers to benchmarks are kept for the next call.

    Args:
        *adapters: runs, checkpoints or adapters' folders, all on one base; without any, the bare `model` of the options.
        tasks: comma-separated: names of lm-eval, its FILE.yaml, FILE.jsonl with question, choices and answer; or "paper".
        preferences: a file of pairs, grouped by its column "subset".
        limit: items of each task, and pairs; None takes all.
        shots: examples in each prompt; None leaves it to the tasks.
        template: "none", "chat", or "auto" (the default), which applies the chat template where text is generated.
        strength: multiplies a single adapter.
        samples, sample_tokens, seed: prompts of the pairs that are answered (32), the longest answer (128), what draws it (0).
        output_dir: the folder for the results; by default a new one in evaluations/ of each adapter's run.
        store: the folder of computed results; by default in the cache folder.
        display: shows messages and progress, such as ``lite_dil.Terminal()``.
        **options: for loading the model and reading pairs, named as in ``lite-dil eval --help``.

    Returns:
        `content`, that of eval.json, and `folders`, where it is.

    Raises:
        UserError: something you can fix; what was computed is kept.
        OutOfMemory: the device does not hold the model, or a single request.
    """
    start()
    if unknown := next((name for name in options if name not in _KNOWN), None):
        raise UserError(f"dil.evaluate: unknown option {unknown!r}{did_you_mean(unknown, _KNOWN)}")
    asked = EvaluationRequest(
        adapters=tuple(map(str, adapters)),
        tasks=tasks,
        preferences=preferences,
        given={name: value for name, value in options.items() if name in MODEL_FIELDS},
        reading={name: value for name, value in options.items() if name in FLAGS},
        limit=limit,
        shots=shots,
        template=template,
        strength=strength,
        samples=samples,
        sample_tokens=sample_tokens,
        seed=seed,
        output=None if output_dir is None else Path(output_dir),
        store=None if store is None else Path(store),
    )
    return evaluation.evaluate(asked, display_of(display))
