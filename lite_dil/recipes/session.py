"""Opening a training session: data, model and reference, from the start or from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lite_dil.backends import registry
from lite_dil.backends.protocol import Backend
from lite_dil.base.display import Display
from lite_dil.base.errors import UserError
from lite_dil.base.files import remove, replace_file
from lite_dil.base.signals import StopSignal
from lite_dil.base.start import quiet_bars, start
from lite_dil.batching.schedule import LargestPass, Schedule
from lite_dil.config.resume import saved_config
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.data.encoder import Encoder, Example, encoder_of
from lite_dil.data.mismatched import mismatched
from lite_dil.generation.policy import AdapterSource, Policy, load_found
from lite_dil.generation.reference_samples import add_samples, needed, reference_digest, sample_path
from lite_dil.models.find import resolve_model
from lite_dil.models.fingerprint import reference_key
from lite_dil.objectives.criterion import Criterion
from lite_dil.objectives.own import OwnLoss, is_own
from lite_dil.objectives.own import missing as missing_loss
from lite_dil.objectives.table import objective_of
from lite_dil.online.rollouts_file import ROLLOUTS
from lite_dil.planning.auto import fitted
from lite_dil.planning.before_loading import check_experts
from lite_dil.recipes.given import NOTHING_GIVEN, Given
from lite_dil.recipes.inputs import Inputs, say_paths
from lite_dil.recipes.read_data import RunData, read_data
from lite_dil.reports import trackers
from lite_dil.reports.pairs import PAIRS
from lite_dil.reports.record import SAMPLES
from lite_dil.runs.folder import RunFolder, adapter_of
from lite_dil.runs.progress import Progress
from lite_dil.training.loop import Steps, Training, is_finished
from lite_dil.training.own_loss import try_out
from lite_dil.training.passes import Passes
from lite_dil.training.precompute import missing, precompute
from lite_dil.training.reference_cache import ReferenceCache, cache_folder, open_cache
from lite_dil.training.reference_check import COMPARING, check_cache
from lite_dil.training.start_check import CHECKING, check_start, starts_at_reference

LOSS_SOURCE = "loss_source.txt"


@dataclass
class TrainingSession:
    """Everything that a run works with.

    Attributes:
        config: with the backend and options that auto chose.
        logged: lines of metrics that a resumed run logged before, including those that it will log again.
        own_loss: the loss, if it is a program's own.
        training: what the loop works on; None if Ctrl-C came before the first step, which the user has been told.
        beside: writes what the trained adapter's folder holds besides the backend's files.
    """

    config: ResolvedConfig
    folder: RunFolder
    policy: Policy
    data: RunData
    own_loss: OwnLoss | None = None
    logged: list[dict[str, Any]] = field(default_factory=list)
    training: Steps[Any] | None = None
    beside: Callable[[Path], None] | None = None

    @property
    def backend(self) -> Backend:
        """The policy's."""
        return self.policy.backend

    def taken_config(self) -> ResolvedConfig:
        """Return the config with the type and layout that the backend chose for "auto"."""
        return replace(self.config, dtype=self.backend.dtype_name, layout=self.backend.layout)

    def save_state(self, folder: Path) -> None:
        """Write the state for resuming, and the adapter for people and other programs."""
        if self.training:
            self.training.save_state(folder)
        self.backend.save_state(folder)
        if self.beside:
            self.beside(adapter_of(folder))

    def save_adapter(self, folder: Path) -> None:
        """Write the trained adapter."""
        self.backend.save_adapter(folder)
        if self.beside:
            self.beside(folder)


@dataclass(frozen=True)
class Opening:
    """What a session is opened with.

    Attributes:
        resume: the checkpoint to continue from; None starts anew.
        fixed: the options that --auto does not change; None means all that are not at their default.
        read: reads the data.
    """

    config: ResolvedConfig
    display: Display
    folder: RunFolder
    resume: Path | None = None
    fixed: Set[str] | None = None
    given: Given = NOTHING_GIVEN
    read: Callable[[Encoder, ResolvedConfig, Callable[[str], None], Given], RunData] = read_data


def open_session(opening: Opening) -> TrainingSession:
    """Read the data, load the model, and prepare both to start training, or to continue from a checkpoint."""
    display, resume, given = opening.display, opening.resume, opening.given
    session, progress, inputs = load_session(opening)
    config = session.config
    if config.sample_rejected and not _draw_rejected(session, config.sample_rejected, display):
        return session
    examples = session.data.examples
    if config.sample_rejected:
        inputs.drawn(progress, examples)
    others = mismatched(examples, config.loss, config.max_length) if objective_of(config.loss).baseline else []
    passes = Passes(session.backend, config.logp_reduction, _open_cache(session, display), display.say)
    training = Training(
        passes,
        examples,
        Schedule(config, examples, session.backend.layout, others),
        Criterion(config, examples, given.loss),
        config,
        progress,
        LargestPass(session.backend.layout),
        config.logging_steps,
        bool(config.lora_dropout),
        display.say,
        display.stopping,
    )
    if passes.cache.found:
        with display.status(COMPARING):
            check_cache(passes, examples, training.schedule.limits, config.seed, config.model)
    if resume:
        go_on(session, training, resume, display)
    elif starts_at_reference(config):
        with display.status(CHECKING):
            check_start(passes, training.schedule.batches(1)[0], config.model)
    if config.precompute_reference and not _precompute(passes, (examples, others, session.data.held_out), config, display):
        return session
    if not resume:
        begin(session, display)
    session.training = training
    return session


