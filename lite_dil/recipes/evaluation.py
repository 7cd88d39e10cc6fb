"""Evaluate adapters beside their base: benchmarks and preferences, one model in memory, results kept as they come."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lite_dil.backends.options import EngineOptions
from lite_dil.backends.types import POLICY, REFERENCE
from lite_dil.base.display import Display
from lite_dil.base.errors import UserError
from lite_dil.base.files import replace_file
from lite_dil.base.hashing import digest
from lite_dil.base.version import __version__
from lite_dil.config.adapter_source import find
from lite_dil.config.resume import trained_with
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.evaluation import preferences
from lite_dil.evaluation.benchmarks import harness, measure
from lite_dil.evaluation.benchmarks.store import ResultStore
from lite_dil.evaluation.benchmarks.tasks import load_tasks
from lite_dil.generation import policy as policies
from lite_dil.generation.conversation import context_limit
from lite_dil.generation.policy import AdapterSource, Policy
from lite_dil.models.find import cache_dir, model_folder, resolve_model
from lite_dil.models.fingerprint import fingerprint
from lite_dil.reports.card import write_card
from lite_dil.reports.record import FACTS
from lite_dil.reports.run_report import write_report
from lite_dil.reports.scores import write_scores
from lite_dil.runs.folder import RUNS, checkpoint_of, unused
from lite_dil.training.options import ReferenceOptions
from lite_dil.training.reference_cache import cache_folder

EVAL_SAMPLES = "eval_samples.jsonl"
_LONGEST = 2048  # tokens of a sequence, where a model's config does not say
BASE = "base"  # the name of the base beside the adapters


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What to evaluate.

    Attributes:
        adapters: runs, checkpoints or adapters' folders, all on one base; none for the base alone.
        tasks: see `tasks.load_tasks`; "" for none.
        preferences: a source of pairs; "" for none.
        given: options that load the model, by name; by default those of the adapter's run.
        data: how pairs are read.
        limit: items of each task, and pairs; None takes all.
        shots: examples in each prompt; None leaves it to the tasks.
        template: see `measure.TEMPLATES`.
        strength: multiplies the adapter, if there is one.
        samples, sample_tokens: prompts of the pairs that each model answers, and the longest answer.
        output: the folder for the results; None is each run's own.
        store: the folder of results by model; None is that in the cache folder.
    """

    adapters: tuple[str, ...] = ()
    tasks: str = ""
    preferences: str = ""
    given: dict[str, Any] = field(default_factory=dict)
    data: ResolvedConfig
    limit: int | None = None
    shots: int | None = None
    template: str = "auto"
    strength: float = 1.0
    samples: int = 32
    sample_tokens: int = 128
    output: Path | None = None
    store: Path | None = None


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
    _check(asked)
    loaded = check_tasks(asked.tasks, asked.shots, display.say) if asked.tasks else {}
    sources = [find(adapter, asked.given, asked.strength) for adapter in asked.adapters] or [find(None, asked.given)]
    first = sources[0]
    if other := next((each for each in sources if each.options != first.options), None):
        raise UserError(f"--adapter {other.adapter}: its model or how it is loaded differs from that of {first.adapter}")
    limit = context_limit(resolve_model(first.options.model, display.say)) or _LONGEST
    engine = EngineOptions(layout="auto", gradient_checkpointing="off", max_length=limit)
    with policies.load(first, display.say, engine=engine) as policy:
        sides = [_Side(BASE, REFERENCE, None), *_on_backend(policy, sources)]
        found: dict[str, Any] = {
            "version": __version__,
            "model": first.options.model,
            "computed": policy.backend.description,
            "adapters": [_described(side) for side in sides[1:]],
            "settings": {},
            "figures": [],
            "preferences": {},
        }
        measured = _benchmarks(asked, policy, sides, loaded, display) if asked.tasks else {}
        if measured:
            tuned = {name: each for name, each in measured.items() if name != BASE}
            groups = {name: [task.task_name for task in group.get_all_tasks()] for name, group in loaded["groups"].items()}
            found["settings"] = measured[BASE].settings
            found["figures"] = measure.figures(measured[BASE], tuned, groups)
        if asked.preferences:
            found["preferences"] = _preferences(asked, policy, sides, display)
    folders = _folders(asked, sides)
    for folder, names in folders.items():
        _write(folder, names, found, measured)
    for source in sources if asked.output is None else ():
        _show_in_run(source, display)
    return Evaluated(found, list(folders))


