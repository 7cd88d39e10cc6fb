"""Tasks of an evaluation: by lm-eval's name, from its YAML files, or from rows of questions and answers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError, did_you_mean, first_line, gather
from lite_dil.data.files import RowError, file_rows

# The benchmarks of the DIL paper's first table, with the numbers of examples in the prompt. leaderboard_math_hard is only the
# hardest fifth of MATH.
PAPER = {
    "leaderboard_mmlu_pro": 5,
    "leaderboard_bbh": 3,
    "leaderboard_musr": 0,
    "leaderboard_math_hard": 4,
    "gsm8k": 5,
    "arc_challenge": 25,
}
FEWSHOT_SEED = 1234  # draws a prompt's examples, as in lm-eval itself
_YAML = (".yaml", ".yml")
_SHOWN = 5  # problems of a file that are shown
_QUESTION = "Question: {{question}}\nAnswer:"
_NUMBERS = [  # as in gsm8k
    {
        "name": "strict-match",
        "filter": [{"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"}, {"function": "take_first"}],
    },
    {
        "name": "flexible-extract",
        "filter": [
            {"function": "regex", "group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"},
            {"function": "take_first"},
        ],
    },
]
_NUMBER = re.compile(r"-?\$?\d[\d,]*(\.\d+)?|-?\$?\.\d+")  # what both filters find whole
_EXACT = {"ignore_case": True, "ignore_punctuation": False, "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"]}


def load_tasks(named: str, shots: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Return lm-eval's tasks and groups of a list of names and files; `harness.require` was called before.

    Args:
        named: comma-separated: names of lm-eval, its FILE.yaml, FILE.jsonl of rows (see `rows_task`), or "paper".
        shots: examples in each prompt; None leaves the number to each task.
        say: is told what takes long.

    Raises UserError if a task is unknown, is damaged, is there twice, needs something that is not installed, cannot be
    downloaded, or cannot have so many examples.
    """
    parts = parts_of(named)
    if not parts or len(set(parts)) < len(parts):
        raise UserError(f"--tasks {named}: " + ("a task is given twice" if parts else "no task is given"))
    if "paper" in parts and (shots is not None or len(parts) > 1):
        raise UserError("--tasks paper: it is given alone, and sets the examples of each prompt itself; leave --shots out")
    files = [part for part in parts if is_file(part)]
    names = list(PAPER) if "paper" in parts else [part for part in parts if part not in files]
    if names:
        say("reading lm-eval's list of tasks, which takes some seconds")
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for several in [*([file] for file in files), names]:  # lm-eval itself would keep only the last of two files' equal names
        for kind, values in (_load(several, several is names) if several else {}).items():
            if both := found[kind].keys() & values.keys():
                raise UserError(
                    f"--tasks {named}: {', '.join(sorted(both))} is there twice; give one of the files another name, or, of "
                    "two YAML files, another 'task:'"
                )
            found[kind] |= values
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"--tasks {name}: it runs code that the model writes, which lite-dil does not; leave it out")
        _set_shots(name, task, PAPER.get(name) if "paper" in parts else shots)
    return found


def parts_of(named: str) -> list[str]:
    """Return the names and files of --tasks."""
    return [part.strip() for part in named.split(",") if part.strip()]


def is_file(part: str) -> bool:
    """Return whether a part of --tasks means a file."""
    return bool(Path(part).suffix) or Path(part).is_file()


def _set_shots(name: str, task: Any, shots: int | None) -> None:
    """Set the number of examples in a task's prompts; None leaves it to the task. Raises UserError for one it cannot have."""
    own = task.get_config("num_fewshot")
    if shots and (own == 0 or task.OUTPUT_TYPE == "loglikelihood_rolling"):
        raise UserError(f"--shots {shots}: {name} is made to be asked without examples; leave --shots or this task out")
    shots = (own or 0) if shots is None else shots
    task.set_config(key="num_fewshot", value=shots)
    sampler = getattr(task, "sampler", None)
    if not shots or sampler is None:
        return
    docs = sampler.fewshot_docs()
    own_split = task.fewshot_cfg.split is not None and task.fewshot_cfg.split == task.config.test_split
    # An item is no example of itself, nor is an equal one.
    most = len(docs) - (max(Counter(map(repr, docs)).values(), default=0) if own_split else 0)
    if shots > most:
        raise UserError(f"--shots {shots}: {name} has {most} examples for a prompt; give at most --shots {most}")


def _load(several: Sequence[str], built_in: bool) -> dict[str, Any]:
    """Return the tasks of files, or of names, for which lm-eval reads all of its files first."""
    from lm_eval.tasks import TaskManager
    from yaml import YAMLError

    manager = TaskManager(include_defaults=built_in)
    for name in several if built_in else ():
        if name not in manager.task_index:
            raise UserError(f"--tasks {name}: no such task or file{did_you_mean(name, manager.all_tasks)}")
    for name in () if built_in else several:
        if not Path(name).is_file():
            raise UserError(f"--tasks {name}: no such file")
        if Path(name).suffix in _YAML and re.search(rb"^group:", Path(name).read_bytes(), re.MULTILINE):
            raise UserError(f"--tasks {name}: lm-eval reads no group from a file; give the files of its tasks")
    wanted = [name if built_in or Path(name).suffix in _YAML else rows_task(Path(name)) for name in several]
    names = ", ".join(several)
    try:
        return dict(manager.load(wanted))
    except ImportError as error:
        raise UserError(
            f"--tasks {names}: {first_line(error)}; lm-eval has extras for some tasks: pip install 'lm-eval[math,ifeval]'"
        ) from None
    except OSError as error:  # of the hub's client and of the datasets package
        raise UserError(
            f"--tasks {names}: the data cannot be downloaded or read ({first_line(error)}); with a network, it is kept for "
            "later, and a FILE.jsonl of rows needs none"
        ) from None
    except YAMLError as error:
        raise UserError(f"--tasks {names}: not valid YAML ({' '.join(str(error).split())})") from None
    # Of lm-eval about what a file says or a group and its own task, and of the datasets package about data that needs code.
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"--tasks {names}: lm-eval cannot use it ({type(error).__name__}: {first_line(error)})") from None


