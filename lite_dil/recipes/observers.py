"""The observers of a run, which save, log, measure, show and report, and their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

from lite_dil.base.display import Bar, Display, Tell, unheard
from lite_dil.base.observer import Event, Observer, Observers
from lite_dil.evaluation.held_out import Evaluation, HeldOut, HeldOutData
from lite_dil.evaluation.pairs import PairsFile
from lite_dil.generation.policy import AdapterSource
from lite_dil.planning.estimate import Load
from lite_dil.planning.fit import memory_line
from lite_dil.planning.plan import kind_of
from lite_dil.recipes.session import TrainingSession
from lite_dil.reports.card import ModelCard
from lite_dil.reports.health import Health
from lite_dil.reports.record import SAMPLES
from lite_dil.reports.run_report import RunReport, facts_of
from lite_dil.reports.samples import SampleAnswers
from lite_dil.reports.trackers import Trackers
from lite_dil.runs.checkpoints import Checkpoints
from lite_dil.runs.metrics_log import MetricsLog
from lite_dil.runs.rates import KeepRate, Setting, named
from lite_dil.training.loop import Training

# On a large model it may take minutes, because kernels are compiled.
FIRST = "the first step takes longest"


class ShownSteps(Observer):
    """Shows the steps on a display, and slow work between them."""

    def __init__(self, display: Display) -> None:
        self.display, self._open = display, ExitStack()
        self._bar: Bar | None = None

    def started(self, event: Event) -> None:
        """Show the bar."""
        self._bar = self._open.enter_context(self.display.bar(event.steps, event.step, "" if event.last else FIRST))

    def after_step(self, event: Event) -> None:
        """Show a step, with its line of metrics if it has one."""
        if self._bar:
            self._bar.update(event.step, event.line)

    def within_step(self, event: Event, passes: int, done: int) -> None:
        """Show the passes of a slow step."""
        if self._bar:
            self._bar.passes(done, passes)

    @contextmanager
    def doing(self, text: str) -> Iterator[Tell]:
        """Show the text during the block, and what is told."""
        with self._bar.doing(text) if self._bar else nullcontext(unheard) as tell:
            yield tell

    def evaluation(self, figures: dict[str, float]) -> None:
        """Show held-out figures."""
        if self._bar:
            self._bar.evaluation(figures)

    def finished(self, event: Event) -> None:
        """Leave the bar as it is."""
        self._open.close()

    def stopped(self, event: Event) -> None:
        """Leave the bar as it is."""
        self._open.close()

    def failed(self, error: BaseException) -> None:
        """Leave the bar as it is."""
        self._open.close()


def setting_of(session: TrainingSession) -> Setting:
    """Return what the rate of a run depends on."""
    config, backend = session.config, session.backend
    return Setting(
        named(config.model), config.backend, backend.dtype_name, config.load_in_4bit, backend.layout, kind_of(config)
    )


def samples_of(session: TrainingSession, shown: ShownSteps, often: int | None) -> SampleAnswers:
    """Return the observer of the report's sample answers, which are renewed every `often` steps."""
    data, policy = session.data, session.policy
    return SampleAnswers(
        data.prompts,
        bool(data.held_out),
        session.folder.path / SAMPLES,
        policy.backend,
        policy.encoder,
        session.config.max_length,
        shown.display.say,
        often,
        shown.doing,
    )


def observers_of(
    session: TrainingSession, training: Training, display: Display, own: Sequence[Observer]
) -> tuple[Observers, Checkpoints]:
    """Return the observers of a policy's run in order, and separately the one that saves, which comes before slow ones."""
    config, folder, data = session.config, session.folder, session.data
    held_out = HeldOut(training.passes, data.held_out, config, config, session.own_loss) if data.held_out else None

    def results(shown: ShownSteps, often: int | None) -> list[Observer]:
        return [samples_of(session, shown, often), ModelCard(AdapterSource(folder.adapter, folder, config))]

    return watching_of(session, training, display, held_out, results, own)


def watching_of(
    session: TrainingSession,
    training: Training,
    display: Display,
    held_out: HeldOutData | None,
    results: Callable[[ShownSteps, int | None], list[Observer]],
    own: Sequence[Observer],
) -> tuple[Observers, Checkpoints]:
    """Return the observers that every run has with those of its kind, and separately the one that saves.

    Args:
        held_out: measures held-out data; None if there is none.
        results: makes those that show what was learned, given the display's and the steps between evaluations.
    """

    def memory() -> str:
        if training.largest.batch is None:
            return ""
        peak, before = backend.peak_memory_mb() * 2**20, session.policy.memory_before * 2**20
        return memory_line(session.taken_config(), session.policy.model, Load.of(training.largest.batch), peak, before)

    config, folder, backend = session.config, session.folder, session.backend
    shown, trackers = ShownSteps(display), Trackers(config, folder.path, session.logged, display.say)
    metrics = MetricsLog([folder.log, trackers.log])
    checkpoints = Checkpoints(folder, training.progress, session.save_state, session.save_adapter, config)
    watching: list[Observer] = [metrics, shown, checkpoints, Health(folder.metrics, config.as_dict(), display.say)]
    often = config.eval_steps if held_out else config.save_steps  # between sample answers, and reports
    if held_out:
        pairs = PairsFile(folder.path, lambda: held_out.pairs, session.policy.encoder, display.say)
        # The line comes last: a run that is killed before it measures again.
        takers = [pairs.write, metrics.log, shown.evaluation]
        watching.append(Evaluation(held_out, often, training.schedule.epoch, session.logged, takers, shown.doing, display.say))
    facts = facts_of(config, backend, training.schedule.steps, session.data.facts)
    report = RunReport(folder, facts, often, memory, display.say)
    rate = KeepRate(setting_of(session), display.say)
    return Observers([*watching, *results(shown, often), report, rate, *own, trackers]), checkpoints
