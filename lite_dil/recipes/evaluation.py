"""Evaluate adapters beside their base: benchmarks and preferences, one model in memory, results kept as they come."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lite_dil.backends.options import EngineOptions
from lite_dil.backends.types import POLICY, REFERENCE
from lite_dil.base.display import Display
from lite_dil.base.errors import UserError
from lite_dil.base.hashing import digest
from lite_dil.base.version import __version__
from lite_dil.config.adapter_source import find
from lite_dil.config.implicit_source import INITIAL
from lite_dil.config.options import build
from lite_dil.config.resume import trained_with
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.evaluation import preferences
from lite_dil.evaluation.benchmarks import harness, measure
from lite_dil.evaluation.benchmarks.measure import BASE
from lite_dil.evaluation.benchmarks.tasks import is_file, load_tasks, parts_of
from lite_dil.evaluation.store import ResultStore
from lite_dil.evaluation.stored_model import StoredModel
from lite_dil.generation import policy as policies
from lite_dil.generation.conversation import context_limit
from lite_dil.generation.policy import AdapterSource, Policy
from lite_dil.models.find import cache_dir, model_folder, resolve_model
from lite_dil.models.fingerprint import fingerprint
from lite_dil.objectives.table import objective_of
from lite_dil.recipes import evaluation_files as files
from lite_dil.reports.scores import adapter_print
from lite_dil.runs.folder import checkpoint_of, say_unfinished, trained_options
from lite_dil.training.options import ReferenceOptions
from lite_dil.training.reference_cache import cache_folder

_LONGEST = 2048  # tokens of a sequence, where a model's config does not say
# What an option is where it is not given, by whether it belongs to --tasks or to --preferences.
_OF_TASKS: dict[str, Any] = {"shots": None, "template": "auto"}
_OF_PREFERENCES: dict[str, Any] = {"samples": 32, "sample_tokens": 128, "seed": 0}


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What to evaluate.

    Attributes:
        adapters: runs, checkpoints or adapters' folders, all on one base; none for the base alone.
        tasks: see `tasks.load_tasks`; "" for none.
        preferences: a source of pairs; "" for none.
        given: options that load the model, by name; by default those of the adapter's run.
        reading: options that read pairs, by name.
        limit: items of each task, and pairs; None takes all.
        shots: examples in each prompt; None leaves it to the tasks.
        template: see `measure.TEMPLATES`; None is auto.
        strength: multiplies the adapter, if there is one.
        samples, sample_tokens, seed: prompts of the pairs that each model answers, the longest answer, and what draws it; None
            is the default.
        output: the folder for the results; None makes one in `parent`, or in each adapter's run.
        parent: the folder of a comparison.
        store: the folder of results by model; None is that in the cache folder.
    """

    adapters: tuple[str, ...] = ()
    tasks: str = ""
    preferences: str = ""
    given: dict[str, Any] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    shots: int | None = None
    template: str | None = None
    strength: float = 1.0
    samples: int | None = None
    sample_tokens: int | None = None
    seed: int | None = None
    output: Path | None = None
    parent: Path | None = None
    store: Path | None = None

    @property
    def data(self) -> ResolvedConfig:
        """How pairs are read."""
        return build(self.reading | {"seed": self.seed}, {})

    @property
    def key(self) -> str:
        """What tells this evaluation from others: all but where its results go."""
        tasks = [Path(part).absolute() if is_file(part) else part for part in parts_of(self.tasks)]
        adapters = [Path(adapter).absolute() for adapter in self.adapters]
        names = ("limit", "strength", "shots", "template", *_OF_PREFERENCES)
        options = [(name, getattr(self, name)) for name in names]
        chosen = self.preferences and Path(self.preferences).absolute()
        return digest(*map(repr, (adapters, tasks, chosen, options, sorted(self.given.items()), sorted(self.reading.items()))))


@dataclass(frozen=True)
class Evaluated:
    """The results: the content of eval.json with all adapters, and the folders it was written into."""

    content: dict[str, Any]
    folders: list[Path]


@dataclass(frozen=True)
class _Side:
    """A model to evaluate: the base, or an adapter on it. `adapter` is its name on the backend."""

    name: str
    adapter: str
    source: AdapterSource | None


