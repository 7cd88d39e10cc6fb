"""Run lm-eval's tasks on a policy, and put what it found of each item side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lite_dil.base.errors import UserError
from lite_dil.base.shares import interval
from lite_dil.evaluation.benchmarks.tasks import FEWSHOT_SEED
from lite_dil.evaluation.statistics import compare_paired, holm, mean_interval, sentence

if TYPE_CHECKING:
    from lite_dil.evaluation.benchmarks.language_model import PolicyLM

TEMPLATES = ("auto", "none", "chat")
GENERATES = "generate_until"


@dataclass(frozen=True)
class TaskScores:
    """What one model did.

    Attributes:
        results: lm-eval's own results, without the items.
        items: by task, lm-eval's items in order.
        settings: by task, what a score depends on besides the model: "shots", "template", "bos", "limit", "items", and
            "truncated", the number of requests of the kind whose context was cut at its start.
    """

    results: dict[str, Any]
    items: dict[str, list[dict[str, Any]]]
    settings: dict[str, dict[str, Any]]


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
                "truncated": len(lm.truncated),
            }
    items = {name: sorted(some, key=lambda item: item["doc_id"]) for name, some in results.pop("samples").items()}
    return TaskScores(results, items, settings)


def _with_template(task: Any, template: str, chats: bool) -> bool:
    """Return whether a task's prompts are rendered by the chat template."""
    return template == "chat" or (template == "auto" and chats and task.OUTPUT_TYPE == GENERATES)


def _leaves(group: Any) -> set[str]:
    return {task.task_name for task in group.get_all_tasks()}


def values_of(items: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the figures of a task's items by metric, in order; those that are a number for each item."""
    found: dict[str, list[float]] = {}
    for item in items:
        for metric in item["metrics"]:
            name = metric if item["filter"] == "none" else f"{metric}, {item['filter']}"
            found.setdefault(name, []).append(item[metric])
    return {
        name: [float(value) for value in values]
        for name, values in found.items()
        if all(isinstance(value, bool | int | float) for value in values)
    }


def figures(
    base: TaskScores, tuned: Mapping[str, TaskScores], groups: Mapping[str, Sequence[str]], seed: int = 0
) -> list[dict[str, Any]]:
    """Return a figure for each task, or group of tasks, and metric: of the base, and of each adapter against it.

    Args:
        tuned: by the adapter's name.
        groups: the tasks of each group, whose items are taken together.

    Raises ValueError if two models were not asked the same.
    """
    sides = [base, *tuned.values()]
    of = {task: [values_of(side.items[task]) for side in sides] for task in base.items}
    for task, items in base.items.items():
        asked = [(item["doc_hash"], item["prompt_hash"]) for item in items]
        if any(asked != [(item["doc_hash"], item["prompt_hash"]) for item in side.items[task]] for side in sides):
            raise ValueError(f"{task}: the models were not asked the same items")
    for group, tasks in groups.items():
        of[group] = [_together([of[task][number] for task in tasks]) for number in range(len(sides))]
    inside = {task for tasks in groups.values() for task in tasks}
    return [
        {"task": task, "metric": metric, "part": task in inside, **_figure(f"{task} {metric}", values, list(tuned), seed)}
        for task, each in of.items()
        for metric in each[0]
        if (values := [side[metric] for side in each])
    ]


def _together(parts: Sequence[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """Return the values of several tasks, of the metrics that all have."""
    return {
        name: [value for part in parts for value in part[name]] for name in parts[0] if all(name in part for part in parts)
    }


def _figure(name: str, values: Sequence[list[float]], adapters: Sequence[str], seed: int) -> dict[str, Any]:
    first, *others = values
    compared = [compare_paired(first, other, seed) for other in others]
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
    import numpy as np

    mean = float(np.mean(values))
    binary = set(values) <= {0.0, 1.0}
    low, high = interval(mean, len(values)) if binary else mean_interval(np.asarray(values), seed)
    return {"mean": mean, "low": low, "high": high}


def sample_rows(base: TaskScores, tuned: Mapping[str, TaskScores]) -> list[dict[str, Any]]:
    """Return a row for each item: its prompt, what was expected, and each model's answers with their figures."""
    rows = []
    for task, items in base.items.items():
        for number, item in enumerate(items):
            row = {"task": task, "item": item["doc_id"], "filter": item["filter"], "prompt": item["arguments"][0][0]}
            row["target"] = item["target"]
            for name, side in (("base", base), *tuned.items()):
                own = side.items[task][number]
                row[name] = {"answers": own["filtered_resps"], **{metric: own[metric] for metric in own["metrics"]}}
            rows.append(row)
    return rows
