"""Run lm-eval's tasks on a policy, and put what it found of each item side by side."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from lite_dil.base.errors import UserError
from lite_dil.base.shares import interval
from lite_dil.evaluation.benchmarks.tasks import FEWSHOT_SEED
from lite_dil.evaluation.statistics import compare_paired, holm, mean_interval, sentence

if TYPE_CHECKING:
    from lite_dil.evaluation.benchmarks.language_model import PolicyLM

TEMPLATES = ("auto", "none", "chat")
GENERATES = "generate_until"
MEAN = "mean"
BASE = "base"  # the name of the base model beside the adapters


@dataclass(frozen=True)
class TaskScores:
    """What one model did.

    Attributes:
        results: lm-eval's own results, without the items.
        items: by task, lm-eval's items in order.
        settings: by task, what a score depends on besides the model: "shots", "template", "bos", "limit", "items", and
            "truncated", the number of items of which a context was cut at its start.
        sums: by task and metric, the name of the function by which lm-eval makes one number of the items' figures.
    """

    results: dict[str, Any]
    items: dict[str, list[dict[str, Any]]]
    settings: dict[str, dict[str, Any]]
    sums: dict[str, dict[str, str]]


def measure_tasks(
    model: Callable[[bool], PolicyLM], loaded: Mapping[str, Any], template: str, limit: int | None, chats: bool
) -> TaskScores:
    """Run all tasks.

    Args:
        model: returns the model, which applies its chat template or not.
        loaded: the result of `tasks.load_tasks`.
        template: "none", "chat", or "auto": for tasks that generate text, if the model has one.
        limit: items of each task; None takes all.
        chats: whether the model has a chat template.
    """
    from lm_eval.evaluator import evaluate

    if template == "chat" and not chats:
        raise UserError("--template chat: the model has no chat template")
    results: dict[str, Any] = {}
    settings: dict[str, dict[str, Any]] = {}
    sums: dict[str, dict[str, str]] = {}
    for chat in (False, True):
        tasks = {name: task for name, task in loaded["tasks"].items() if _with_template(task, template, chats) == chat}
        if not tasks:
            continue
        for task in tasks.values():  # whose own state the model before has moved on
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        groups = {name: group for name, group in loaded["groups"].items() if _leaves(group) <= tasks.keys()}
        lm = model(chat)
        found = evaluate(
            lm,
            {"tasks": tasks, "groups": groups, "group_map": {name: loaded["group_map"][name] for name in groups}},
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
        for kind, values in found.items():
            results[kind] = results.get(kind, {}) | values if isinstance(values, dict) else values
        for name, task in tasks.items():
            settings[name] = {
                "shots": task.config.num_fewshot,
                "template": "chat" if chat else "none",
                "bos": lm.adds_bos,
                "limit": limit,
                "items": len({item["doc_id"] for item in found["samples"][name]}),
                "truncated": sum(of == name for of, _ in lm.truncated),
            }
            sums[name] = _sums(task, found["samples"][name])
    items = {name: sorted(some, key=lambda item: item["doc_id"]) for name, some in results.pop("samples").items()}
    return TaskScores(results, items, settings, sums)


def _with_template(task: Any, template: str, chats: bool) -> bool:
    """Return whether a task's prompts are rendered by the chat template."""
    return template == "chat" or (template == "auto" and chats and task.OUTPUT_TYPE == GENERATES)


def _leaves(group: Any) -> set[str]:
    return {task.task_name for task in group.get_all_tasks()}


