"""Comparing losses: train each from the same start on the same data, measure it, and report them side by side."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lite_dil.backends import registry
from lite_dil.backends.options import LoadOptions
from lite_dil.base.display import Display
from lite_dil.base.errors import TrainingDiverged, UserError
from lite_dil.base.files import make_folder, remove
from lite_dil.base.lock import Lock
from lite_dil.config.resume import check_same_run, saved_config
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.evaluation.comparison.files import RESULT, write_measured
from lite_dil.evaluation.comparison.measure import Probe, measure, measure_reference
from lite_dil.evaluation.comparison.report import Findings, report
from lite_dil.evaluation.comparison.settings import Comparison
from lite_dil.generation import policy as policies
from lite_dil.generation.policy import AdapterSource, Policy
from lite_dil.recipes.evaluation import EvaluationRequest, evaluate
from lite_dil.recipes.given import Given
from lite_dil.recipes.preference import train
from lite_dil.recipes.run import Run
from lite_dil.runs.folder import RunFolder

# Options that the policy itself has, or that a fresh adapter gets anew.
_NOT_COMPARED = {"backend", "dtype", "seed"}


def compare(
    comparison: Comparison, display: Display, policy: Policy | None = None, benchmarks: Benchmarks | None = None
) -> Findings | None:
    """Train and measure what is not done yet, and report; return None if Ctrl-C ended it early.

    All runs share one base in memory, each with a fresh adapter, unless --auto decides for each run how to load the model.

    Args:
        policy: the policy to use, which is left with a fresh adapter. None loads one, and closes it at the end.
        benchmarks: what every trained adapter is evaluated on at the end, beside the base.

    Raises:
        UserError: as training does; finished runs are kept.
    """
    if benchmarks and any(config.auto for config in comparison.configs.values()):
        raise UserError("--eval needs one way to load the model, and --auto may decide for each run; leave one of them out")
    make_folder(comparison.output)
    lock = Lock(comparison.output, "--output", display.say)
    base = _Base(policy, display)
    try:
        runs = [(loss, seed) for seed in comparison.seeds for loss in comparison.configs]
        for number, (loss, seed) in enumerate(runs, 1):
            name = f"{loss}, seed {seed} ({number} of {len(runs)})"
            if (Path(comparison.run(loss, seed).output_dir or "") / RESULT).exists():
                display.say(f"{name}: already done")
                continue
            display.say(f"\n{name}")
            if not _run(comparison, loss, seed, base, display):
                return None
        base.leave()
        found = report(comparison)
        if benchmarks:
            try:
                _evaluate(comparison, benchmarks, display)
            except UserError as error:
                raise UserError(f"{error}\nonly the evaluation is missing; the comparison is on {found.page}") from error
            found = report(comparison)
    finally:
        base.leave()
        lock.release()
    return found


@dataclass(frozen=True)
class Benchmarks:
    """What adapters are evaluated on: `tasks` and `limit` are those of `EvaluationRequest`."""

    tasks: str
    limit: int | None = None


def _evaluate(comparison: Comparison, benchmarks: Benchmarks, display: Display) -> None:
    """Evaluate the adapters of all runs that did not diverge; the results lie in the comparison's folder."""
    runs = [
        RunFolder(Path(comparison.run(loss, seed).output_dir or ""))
        for seed in comparison.seeds
        for loss in comparison.configs
    ]
    adapters = tuple(str(run.path) for run in runs if run.adapter.exists())
    if not adapters:
        return
    config = next(iter(comparison.configs.values()))
    asked = EvaluationRequest(
        adapters=adapters,
        tasks=benchmarks.tasks,
        given={"trust_remote_code": config.trust_remote_code},  # which no run's files grant
        limit=benchmarks.limit,
        parent=comparison.output,
    )
    evaluate(asked, display)


class _Base:
    """The base shared by the runs: it gives each run an untrained policy."""

    def __init__(self, policy: Policy | None, display: Display) -> None:
        self._own, self._policy, self._display = policy is None, policy, display
        self._seed = policy.options.seed if policy and policy.options else 0

    def policy(self, config: ResolvedConfig) -> Policy | None:
        """Return the policy to train; None if --auto must first decide how to load it."""
        if self._own and self._policy and (config.auto or not _loaded_alike(self._policy, config)):
            self._close()
        if config.auto:
            return None
        if self._policy is None:
            self._policy = policies.load(AdapterSource(None, None, config), self._display.say, config)
        registry.forget_peak(self._policy.backend.name)
        return self._policy.fresh(config.seed)

    def take(self, run: Run) -> None:
        """Keep the policy of a run that loaded its own."""
        self._policy = run.policy

    def leave(self) -> None:
        """Close the policy, or give back the given one with a fresh adapter."""
        if self._own:
            self._close()
        elif self._policy is not None:
            self._policy.fresh(self._seed)

    def _close(self) -> None:
        if self._policy is not None:
            self._policy.close()
            self._policy = None


def _loaded_alike(policy: Policy, config: ResolvedConfig) -> bool:
    """Return whether loading by `config` would give the policy in memory, up to its initial weights."""
    assert policy.options is not None  # it was loaded for training
    backend, dtype = policy.backend.name, policy.backend.dtype_name
    return (
        registry.resolve(config.backend) == backend
        and config.dtype in (policy.options.dtype, dtype)
        and all(
            getattr(policy.options, each.name) == getattr(config, each.name)
            for each in fields(LoadOptions)
            if each.name not in _NOT_COMPARED
        )
    )


def _run(comparison: Comparison, loss: str, seed: int, base: _Base, display: Display) -> bool:
    """Train one loss, from its newest checkpoint if there is one, and measure it; return False if it was stopped."""
    config = comparison.run(loss, seed)
    folder = RunFolder(Path(config.output_dir or ""))
    checkpoint = folder.latest()
    if checkpoint:
        checkpoint = folder.whole(checkpoint, display.say)
        saved = saved_config(checkpoint)
        config = replace(config, backend=saved["backend"], dtype=saved["dtype"])  # what auto chose
        check_same_run(config, saved, str(checkpoint))
    elif folder.path.exists():  # killed before its first checkpoint
        remove(folder.path)
    result: dict[str, Any] = {"loss": loss, "seed": seed, "learning_rate": config.learning_rate}
    diverged = ""
    try:
        trained = train(config, display, checkpoint, given=Given(base.policy(config), comparison.own.get(loss)))
    except TrainingDiverged as error:
        diverged = str(error)
    if diverged:  # outside the handler, so that the error no longer holds a model that the run loaded
        registry.free(registry.resolve(config.backend))
        display.say(f"{loss} diverged; the comparison continues. {diverged}")
        write_measured(folder.path / RESULT, result | {"diverged": diverged})
        return True
    base.take(trained)
    if trained.stopped:
        return False
    probe = Probe(trained.policy, config, comparison.sample_prompts, comparison.sample_tokens)
    display.say(f"generating an answer to each of {len(probe.prompts)} held-out prompts ...")
    reference = measure_reference(probe, comparison.reference, comparison.seeds[0])
    figures = measure(probe, reference, folder.path, seed)
    write_measured(folder.path / RESULT, result | {"diverged": None, **figures})
    return True
