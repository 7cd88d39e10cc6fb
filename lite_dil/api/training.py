"""Training a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lite_dil.api.loading import LOADED
from lite_dil.api.notebook import display_of
from lite_dil.api.reading import Data, as_data
from lite_dil.api.telling import tell
from lite_dil.backends.head_files import has_head
from lite_dil.base.display import Display
from lite_dil.base.errors import UserError, did_you_mean, gather
from lite_dil.base.observer import Observer
from lite_dil.config.options import build
from lite_dil.config.resume import resumed
from lite_dil.config.train_config import FIELDS
from lite_dil.generation.policy import Policy
from lite_dil.objectives.own import OwnLoss
from lite_dil.recipes import online, preference
from lite_dil.recipes.given import Given
from lite_dil.recipes.run import Run
from lite_dil.rewards.spec import of_program
from lite_dil.runs.folder import adapter_of

# Options that other arguments set.
_NOT_HERE = {"data": "data is the second argument"} | dict.fromkeys(
    ("data_format", "columns", "chat", "max_rows", "skip_bad_rows"), "give it to dil.read"
)
_AUTO = {"auto": "auto is only for lite-dil train; what it chooses is set in dil.load"}


def train(
    policy: Policy,
    data: str | Path | Data | Iterable[Mapping[str, Any]],
    *,
    loss: str | OwnLoss = "lsif",
    eval_data: str | Path | Data | Iterable[Mapping[str, Any]] | None = None,
    observers: Sequence[Observer] = (),
    display: Display | None = None,
    resume: str | Path | None = None,
    output_dir: str | Path | None = None,
    continue_from: bool = False,
    reward: str | Callable[..., Any] | Sequence[str | Callable[..., Any]] | None = None,
    eval_reward: str | Callable[..., Any] | Sequence[str | Callable[..., Any]] | None = None,
    accept_changes: bool = False,
    **options: Any,
) -> Run:
    """Train the policy's adapter, in place, and write a run's folder.

    Messages are logged at INFO by the logger "lite_dil", unless `display` shows them; a notebook shows them below the cell.

    Args:
        policy: one that no run has trained, or made `fresh` again, or with `continue_from` one that is trained further.
        data: what `lite_dil.read` returned, or anything that it accepts.
        loss: the name of an objective (docs/losses.md), or your own, a `lite_dil.PairLoss` or `lite_dil.SideLoss`.
        eval_data: held-out data of the same form.
        observers: called at the start, after each step and at the end; see `lite_dil.Observer`.
        display: shows messages and progress, such as ``lite_dil.Terminal()``, also in a notebook.
        resume: a run's folder, one of its checkpoints, or "auto": continue it as if it had never stopped.
        output_dir: the run's folder; by default a new one under runs/.
        continue_from: train a trained policy further: this run starts from the previous run's adapter, with a new optimiser.
        reward: train on the policy's own answers to the prompts of `data`, with loss "rloo" or "dpo" (docs/online.md): text
            as ``--reward`` takes it, a function ``(prompts, completions, **columns)``, or several of both.
        eval_reward: a reward of the same answers that is not trained on.
        accept_changes: with `resume`, go on although the run's options, data or base model have changed.
        **options: others of ``lite-dil train --help``, such as learning_rate, max_steps, beta, eval_steps.

    Raises:
        UserError: something you can fix, raised before anything was changed or with the last step saved.
        TrainingDiverged: the loss or gradient became non-finite; earlier checkpoints are good.
        OutOfMemory: the device does not hold the smallest pass of a first step.
    """
    loaded = decided(policy, "dil.train")
    check_names(options, loaded, "dil.train")
    rows, eval_rows = as_data(data, eval_data, "dil.train")
    own = loss if isinstance(loss, OwnLoss) else None
    rewarded, functions = of_program(reward=reward, eval_reward=eval_reward)
    given = {name: value for name, value in options.items() if name not in LOADED} | rewarded
    given |= {"loss": own.identity if own else loss} | rows.options | {"data": rows.name}
    given |= {} if eval_rows is None else {"eval_data": eval_rows.name}
    given |= {} if output_dir is None else {"output_dir": str(output_dir)}
    handed = Given(policy, own, functions, rows.rows, None if eval_rows is None else eval_rows.rows, accept_changes)
    config, checkpoint = None, None
    if resume is not None:
        own_rows = [name for name in ("data", "eval_data") if getattr(handed, name) is not None]
        config, checkpoint = resumed(given | loaded, {}, str(resume), tell, accept_changes, own_rows)
    if config is None or checkpoint is None:
        config = build(given | _start(policy, loaded, continue_from), {})
    if config.online:
        return online.train(config, display_of(display), checkpoint, observers, handed)
    return preference.train(config, display_of(display), checkpoint, None, observers, handed)


def decided(policy: Policy, where: str) -> dict[str, Any]:
    """Return the options set when the policy was loaded, as its runs have them."""
    if policy.options is None:
        raise UserError(f"{where}: this policy was loaded for inference (trainable=False); load it for training")
    found = {name: getattr(policy.options, name) for name in LOADED}
    if not found["reference"]:
        raise UserError(
            f'{where}: which model is the reference? dil.load(..., reference="initial-adapter") if the adapter belongs '
            'to the model to stay close to (after SFT, for example), reference="base" if that is the bare base model'
        )
    return found | {"backend": policy.backend.name, "dtype": policy.backend.dtype_name}


def check_names(options: dict[str, Any], loaded: dict[str, Any], where: str) -> None:
    """Raise UserError for options that are unknown, or that differ from those the policy was loaded with, if any."""
    problems, not_here = [], _NOT_HERE | (_AUTO if loaded else {})
    for name, value in options.items():
        if name in not_here:
            problems.append(f"{name}: {not_here[name]}")
        elif name not in FIELDS:
            problems.append(f"unknown option {name!r}{did_you_mean(name, FIELDS)}")
        elif name in loaded and value != loaded[name]:
            problems.append(f"{name} is {value!r}, but dil.load set {loaded[name]!r}; give it to dil.load")
    if problems:
        raise UserError(gather(problems, f"{where}:") if len(problems) > 1 else f"{where}: {problems[0]}")


def _start(policy: Policy, loaded: dict[str, Any], continue_from: bool) -> dict[str, Any]:
    """Prepare the policy for a new run; return the options that describe its start."""
    if not policy.trained:
        return loaded
    assert policy.run is not None and policy.options is not None
    if not continue_from:
        raise UserError(
            f"dil.train: {policy.run.path} has trained this policy; policy.fresh() gives it a new adapter on the same base, "
            "and continue_from=True trains it further"
        )
    if policy.options.reference != "base":
        raise UserError("dil.train: continue_from needs the base as reference; load the run's adapter with dil.load instead")
    latest = policy.run.latest()
    adapter = policy.run.adapter if policy.run.adapter.exists() or latest is None else adapter_of(latest)
    if adapter.exists() and has_head(adapter):
        raise UserError(
            f"dil.train: {policy.run.path} trained a reward model on this policy; policy.fresh() starts a policy anew"
        )
    if not adapter.exists():
        raise UserError(f"dil.train: {policy.run.path} saved no adapter to continue from; policy.fresh() starts anew")
    changed: dict[str, Any] = {"init_adapter": str(adapter), "lora_r": None, "lora_alpha": None, "target_modules": None}
    policy.backend.renew_policy(replace(policy.options, **changed))
    return loaded | changed