def evaluate(asked: EvaluationRequest, display: Display) -> Evaluated:
    """Evaluate; what was computed is kept, and a stopped evaluation continues where it was.

    Raises UserError if a task, an adapter or a pair cannot be used, before anything is computed where that is possible.
    """
    asked = _checked(asked)
    if asked.output is not None:
        files.check_output(asked.output, asked.key)
    loaded = check_tasks(asked.tasks, asked.shots, display.say) if asked.tasks else {}
    sources = [find(adapter, asked.given, asked.strength) for adapter in asked.adapters] or [find(None, asked.given)]
    first = sources[0]
    if other := next((each for each in sources if each.options != first.options), None):
        raise UserError(f"--adapter {other.adapter}: its model or how it is loaded differs from that of {first.adapter}")
    found_in = [each.adapter.resolve() for each in sources if each.adapter]
    if twice := next((each for each in found_in if found_in.count(each) > 1), None):
        raise UserError(f"--adapter {twice}: it is given twice")
    limit = context_limit(resolve_model(first.options.model, display.say)) or _LONGEST
    engine = EngineOptions(layout="auto", gradient_checkpointing="off", max_length=limit)
    # Without an adapter, whose rounding may choose another layout: the base's results are the same for all adapters.
    bare = AdapterSource(None, None, first.options) if first.strength == 1 else first
    with policies.load(bare, display.say, engine=engine) as policy:
        sides = [_Side(BASE, REFERENCE, None), *_on_backend(policy, sources, display.say)]
        found: dict[str, Any] = {
            "version": __version__,
            "made": datetime.datetime.now(datetime.UTC).isoformat(),
            "asked": asked.key,
            "model": first.options.model,
            "computed": policy.backend.description,
            "adapters": [_described(side) for side in sides[1:]],
            "settings": {},
            "groups": {},
            "figures": [],
            "own_figures": [],
            "preferences": {},
        }
        pairs = _pairs(asked, policy) if asked.preferences else None
        models = {side.name: _stored(asked, policy, side, display) for side in sides}
        measured = _benchmarks(asked, models, loaded) if asked.tasks else {}
        if measured:
            tuned = {name: each for name, each in measured.items() if name != BASE}
            groups = {name: [task.task_name for task in group.get_all_tasks()] for name, group in loaded["groups"].items()}
            found |= {"settings": measured[BASE].settings, "groups": groups}
            found["figures"] = measure.figures(measured[BASE], tuned, groups)
            found["own_figures"] = measure.own_figures(measured[BASE], tuned, found["figures"])
        if pairs is not None:
            rewards = {side.name: _reward(side) for side in sides[1:]}
            found["preferences"] = _preferences(asked, pairs, models, rewards, display.say)
    names = {side.name: side.source for side in sides if side.source is not None}
    folder = files.folder_name(asked.key, asked.tasks, asked.preferences)
    places = files.places(names, asked.output, asked.parent, folder)
    for place, (mine, above) in places.items():
        files.write(place, mine, above, found, measured)
    for source in sources if asked.output is None and asked.parent is None else ():
        files.show_in_run(source, display)
    return Evaluated(found, list(places))