def check_tasks(tasks: str, shots: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the tasks that `load_tasks` finds. Raises UserError if one cannot be used, or lm-eval is not installed."""
    harness.require()
    return load_tasks(tasks, shots, say)


def _check(asked: EvaluationRequest) -> None:
    if not asked.tasks and not asked.preferences:
        raise UserError("nothing to evaluate: give --tasks, --preferences or both")
    if asked.preferences and not asked.adapters:
        raise UserError("--preferences compares an adapter with its base; give --adapter too")
    if asked.strength != 1 and len(asked.adapters) != 1:
        raise UserError(f"--strength {asked.strength:g} is for one --adapter; {len(asked.adapters)} are given")
    if asked.template not in measure.TEMPLATES:
        raise UserError(f"--template {asked.template}: expected {', '.join(measure.TEMPLATES)}")
    least = {"limit": 1, "shots": 0, "samples": 0, "sample_tokens": 1}
    for name, number in least.items():
        if (given := getattr(asked, name)) is not None and given < number:
            raise UserError(f"--{name.replace('_', '-')} is {given}; expected at least {number}")


def _on_backend(policy: Policy, sources: Sequence[AdapterSource]) -> list[_Side]:
    """Load the further adapters beside the policy; return all under names of their own."""
    sides, taken = list[_Side](), {BASE}
    for number, source in enumerate(each for each in sources if each.adapter):
        assert source.adapter is not None
        checkpoint = checkpoint_of(source.adapter.absolute())
        where = source.run.path if source.run else source.adapter
        name = where.absolute().name + (f"/{checkpoint.name}" if checkpoint else "")
        name = name if name not in taken else f"{name} ({number + 1})"
        taken.add(name)
        if number:
            policy.backend.load_adapter(f"evaluated-{number}", source.adapter)
        sides.append(_Side(name, f"evaluated-{number}" if number else POLICY, source))
    return sides


def _described(side: _Side) -> dict[str, Any]:
    assert side.source is not None
    return {"name": side.name, "adapter": str(side.source.adapter), "strength": side.source.strength}


def _store(asked: EvaluationRequest, policy: Policy, side: _Side) -> ResultStore:
    """Return the results of a model, whatever tasks they are of."""
    memo = cache_folder(ReferenceOptions())
    model = {
        "computed": policy.backend.identity,
        "weights": fingerprint(model_folder(policy.model), memo),
        "tokens": digest(sorted(policy.encoder.identity().items())),
    }
    if side.source is not None:
        assert side.source.adapter is not None
        model |= {"adapter": fingerprint(side.source.adapter, memo), "strength": repr(side.source.strength)}
    return ResultStore(asked.store or cache_dir() / "evaluation", model)


def _benchmarks(
    asked: EvaluationRequest, policy: Policy, sides: Sequence[_Side], loaded: dict[str, Any], display: Display
) -> dict[str, measure.TaskScores]:
    """Run the tasks on each model; return what was measured, by its name."""
    from lite_dil.evaluation.benchmarks.language_model import PolicyLM

    measured = {}
    for side in sides:
        store = _store(asked, policy, side)
        display.say(f"{side.name}: {store.found:,} results are known" if store.found else f"{side.name}: no results are known")
        if store.damaged:
            display.say(f"{side.name}: {store.damaged:,} damaged results are computed again")

        def model(chat: bool, side: _Side = side, store: ResultStore = store) -> PolicyLM:
            return PolicyLM(policy, side.adapter, store, chat, display.bar, display.say)

        chats = policy.encoder.rendering.chats
        measured[side.name] = measure.measure_tasks(model, loaded, asked.template, asked.limit, chats)
    return measured


def _preferences(
    asked: EvaluationRequest, policy: Policy, sides: Sequence[_Side], display: Display
) -> dict[str, dict[str, Any]]:
    """Return the figures of each adapter on pairs, by its name."""
    pairs = preferences.read_pairs(asked.preferences, policy.encoder, asked.data)
    pairs = preferences.PreferencePairs(pairs.examples[: asked.limit], pairs.subsets[: asked.limit])
    prompts = list(dict.fromkeys(each.prompt for each in pairs.examples))[: asked.samples]
    logps, drawn, done = {}, {}, 0
    display.say(f"{len(pairs.examples):,} pairs, and answers to {len(prompts):,} of their prompts")
    with display.bar(len(sides) * len(pairs.examples), 0) as bar:

        def step(number: int) -> None:
            nonlocal done
            done += number
            bar.update(done, None)

        for side in sides:
            logps[side.name] = preferences.pair_logps(policy, side.adapter, pairs.examples, display.say, step)
    for side in sides if prompts else ():
        draw = policy, side.adapter, prompts, asked.sample_tokens, asked.data.seed, display.say
        drawn[side.name] = preferences.draw_texts(*draw)
    found = {}
    for side in sides[1:]:
        assert side.source is not None and side.source.adapter is not None
        options = trained_with(side.source.adapter, side.source.run) if side.source.run else {}
        beta = float(options.get("beta") or 1.0)
        several = side.name if len(sides) > 2 else ""
        figures = preferences.preference_figures(pairs, logps[BASE], logps[side.name], beta, several)
        if prompts:
            texts = drawn[BASE], drawn[side.name]
            figures["distance"] = preferences.distance_figures(policy, side.adapter, prompts, *texts, display.say)
        found[side.name] = figures
    return found


def _folders(asked: EvaluationRequest, sides: Sequence[_Side]) -> dict[Path, list[str]]:
    """Return the folders to write into, with the names of the adapters whose results each gets."""
    every = [side.name for side in sides[1:]]
    if asked.output is not None:
        return {asked.output: every}
    found: dict[Path, list[str]] = {}
    for side in sides[1:]:
        if side.source is None or side.source.run is None:
            break
        found.setdefault(side.source.run.path, []).append(side.name)
    else:
        if found:
            return found
    return {unused(RUNS / f"eval-{datetime.datetime.now():%Y%m%d-%H%M%S}"): every}


def _show_in_run(source: AdapterSource, display: Display) -> None:
    """Write the run's report, and the card beside its final adapter, anew: both show the results."""
    if source.run is None or source.adapter is None:
        return
    if (source.run.path / FACTS).exists():
        write_report(source.run.path, display.say)
    if source.adapter.absolute() == source.run.adapter.absolute() and (source.adapter / "README.md").exists():
        write_card(source.adapter, source, "adapter", None, "")


def _write(folder: Path, names: Sequence[str], found: dict[str, Any], measured: dict[str, measure.TaskScores]) -> None:
    """Write the results of some adapters beside the base's."""
    mine = {
        **found,
        "adapters": [each for each in found["adapters"] if each["name"] in names],
        "figures": [
            {**figure, "adapters": [each for each in figure["adapters"] if each["name"] in names]}
            for figure in found["figures"]
        ],
        "preferences": {name: each for name, each in found["preferences"].items() if name in names},
    }
    write_scores(folder, mine)
    if not measured:
        return
    rows = measure.sample_rows(measured[BASE], {name: measured[name] for name in names})
    as_json = partial(json.dumps, ensure_ascii=False, default=harness.jsonable)
    replace_file(folder / EVAL_SAMPLES, "".join(as_json(row) + "\n" for row in rows))
    for name in (BASE, *names):
        written = folder / f"lm_eval_{name.replace('/', '_')}.json"
        replace_file(written, as_json(measured[name].results, indent=1) + "\n")