def rows_task(path: Path) -> dict[str, Any]:
    """Return lm-eval's configuration of a task from rows of a file.

    A row has a "question", and either "choices", texts, with "answer", the index of the right one from 0 (or its label in
    "labels"); or an "answer" that is a number, as in GSM8K, with a "solution" that shows how to find it if examples are asked
    for. Choices are scored as lm-eval's arc_challenge does, answers as its gsm8k.

    Raises UserError, with file, line, field and what was expected, for rows that cannot be used.
    """
    rows, problems = list[dict[str, Any]](), list[str]()
    for place, row in file_rows(path):
        try:
            if isinstance(row, RowError):
                raise row
            rows.append(_row(row))
        except RowError as error:
            problems.append(f"{place}: {error}")
    kinds = {"choices" in row for row in rows}
    if len(kinds) > 1 and not problems:
        problems.append(f"{path}: some rows have choices and some have none; put them into two files")
    if problems:
        raise UserError(gather(problems, f"--tasks {path}: rows cannot be used:", _SHOWN))
    if not rows:
        raise UserError(f"--tasks {path}: no rows")

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    common = {
        "task": Path(path.name.removesuffix(".gz").removesuffix(".zst")).stem,
        "custom_dataset": dataset,
        "test_split": "test",
        "fewshot_split": "test",  # without the row that is asked
        "doc_to_text": _QUESTION,
        "metadata": {"version": 1},
    }
    means = {"aggregation": "mean", "higher_is_better": True}
    if kinds == {True}:
        scored = [{"metric": name, **means} for name in ("acc", "acc_norm")]
        choices = {"doc_to_choice": "choices", "doc_to_target": "answer", "metric_list": scored}
        return {**common, **choices, "output_type": "multiple_choice"}
    return {
        **common,
        "output_type": "generate_until",
        "doc_to_target": "{{solution}}",
        "metric_list": [{"metric": "exact_match", **means, **_EXACT}],
        "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False, "temperature": 0.0},
        "filter_list": _NUMBERS,
    }


def _row(row: Any) -> dict[str, Any]:
    """Return what is used of a row. Raises RowError."""
    if not isinstance(row, dict):
        raise RowError("no object", "expected a JSON object with question, answer and, for a choice, choices")
    question, choices, answer = (row.get(name) for name in ("question", "choices", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise RowError("no question", f"question is {question!r:.60}; expected a text")
    if choices is None:
        number = _number(answer)
        solution = row.get("solution")
        if solution is not None and (not isinstance(solution, str) or _plain(_found_in(solution)) != _plain(number)):
            raise RowError("solution", f"solution has no '#### {number}' at its end, by which the answer is found")
        return {"question": question, "solution": solution or f"#### {number}"}
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(each, str) and each for each in choices):
        raise RowError("choices", f"choices is {choices!r:.60}; expected a list of at least 2 texts")
    right = _index(answer, row.get("labels"), len(choices))
    if choices.count(choices[right]) > 1:
        raise RowError("choices", f"the right choice, {choices[right]!r:.60}, is there twice; leave one out")
    return {"question": question, "choices": choices, "answer": right}


def _number(answer: Any) -> str:
    """Return a number as it is looked for in an answer. Raises RowError for what none can be found equal to."""
    finite = isinstance(answer, float) and math.isfinite(answer)
    text = re.sub(r"\.0+$", "", f"{Decimal(repr(answer)):f}" if finite else str(answer).strip())
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not _NUMBER.fullmatch(text):
        raise RowError(
            "no number", f"answer is {answer!r:.60}; expected a number such as 12 or 3.5, since there are no choices"
        )
    return text


def _found_in(solution: str) -> str:
    """Return the number at the end of a solution, "" without one."""
    text = solution.rpartition("#### ")[2].strip() if "#### " in solution else ""
    return text if _NUMBER.fullmatch(text) else ""


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "")


def _index(answer: Any, labels: Any, choices: int) -> int:
    """Return the index of the right choice. Raises RowError, also for a number that may be a label or an index."""
    if labels is not None:
        if not isinstance(labels, list) or len(labels) != choices or len(set(map(str, labels))) != choices:
            raise RowError("labels", f"labels is {labels!r:.60}; expected {choices} different ones, one for each choice")
        if isinstance(answer, str) and answer in map(str, labels):
            return list(map(str, labels)).index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < choices:
        or_label = f", or one of the labels {', '.join(map(str, labels))} as a text" if labels else ""
        raise RowError(
            "answer", f"answer is {answer!r:.60}; expected the index of the right choice, 0 to {choices - 1}{or_label}"
        )
    if labels is not None and str(answer) in map(str, labels) and str(labels[answer]) != str(answer):
        raise RowError(
            "answer",
            f'answer {answer} is an index and also a label of another choice; write the label as a text, "{answer}", '
            "or leave the labels out",
        )
    return answer
