"""On-policy training of an adapter: draw answers, reward them, take one step on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np

from lite_dil.backends.protocol import Backend
from lite_dil.base.display import Display
from lite_dil.base.errors import UserError
from lite_dil.base.hashing import digest
from lite_dil.base.observer import Event, Observer, Observers
from lite_dil.base.text import count
from lite_dil.batching.schedule import Schedule
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.data.encoder import Encoder, Example, fingerprint
from lite_dil.data.inspect.survey import lengths
from lite_dil.data.prompts import Prompt, encode_prompts, read_prompts
from lite_dil.data.rows import rows_name
from lite_dil.generation.policy import AdapterSource
from lite_dil.generation.served import ServedPolicy
from lite_dil.models.find import cache_dir
from lite_dil.online.groups import GroupSampler
from lite_dil.online.options import ResolvedOnline
from lite_dil.online.preflight import PREFLIGHT, preflight
from lite_dil.online.rollouts_file import RolloutsFile
from lite_dil.online.training import OnlineTraining
from lite_dil.recipes.given import NOTHING_GIVEN, Given
from lite_dil.recipes.observers import ShownSteps, samples_of
from lite_dil.recipes.read_data import RunData
from lite_dil.recipes.reward_sources import RewardSources
from lite_dil.recipes.run import Run
from lite_dil.recipes.running import Recipe, run_training
from lite_dil.recipes.session import Opening, TrainingSession, begin, go_on, load_session
from lite_dil.reports.card import ModelCard
from lite_dil.reports.run_report import RunReport, facts_of
from lite_dil.reports.samples import SamplePrompt
from lite_dil.reports.trackers import Trackers
from lite_dil.rewards.spec import parse
from lite_dil.runs.checkpoints import Checkpoints
from lite_dil.runs.metrics_log import MetricsLog


def train(
    config: ResolvedConfig,
    display: Display,
    resume: Path | None = None,
    observers: Sequence[Observer] = (),
    given: Given = NOTHING_GIVEN,
) -> Run:
    """Train an adapter on its own answers by `config`, from the start or from the checkpoint `resume`.

    Args:
        observers: further observers, besides those that save, log and report.
        given: objects passed by a program; its policy is changed in place.

    Raises:
        UserError: something that the user can fix, raised before anything was changed or with the last step saved.
        TrainingDiverged: the loss or gradient became non-finite; earlier checkpoints are good.
    """
    rewards = RewardSources(config, given)
    recipe = Recipe(config.loss, "", partial(open_online, rewards=rewards), _observers_of, _again(config))
    return run_training(recipe, config, display, resume, None, observers, given)


def _again(config: ResolvedConfig) -> tuple[str, ...]:
    """Return the flags that must be given again to continue: those with functions, which no file grants to run."""
    texts = (("--reward", config.reward), ("--eval-reward", config.eval_reward))
    return tuple(
        word for name, text in texts if text and any(part.kind == "function" for part in parse(text)) for word in (name, "...")
    )


def _online(config: ResolvedConfig) -> ResolvedOnline:
    """Return the options of drawing, which are resolved."""
    return ResolvedOnline(**{each.name: getattr(config, each.name) for each in fields(ResolvedOnline)})


@dataclass
class _Questions:
    """Reads the prompts of a run, and keeps them with their columns."""

    prompts: list[Prompt] = field(default_factory=list)

    def read(self, encoder: Encoder, config: ResolvedConfig, say: Callable[[str], None], given: Given) -> RunData:
        """Return the prompts as examples without responses."""
        found = read_prompts(config.data, config, config.chat, say, given.data, alike=True)
        self.prompts = encode_prompts(found, encoder, config, _online(config).max_new_tokens, say)
        examples = [Example(prompt.ids, (), (), prompt.place) for prompt in self.prompts]
        tokens = np.array([len(prompt.ids) for prompt in self.prompts])
        chat = self.prompts[0].chat
        facts = {
            "use": "training",
            "source": config.data,
            "examples": len(self.prompts),
            "form": "prompts",
            "chat": chat,
            "answers": {"chosen": 0, "rejected": 0},
            "sources": [],
            "prompts_cut": 0,
            "answers_cut": 0,
            "tokens": {"prompt": lengths(tokens)},
        }
        kind = "chat messages" if chat else "plain text, continued as it is (--chat makes it a user's message)"
        say(f"training data {config.data}: {count(len(self.prompts), 'prompt')}, {kind}")
        shown = [
            SamplePrompt(each.ids, each.prompt, each.place, len(each.ids)) for each in self.prompts[: config.report_samples]
        ]
        if given.data is not None:
            config = replace(config, data=rows_name(fingerprint(examples)))
        others = digest([sorted(prompt.columns.items(), key=str) for prompt in self.prompts])[:16]
        return RunData(examples, [], [], shown, [facts], config, others)


def open_online(opening: Opening, rewards: RewardSources) -> TrainingSession:
    """Read the prompts, load the models, and see what the reward makes of the first answers; or continue from a checkpoint."""
    questions, display = _Questions(), opening.display

    def read(encoder: Encoder, config: ResolvedConfig, say: Callable[[str], None], given: Given) -> RunData:
        found = questions.read(encoder, config, say, given)
        rewards.find(config, say)
        return found

    session, progress, inputs = load_session(replace(opening, read=read))
    inputs.rewards(progress, rewards.identities)
    reward, judge = rewards.open(session.policy, progress, display)
    config, backend, encoder = session.config, session.backend, session.policy.encoder
    online = _online(config)
    schedule = Schedule(config, session.data.examples, backend.layout, repeats=online.num_iterations)
    served = _served(config, backend, encoder)
    sampler = GroupSampler(backend, encoder, questions.prompts, schedule, online, reward, display.say, judge, served)
    training = OnlineTraining(
        backend, sampler, config, progress, config.logging_steps, config.target_kl, display.say, display.stopping
    )
    if opening.resume:
        go_on(session, training, opening.resume, display)
    else:
        try:
            with display.status(PREFLIGHT):
                preflight(sampler, display.say)
        except BaseException as error:
            if served:
                ServedUntilTheEnd(served, display.say).failed(error)
            raise
        begin(session, display)
    session.training = training
    return session


def _served(config: ResolvedConfig, backend: Backend, encoder: Encoder) -> ServedPolicy | None:
    """Return the policy on the server of --sampler. Raises UserError for MLX, whose adapters no server loads."""
    if config.sampler is None:
        return None
    if backend.name == "mlx":
        raise UserError("--sampler: servers load adapters in PEFT's format, which --backend cuda and cpu write; leave it out")
    return ServedPolicy(backend, config.sampler, cache_dir() / "served", encoder.end_ids(), encoder.vocabulary)


def _observers_of(
    session: TrainingSession, training: OnlineTraining, display: Display, own: Sequence[Observer]
) -> tuple[Observers, Checkpoints]:
    """Return the observers of a run in order, and separately the one that saves."""
    config, folder, backend, data = session.config, session.folder, session.backend, session.data
    shown, trackers = ShownSteps(display), Trackers(config, folder.path, session.logged, display.say)
    # The answers come before the checkpoint, so that those of all its steps are there.
    rollouts = RolloutsFile(folder.path, training, display.say)
    checkpoints = Checkpoints(folder, training.progress, session.save_state, session.save_adapter, config)
    answers = samples_of(session, shown, config.save_steps)
    card = ModelCard(AdapterSource(folder.adapter, folder, config))
    facts = facts_of(config, backend, training.schedule.steps, data.facts)
    report = RunReport(folder, facts, config.save_steps, str, display.say)
    metrics = MetricsLog([folder.log, trackers.log])
    served = [ServedUntilTheEnd(training.sampler.served, display.say)] if training.sampler.served else []
    return Observers([metrics, shown, rollouts, checkpoints, answers, card, report, *own, trackers, *served]), checkpoints


class ServedUntilTheEnd(Observer):
    """Has the server of --sampler drop the last adapter, however the training ends."""

    def __init__(self, served: ServedPolicy, say: Callable[[str], None]) -> None:
        self._served, self._say = served, say

    def stopped(self, event: Event) -> None:
        """Drop it."""
        self._drop()

    def finished(self, event: Event) -> None:
        """Drop it."""
        self._drop()

    def failed(self, error: BaseException) -> None:
        """Drop it."""
        self._drop()

    def _drop(self) -> None:
        try:
            self._served.close()
        except UserError as error:  # the training itself has ended well, or has its own error
            self._say(str(error))