def load_session(opening: Opening) -> tuple[TrainingSession, Progress, Inputs]:
    """Read the data and load the model; return also the run's progress, and what is compared with a run's record."""
    config, display, folder, resume, given = opening.config, opening.display, opening.folder, opening.resume, opening.given
    start(training=True)
    trackers.check(config)
    if resume:
        folder.repair(saved_config(resume, accept=given.accept_changes))
        say_paths(config, folder.options, display.say)
    config, policy = replace(config, backend=registry.resolve(config.backend)), given.policy
    with display.status(f"importing {'MLX' if config.backend == 'mlx' else 'torch'}"):
        registry.prepare(config.backend, config, config)
        quiet_bars()
        registry.module(config.backend, "backend")
    if given.loss:
        try_out(given.loss, config.backend)
    elif is_own(config.loss):
        raise UserError(missing_loss(config.loss))
    model = policy.model if policy else resolve_model(config.model, display.say)
    if policy is None:
        check_experts(config, display.say)
    encoder = policy.encoder if policy else encoder_of(model, config)
    data = opening.read(encoder, config, display.say, given)
    config = data.config
    inputs = Inputs(config, folder, resume, display.say, given.accept_changes)
    progress = inputs.data(data)
    if config.auto:
        config, chosen = fitted(config, data.examples, opening.fixed)
        display.say(chosen)
    if policy is None:
        with display.status(f"loading {config.model}"):
            policy = load_found(AdapterSource(None, None, config), config.backend, model, encoder, display.say, config)
    if policy.backend.layout_reason:
        display.say(policy.backend.layout_reason)
    inputs.models(progress, model)
    return TrainingSession(config, folder, policy, data, given.loss), progress, inputs


def _draw_rejected(session: TrainingSession, count: int, display: Display) -> bool:
    """Generate rejected responses for the examples that the run uses and the held-out ones; False if Ctrl-C ended it."""
    config, backend, data = session.config, session.backend, session.data
    key = reference_key(config, cache_folder(config), session.policy.model, backend.identity)
    reference, used = reference_digest(key), needed(config, data.examples)
    path = sample_path(config, reference)
    drawn = add_samples([*used, *data.held_out], count, backend, session.policy.encoder, path, reference, config, display)
    if drawn is None:
        display.say(f"stopped; the same command continues with what was generated: {path}")
        return False
    session.data = replace(data, examples=drawn[: len(used)], held_out=drawn[len(used) :])
    return True


def _open_cache(session: TrainingSession, display: Display) -> ReferenceCache:
    """Open the cache of the reference's log-probs."""
    cache = open_cache(session.config, session.config, session.policy.model, session.backend.identity)
    if cache.damaged:
        display.say(f"{cache.path}: {cache.damaged} damaged records, which will be recomputed")
    return cache


def go_on(session: TrainingSession, training: Steps[Any], checkpoint: Path, display: Display) -> None:
    """Restore the model and metrics of the checkpoint."""
    session.backend.load_state(checkpoint)
    training.load_state(checkpoint)
    session.logged = session.folder.rewind(training.progress, display.say)
    where = f"step {training.progress.step} of {training.steps} in {session.folder.path}"
    display.say(f"the run is finished: {where}" if is_finished(training) else f"continuing after {where}")


def _precompute(passes: Passes, parts: Sequence[Sequence[Example]], config: ResolvedConfig, display: Display) -> bool:
    """Fill the cache with the reference's log-probs of all examples; return False if Ctrl-C ended it early."""
    total, count = sum(map(len, parts)), sum(1 for _ in missing(passes, parts))
    display.say(f"reference: {total - count} of {total} pairs are cached, {count} to compute")
    signal = StopSignal("stopping after this batch; what was computed is kept", tell=display.stopping)
    with signal as stop, display.bar(count, 0) as bar:
        for done in precompute(passes, parts, config):
            bar.update(done, None)
            if stop.asked and done < count:
                break
        else:
            passes.sync()
            return True
    passes.sync()
    display.say(f"stopped; the reference cache keeps what was computed: {passes.cache.path}")
    return False


def begin(session: TrainingSession, display: Display) -> None:
    """Create the run's folder."""
    folder = session.folder
    folder.create(replace(session.config, dtype=session.backend.dtype_name).as_dict())
    for name in (trackers.IDS, SAMPLES, PAIRS, ROLLOUTS):  # of a run that was killed before it saved, perhaps of another model
        remove(folder.path / name)
    if session.data.skipped:
        folder.list_skipped(session.data.skipped)
    if session.own_loss and session.own_loss.source:  # for people: it is never read
        replace_file(folder.path / LOSS_SOURCE, session.own_loss.source)
    display.say(f"writing to {folder.path}")
