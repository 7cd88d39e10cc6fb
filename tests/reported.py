"""Folders of runs that never ran, for tests of their reports: the same files as a real run's, with figures made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from conftest import config

from lite_dil.objectives.table import OBJECTIVES
from lite_dil.reports.pairs import PAIRS, HeldOutPairs, WrongPair, write_pairs
from lite_dil.reports.record import FACTS, SAMPLES
from lite_dil.reports.run_report import write_report
from lite_dil.reports.samples import Sample, write_samples

HOSTILE = (
    "<script>window.hit=1</script>\"><img src=x onerror='window.hit=1'></style></title></svg>-->&amp;<!-- "
    "\u202eltr \u05e9\u05dc\u05d5\u05dd \U0001f469\u200d\U0001f4bb \x00\x1b[31m\x85 \ud800 https://example.com/x.png "
    + "W"
    * 5000
)


def line(step: int, steps: int, loss: str = "lsif", form: str = "pairs") -> dict[str, Any]:
    """A line of metrics as a run with this loss and this data logs it: what it learns grows with the step."""
    share = step / steps
    sides = {"chosen": 0.4 * share, "rejected": -0.2 * share}
    if OBJECTIVES[loss].data == "chosen":
        sides.pop("rejected")
    found: dict[str, Any] = {"loss": 1 - 0.5 * share, "grad_norm": 2 - share}
    found |= {f"rewards/{side}": value for side, value in sides.items()}
    if form == "pairs" and "rejected" in sides:
        found["rewards/accuracies"] = 0.5 + 0.4 * share
    if "rejected" in sides:
        found["rewards/margins"] = 0.6 * share
    found |= {f"logps/{side}": value * 30 - 40 for side, value in sides.items()}
    found |= {f"log_ratio/{side}": value for side, value in sides.items()}
    return found


def make_run(
    folder: Path,
    steps: int = 20,
    eval_steps: int | None = 5,
    text: str = "short answers",
    samples: int = 2,
    form: str = "pairs",
    change: Callable[[dict[str, Any]], None] = lambda line: None,
    facts: dict[str, Any] | None = None,
    held_out: int = 100,
    **options: Any,
) -> str:
    """Write a run's files and its report, and return that. `text` stands in each place that data or a flag fills.

    `held_out` is the number of held-out examples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = replace(config(**options), model=text, data=text, eval_data=text if eval_steps else None, columns=text)
    clean = {
        name: value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
        for name, value in made.as_dict().items()
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(clean))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            figures = line(step, steps, made.loss, form)
            whole = figures | {"learning_rate": 1e-4, "tokens_per_second": 90.0, "peak_memory_mb": 900.0, "num_tokens": 100}
            whole |= {"seconds_per_step": 0.5, "examples_per_second": 8.0, "skipped_steps": 0.0, "reference_passes": 0.0}
            lines = [{"step": step, "epoch": step / steps, **whole}]
            if eval_steps and step % eval_steps == 0:
                lines.append({"step": step, "epoch": step / steps, **{f"eval_{n}": v for n, v in figures.items()}})
            for one in lines:
                change(one)
                file.write(json.dumps(one) + "\n")
    content = {
        "version": "1.0",
        "state": "finished",
        "why": "",
        "steps": steps,
        **dict.fromkeys(("device", "layout", "machine", "software", "memory"), text),
        "data": [
            _data("training", text, form),
            *([_data("held out", text, form, held_out)] if eval_steps else []),
        ],
    }
    (folder / FACTS).write_text(json.dumps(content | (facts or {})))
    prompts: list[Any] = [text, [{"role": text, "content": text}, {"role": "user", "content": None}]]
    answers = [
        Sample(
            f"{i}",
            prompts[i % 2],
            text,
            bool(eval_steps),
            f"{text} before",
            20,
            False,
            f"{text} after",
            30,
            True,
            steps,
            1012,
            1012 - i,
        )
        for i in range(samples)
    ]
    write_samples(folder / SAMPLES, answers)
    if eval_steps and form == "pairs":
        write_pairs(folder / PAIRS, _pairs(held_out, steps, text))
    return write_report(folder).read_text(encoding="utf-8")


def _pairs(number: int, step: int, text: str) -> HeldOutPairs:
    """Nine pairs of ten right, with the same share of each length."""
    margins = [float(f"{i % 10 - 0.5:.6g}") for i in range(number)]
    lengths = [10 + i // 10 % 10 for i in range(number)]
    wrong = [WrongPair(text, -0.5, text, text, text, -0.3, 0.2, 10, 15)] * min(number // 10, 10)
    return HeldOutPairs(step, margins, [margin > 0 for margin in margins], lengths, [15] * number, wrong)


def _data(use: str, text: str, form: str, examples: int = 100) -> dict[str, Any]:
    left_out = [{"reason": text, "rows": 2, "stories": [{"first": text, "message": text}]}]
    source = {"name": text, "weight": 0.5, "format": text, "kept": 100, "left_out": left_out}
    tokens = dict.fromkeys(("p50", "p90", "p95", "p99", "max", "mean"), 12.0)
    return {
        "use": use,
        "source": text,
        "examples": examples,
        "form": form,
        "chat": True,
        "answers": {"chosen": 100, "rejected": 100},
        "sources": [source | {"notes": [{"note": text, "rows": 3}]}],
        "prompts_cut": 1,
        "answers_cut": 0,
        "tokens": {"prompt": tokens, "chosen": tokens, "rejected": tokens},
    }