def _sums(task: Any, items: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return by metric the name of the function that makes one number of its figures: MEAN for lm-eval's mean."""
    from lm_eval.api.metrics import mean

    metrics = {metric for item in items for metric in item["metrics"]}
    used = {metric: task.aggregation().get(metric, mean) for metric in metrics}  # as lm-eval, where a task names none
    return {metric: MEAN if each is mean else getattr(each, "__name__", "its own") for metric, each in used.items()}


def values_of(items: Sequence[Mapping[str, Any]], sums: Mapping[str, str]) -> dict[str, list[float]]:
    """Return the figures of a task's items by metric, in order: those that every item has, and that lm-eval averages."""
    found: dict[str, list[float]] = {}
    kinds = Counter(item["filter"] for item in items)
    for item in items:
        for metric in item["metrics"]:
            found.setdefault(_named(metric, item["filter"]), []).append(item[metric])
    averaged = {_named(metric, kind): count for metric, by in sums.items() if by == MEAN for kind, count in kinds.items()}
    return {
        name: [float(value) for value in values]
        for name, values in found.items()
        if len(values) == averaged.get(name)
        and all(isinstance(value, Real | np.bool_) and math.isfinite(value) for value in values)
    }


def _named(metric: str, kind: str) -> str:
    """Return what a metric is called after lm-eval's filter `kind`."""
    return metric if kind == "none" else f"{metric}, {kind}"


def figures(
    base: TaskScores, tuned: Mapping[str, TaskScores], groups: Mapping[str, Sequence[str]], seed: int = 0
) -> list[dict[str, Any]]:
    """Return a figure for each task, or group of tasks, and metric: of the base, and of each adapter against it.

    Only figures that are means over items are among them: of what lm-eval sums up otherwise there is no such interval.

    Args:
        tuned: by the adapter's name.
        groups: the tasks of each group, whose items are taken together.

    Raises ValueError if two models were not asked the same.
    """
    sides = [base, *tuned.values()]
    of = {task: [values_of(side.items[task], side.sums[task]) for side in sides] for task in base.items}
    for task, items in base.items.items():
        asked = [(item["doc_hash"], item["prompt_hash"]) for item in items]
        if any(asked != [(item["doc_hash"], item["prompt_hash"]) for item in side.items[task]] for side in sides):
            raise ValueError(f"{task}: the models were not asked the same items")
    for group, tasks in groups.items():
        of[group] = [_together([of[task][number] for task in tasks]) for number in range(len(sides))]
    shown = {(task, metric) for group, tasks in groups.items() for task in tasks for metric in of[group][0]}
    return [
        {"task": task, "metric": metric, "part": (task, metric) in shown, **figure}
        for task, each in of.items()
        for metric in each[0]
        if all(metric in side for side in each)
        for figure in [_figure(f"{task} {metric}", [side[metric] for side in each], list(tuned), seed)]
    ]


def own_figures(base: TaskScores, tuned: Mapping[str, TaskScores], known: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return lm-eval's own numbers that are not among the `known` figures: what it sums up otherwise than by a mean of items.

    Each has "task", "metric", "by", how lm-eval sums it up, and the number of the "base" and, by "name", of each adapter.
    """
    means = {(figure["task"], figure["metric"]): figure["base"]["mean"] for figure in known}
    found = []
    for task, numbers in base.results["results"].items():
        for key, value in numbers.items():
            metric, comma, kind = key.partition(",")
            name = _named(metric, kind)
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            if math.isclose(means.get((task, name), math.nan), value, rel_tol=1e-9, abs_tol=1e-12):
                continue
            others = [(adapter, side.results["results"][task].get(key)) for adapter, side in tuned.items()]
            by = base.sums.get(task, {}).get(metric, "mean of its tasks")
            adapters = [{"name": adapter, "value": _finite(each)} for adapter, each in others]
            found.append({"task": task, "metric": name, "by": by, "base": _finite(value), "adapters": adapters})
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _finite(value: Any) -> float | None:
    """Return a number as JSON holds it: None for one that is not finite, or for none."""
    return float(value) if _is_number(value) and math.isfinite(value) else None


def _together(parts: Sequence[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """Return the values of several tasks, of the metrics that all have."""
    return {
        name: [value for part in parts for value in part[name]] for name in parts[0] if all(name in part for part in parts)
    }


def _figure(name: str, values: Sequence[list[float]], adapters: Sequence[str], seed: int) -> dict[str, Any]:
    first, *others = values
    compared = [compare_paired(first, other, seed, len(others)) for other in others]
    corrected = holm([each.p for each in compared])
    return {
        "items": len(first),
        "base": summary(first, seed),
        "adapters": [
            {
                "name": adapter,
                **summary(other, seed),
                "difference": each.difference,
                "difference_low": each.low,
                "difference_high": each.high,
                "gained": each.gained,
                "lost": each.lost,
                "p": each.p,
                "p_holm": p,
                "needed": each.needed,
                "sentence": sentence(name if len(adapters) == 1 else f"{adapter}: {name}", each, p),
            }
            for adapter, other, each, p in zip(adapters, others, compared, corrected, strict=True)
        ],
    }


def summary(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Return a mean with its interval of 95 %: Wilson's for shares, else by bootstrap."""
    mean = float(np.mean(values))
    binary = set(values) <= {0.0, 1.0}
    low, high = interval(mean, len(values)) if binary else mean_interval(np.asarray(values), seed)
    return {"mean": mean, "low": low, "high": high}


def sample_rows(base: TaskScores, tuned: Mapping[str, TaskScores]) -> list[dict[str, Any]]:
    """Return a row for each item: its prompt, what was expected, and by model in "models" its answers and their figures."""
    rows = []
    for task, items in base.items.items():
        for number, item in enumerate(items):
            row = {"task": task, "item": item["doc_id"], "filter": item["filter"], "prompt": item["arguments"][0][0]}
            answers = {}
            for name, side in ((BASE, base), *tuned.items()):
                own = side.items[task][number]
                answers[name] = {"answers": own["filtered_resps"], "figures": {each: own[each] for each in own["metrics"]}}
            rows.append({**row, "target": item["target"], "models": answers})
    return rows