def check_tasks(tasks: str, shots: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the tasks that `load_tasks` finds. Raises UserError if one cannot be used, or lm-eval is not installed."""
    harness.require()
    return load_tasks(tasks, shots, say)


def _checked(asked: EvaluationRequest) -> EvaluationRequest:
    """Return what is asked, with the defaults. Raises UserError for what makes no sense, or would be ignored."""
    if not asked.tasks and not asked.preferences:
        raise UserError("nothing to evaluate: give --tasks, --preferences or both")
    if asked.preferences and not asked.adapters:
        raise UserError("--preferences compares an adapter with its base; give --adapter too")
    if asked.strength != 1 and len(asked.adapters) != 1:
        raise UserError(f"--strength {asked.strength:g} is for one --adapter; {len(asked.adapters)} are given")
    given = [name for name in (*_OF_TASKS, *_OF_PREFERENCES) if getattr(asked, name) is not None] + list(asked.reading)
    for what, there in (("tasks", asked.tasks), ("preferences", asked.preferences)):
        wrong = [] if there else [name for name in given if (name in _OF_TASKS) == (what == "tasks")]
        if wrong:
            raise UserError(f"{', '.join(map(_flag, wrong))}: only for --{what}, which is not given; leave it out")
    if asked.template not in (None, *measure.TEMPLATES):
        raise UserError(f"--template {asked.template}: expected {', '.join(measure.TEMPLATES)}")
    least = {"limit": 1, "shots": 0, "samples": 0, "sample_tokens": 1}
    for name, number in least.items():
        if (value := getattr(asked, name)) is not None and value < number:
            raise UserError(f"{_flag(name)} is {value}; expected at least {number}")
    defaults = {name: value for name, value in (_OF_TASKS | _OF_PREFERENCES).items() if getattr(asked, name) is None}
    return replace(asked, **defaults)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _on_backend(policy: Policy, sources: Sequence[AdapterSource], say: Callable[[str], None]) -> list[_Side]:
    """Load the adapters beside the policy, if it has none; return all under names of their own."""
    sides, taken = list[_Side](), {BASE}
    for number, source in enumerate(each for each in sources if each.adapter):
        assert source.adapter is not None
        checkpoint = checkpoint_of(source.adapter.absolute())
        where = source.run.path if source.run else source.adapter
        name = where.absolute().name + (f"/{checkpoint.name}" if checkpoint else "")
        name += f" x{source.strength:g}" if source.strength != 1 else ""
        name = name if files.plain(name) not in taken else f"{name} ({number + 1})"
        taken.add(files.plain(name))
        if policy.source.adapter is None:
            say_unfinished(source.adapter, source.run, say)
            policy.backend.load_adapter(f"evaluated-{number}", source.adapter)
        sides.append(_Side(name, POLICY if policy.source.adapter else f"evaluated-{number}", source))
    return sides


def _described(side: _Side) -> dict[str, Any]:
    assert side.source is not None and side.source.adapter is not None
    adapter = side.source.adapter.absolute()
    return {"name": side.name, "adapter": str(adapter), "weights": adapter_print(adapter), "strength": side.source.strength}


def _stored(asked: EvaluationRequest, policy: Policy, side: _Side, display: Display) -> StoredModel:
    """Return a model with its results, whatever they are of, and say how many are known."""
    memo = cache_folder(ReferenceOptions())
    model = {
        "computed": f"{policy.backend.name} {policy.backend.identity} {policy.backend.layout}",
        "weights": fingerprint(model_folder(policy.model), memo),
        "tokens": digest(sorted(policy.encoder.identity().items())),
    }
    if side.source is not None:
        assert side.source.adapter is not None
        model |= {"adapter": fingerprint(side.source.adapter, memo), "strength": repr(side.source.strength)}
    store = ResultStore(asked.store or cache_dir() / "evaluation", model)
    display.say(f"{side.name}: {store.found:,} results are known" if store.found else f"{side.name}: no results are known")
    if store.damaged:
        display.say(f"{side.name}: {store.damaged:,} damaged results are computed again")
    return StoredModel(policy, side.adapter, store, display.bar, display.say)


def _benchmarks(
    asked: EvaluationRequest, models: Mapping[str, StoredModel], loaded: dict[str, Any]
) -> dict[str, measure.TaskScores]:
    """Run the tasks on each model; return what was measured, by its name."""
    from lite_dil.evaluation.benchmarks.language_model import PolicyLM

    measured = {}
    assert asked.template is not None  # `_checked` has set it
    for name, stored in models.items():

        def model(chat: bool, stored: StoredModel = stored) -> PolicyLM:
            return PolicyLM(stored, chat)

        chats = stored.policy.encoder.rendering.chats
        measured[name] = measure.measure_tasks(model, loaded, asked.template, asked.limit, chats)
    return measured


def _pairs(asked: EvaluationRequest, policy: Policy) -> preferences.PreferencePairs:
    pairs = preferences.read_pairs(asked.preferences, policy.encoder, asked.data)
    return preferences.PreferencePairs(pairs.examples[: asked.limit], pairs.subsets[: asked.limit])


def _preferences(
    asked: EvaluationRequest,
    pairs: preferences.PreferencePairs,
    models: Mapping[str, StoredModel],
    rewards: Mapping[str, preferences.PairReward],
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Return the figures of each adapter on pairs, by its name."""
    assert asked.sample_tokens is not None  # `_checked` has set it
    prompts = list(dict.fromkeys(each.prompt for each in pairs.examples))[: asked.samples]
    say(f"{len(pairs.examples):,} pairs, and answers to {len(prompts):,} of their prompts")
    logps = {name: preferences.pair_logps(model, pairs.examples) for name, model in models.items()}
    base = logps.pop(BASE)
    found = preferences.preference_figures(pairs, base, logps, rewards)
    if prompts:
        draw = prompts, asked.sample_tokens, asked.data.seed
        drawn = {name: preferences.draw_texts(model, *draw) for name, model in models.items()}
        for name in logps:
            answers = drawn[BASE], drawn[name]
            found[name]["distance"] = preferences.distance_figures(models[name], models[BASE], prompts, *answers)
    return found


def _reward(side: _Side) -> preferences.PairReward:
    """Return the implicit reward of an adapter: its run's beta and reduction."""
    assert side.source is not None and side.source.adapter is not None
    adapter, run = side.source.adapter, side.source.run
    options = trained_with(adapter, run) if run else trained_options(adapter)
    if not options.get("loss"):
        note = f"{side.name}: nothing says how it was trained; its implicit reward here is the summed log-ratio, with beta 1."
        return preferences.PairReward(1.0, False, note)
    loss, divergence, note = options["loss"], options.get("divergence"), ""
    if not objective_of(loss).reference:
        note = f"{side.name}: {loss} has no reference; it was not trained by the implicit reward."
    elif options.get("reference") == INITIAL:
        note = f"{side.name}: it was trained against its initial adapter; its implicit reward here is against the bare base."
    elif divergence not in (None, "reverse_kl"):
        note = (
            f"{side.name}: the reward of --divergence {divergence} is not beta times the log-ratio; confidence is not of it."
        )
    return preferences.PairReward(float(options.get("beta") or 1.0), options.get("logp_reduction") == "mean", note)
