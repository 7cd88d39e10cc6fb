"""Options for what a run writes."""

from __future__ import annotations

from dataclasses import dataclass

from lite_dil.base.option import FREE, WRITTEN, option


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run is written, and how often."""

    output_dir: str | None = option(
        "run", None, "folder for everything the run writes (default: a new folder under runs/)", metavar="DIR", kind=WRITTEN
    )
    logging_steps: int = option("run", 1, "steps between lines of metrics, each the mean over those steps", kind=FREE)
    eval_steps: int | None = option("run", None, "steps between evaluations (default: only at the end)", kind=FREE)
    save_steps: int | None = option(
        "run", None, "steps between checkpoints (default: only at the end or when stopped)", kind=FREE
    )
    save_total_limit: int | None = option(
        "run", None, "keep only this many of the newest checkpoints (default: all)", kind=FREE
    )
    report_samples: int = option(
        "run",
        4,
        "number of prompts, held out if possible, that report.html shows with answers before and after: greedy, at most 128 "
        "tokens, in one batch at each evaluation (without --eval-data, at each checkpoint). Does not affect results; 0 "
        "answers none",
        kind=FREE,
    )
    report_to: str | None = option(
        "run",
        None,
        "also send every line of metrics to these trackers: tensorboard (event files in the run's folder), wandb, trackio. "
        "Each is an extra of this name, as lite-dil doctor says (default: none)",
        metavar="NAME,...",
        kind=FREE,
    )
