"""Comparing losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lite_dil.api.notebook import display_of
from lite_dil.api.reading import Data, as_data
from lite_dil.api.training import check_names, decided
from lite_dil.base import html
from lite_dil.base.display import Display
from lite_dil.base.errors import UserError
from lite_dil.base.start import start
from lite_dil.evaluation.comparison import LOSSES, SAMPLE_PROMPTS, SAMPLE_TOKENS
from lite_dil.evaluation.comparison.report import PAGE
from lite_dil.evaluation.comparison.settings import ComparisonRequest, settle
from lite_dil.generation.policy import Policy
from lite_dil.objectives.own import OwnLoss
from lite_dil.recipes import comparison
from lite_dil.recipes.evaluation import check_tasks
from lite_dil.reports.scores import read_evaluations

_WHERE = "dil.compare"


@dataclass(frozen=True)
class Compared:
    """The result of a comparison.

    Attributes:
        rows: one dict per loss, as in table.json: "loss", "seeds", "diverged" (by seed, why), and "figures": by name the
            "mean" over seeds, its "std" over seeds and its standard "error" over held-out responses, each None where there is
            none. Log-probs and log-ratios are in nats; docs/results.md defines each figure.
        verdict: the same in sentences.
        folder: holds the page, table.md, table.json, curves.json, figure2.png and the runs.
        stopped: whether Ctrl-C ended it early, after saving; rows and verdict are then empty.
        scores: with eval_tasks what each adapter got beside the base, as in eval.json (docs/evaluation.md), newest first.
    """

    rows: list[dict[str, Any]]
    verdict: list[str]
    folder: Path
    stopped: bool
    scores: list[dict[str, Any]] = field(default_factory=list)

    @property
    def page(self) -> Path:
        """The path of the page with everything, which exists unless the comparison was stopped."""
        return self.folder / PAGE

    def _repr_html_(self) -> str:
        """Return the HTML that a notebook shows."""
        said: dict[str, object] = {row["loss"]: line for row, line in zip(self.rows, self.verdict, strict=False)}
        return html.facts("Stopped, and saved" if self.stopped else "Compared", said | {"page": html.Link(self.page)})


def compare(
    policy: Policy | str | Path,
    data: str | Path | Data | Iterable[Mapping[str, Any]],
    *,
    losses: Sequence[str | OwnLoss] = LOSSES,
    seeds: Sequence[int] | None = None,
    eval_data: str | Path | Data | Iterable[Mapping[str, Any]] | None = None,
    learning_rates: Mapping[str, float] | None = None,
    sample_prompts: int = SAMPLE_PROMPTS,
    sample_tokens: int = SAMPLE_TOKENS,
    eval_tasks: str = "",
    eval_limit: int | None = None,
    output_dir: str | Path | None = None,
    display: Display | None = None,
    **options: Any,
) -> Compared:
    """Train several losses from the same start on the same data, each with a fresh adapter on one base, and measure each.

    Args:
        policy: one that no run has trained, which is left with a fresh adapter; or the name of a model to load.
        data: what `lite_dil.read` returned, or anything that it accepts.
        losses: names of objectives (docs/losses.md), or your own losses.
        seeds: each loss is trained with each seed; by default only with the policy's.
        eval_data: held-out data of the same form; without it a tenth of the data is held out, whole prompts, 20 to 200 rows.
        learning_rates: by loss; the others use learning_rate, or their own default.
        sample_prompts, sample_tokens: held-out prompts that every trained model answers, and the longest answer.
        eval_tasks, eval_limit: `tasks` and `limit` of `lite_dil.evaluate` for every adapter; only for a model by name.
        output_dir: the comparison's folder; by default a new one under runs/. The same call continues a stopped comparison.
        display: shows messages and progress, such as ``lite_dil.Terminal()``.
        **options: others of ``lite-dil train --help``, for all losses; with the name of a model also those for loading it.

    Raises:
        UserError: something you can fix; finished runs are kept.
        OutOfMemory: the device does not hold the smallest pass of a first step.
    """
    rows, eval_rows = as_data(data, eval_data, _WHERE)
    mine = policy if isinstance(policy, Policy) else None
    given = _of_policy(mine, options) if mine else _of_model(str(policy), options)
    given |= rows.options | {"data": rows.name} | ({} if eval_rows is None else {"eval_data": eval_rows.name})
    seed = given.pop("seed", 0)
    asked = ComparisonRequest(
        losses=losses,
        seeds=[seed] if seeds is None else list(seeds),
        rates=learning_rates or {},
        sample_prompts=sample_prompts,
        sample_tokens=sample_tokens,
        output=None if output_dir is None else Path(output_dir),
        given=given,
        base={},
        again=lambda output: f'dil.compare(..., output_dir="{output}")',
        rows=rows.rows,
        eval_rows=None if eval_rows is None else eval_rows.rows,
    )
    display = display_of(display)
    benchmarks = _benchmarks(mine, eval_tasks, eval_limit, display)
    settled = settle(asked, display.say)
    found = comparison.compare(settled, display, mine, benchmarks)
    if found is None:
        return Compared([], [], settled.output, stopped=True)
    return Compared(found.rows, found.sentences, settled.output, False, read_evaluations(settled.output).current)


def _benchmarks(policy: Policy | None, tasks: str, limit: int | None, display: Display) -> comparison.Benchmarks | None:
    """Return what the adapters are evaluated on at the end, checked; None for nothing."""
    if not tasks:
        if limit is not None:
            raise UserError(f"{_WHERE}: eval_limit belongs to eval_tasks, which is missing")
        return None
    if policy:
        raise UserError(
            f"{_WHERE}: eval_tasks loads the model once more beside this policy; give the model's name in its place, or call "
            "lite_dil.evaluate on the runs"
        )
    check_tasks(tasks, None, display.say)
    return comparison.Benchmarks(tasks, limit)


def _of_policy(policy: Policy, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of all runs of a given policy, which sets how its model is loaded."""
    loaded = decided(policy, _WHERE)
    check_names(options, loaded, _WHERE)
    if policy.trained:
        raise UserError(f"{_WHERE}: a run has trained this policy; policy.fresh() gives it a new adapter on the same base")
    return options | loaded


def _of_model(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of all runs of a model that they load."""
    start(training=True)
    check_names(options, {}, _WHERE)
    return options | {"model": model}
