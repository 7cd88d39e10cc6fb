"""The tasks of ``lite-dil eval``: which are refused, and what is made of the figures of their items."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lite_dil.base.errors import UserError
from lite_dil.evaluation.benchmarks import harness
from lite_dil.evaluation.benchmarks.measure import TaskScores, figures, measure_tasks, own_figures
from lite_dil.evaluation.benchmarks.tasks import load_tasks
from lite_dil.reports.scores import Evaluations, score_tables, score_words

harness.require()
from lm_eval.api.model import LM  # noqa: E402

TEXTS = ["the red house", "a blue cup of tea", "you"]
YAML = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{{{{text}}}}"
metric_list: {metrics}
"""


class Lengths(LM):
    """A language model of known log-likelihoods: minus `scale` times the number of a text's letters."""

    adds_bos = False

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.truncated = scale, set[Any]()

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(-self.scale * len(request.args[1]), len(request.args[1]) < 5) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return [-self.scale * len(request.args[0]) for request in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns the file of a task on `TEXTS`."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "texts.json"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def make(name: str, kind: str, metrics: str, text: str = "what") -> Path:
        path = folder / f"{name}.yaml"
        path.write_text(YAML.format(name=name, data=data, kind=kind, metrics=metrics, text=text))
        return path

    return make


def load(named: str, shots: int | None = None) -> dict[str, Any]:
    return load_tasks(named, shots, lambda _: None)


def questions(path: Path, rows: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    row = {"choices": ["a", "b"], "answer": 0}
    path.write_text("".join(json.dumps({"question": f"is it {n}?", **row}) + "\n" for n in range(rows)))
    return path


def test_only_means_of_items_get_an_interval(write: Callable[..., Path]) -> None:
    """A perplexity is the exponential of a mean, or of sums over words: it is lm-eval's own number, and has no interval."""
    rolling = write("rolling", "loglikelihood_rolling", "[{metric: word_perplexity}, {metric: bits_per_byte}]", text="")
    scored = write("scored", "loglikelihood", "[{metric: perplexity}, {metric: acc}]")
    loaded = load(f"{rolling},{scored}")
    base, tuned = (measure_tasks(lambda _, s=scale: Lengths(s), loaded, "none", None, False) for scale in (1.0, 0.5))
    known = figures(base, {"run": tuned}, {})
    assert [(figure["task"], figure["metric"], figure["base"]["mean"]) for figure in known] == [("scored", "acc", 1 / 3)]
    own = {(each["task"], each["metric"]): each for each in own_figures(base, {"run": tuned}, known)}
    letters, words = sum(map(len, TEXTS)), sum(len(text.split()) for text in TEXTS)
    expected = {
        ("rolling", "word_perplexity"): lambda scale: math.exp(scale * letters / words),
        ("rolling", "bits_per_byte"): lambda scale: scale / math.log(2),
        ("scored", "perplexity"): lambda scale: math.exp(scale * letters / len(TEXTS)),
    }
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        assert own[name]["base"] == pytest.approx(value(1.0))
        assert own[name]["adapters"] == [{"name": "run", "value": pytest.approx(value(0.5))}]
    content = {"adapters": [{"name": "run"}], "figures": known, "own_figures": list(own.values()), "preferences": {}}
    assert [len(table.rows) for table in score_tables(content)] == [1, 3]


def test_a_group_hides_only_figures_that_it_has() -> None:
    """Items of its tasks are taken together; where lm-eval weighs its tasks alike, its number is shown too."""
    items = {"a": [1.0, 0.0], "b": [1.0] * 4, "c": [0.0]}
    metric = {"a": "acc", "b": "acc", "c": "f"}

    def item(task: str, number: int, value: float) -> dict[str, Any]:
        name = metric[task]
        return {"doc_id": number, "doc_hash": "", "prompt_hash": "", "filter": "none", "metrics": [name], name: value}

    scores = TaskScores(
        {"results": {"both": {"alias": "both", "acc,none": 0.75, "acc_stderr,none": "N/A"}}},
        {task: [item(task, *each) for each in enumerate(values)] for task, values in items.items()},
        {},
        {task: {name: "mean"} for task, name in metric.items()},
    )
    known = figures(scores, {}, {"both": ["a", "b"], "mixed": ["a", "c"]})
    found = {figure["task"]: (figure["part"], figure["items"], figure["base"]["mean"]) for figure in known}
    assert found == {"a": (True, 2, 0.5), "b": (True, 4, 1.0), "c": (False, 1, 0.0), "both": (False, 6, pytest.approx(5 / 6))}
    assert [(each["by"], each["base"]) for each in own_figures(scores, {}, known)] == [("mean of its tasks", 0.75)]


def test_a_score_in_a_list_says_how_it_was_asked() -> None:
    """Of a group too, if its tasks were asked alike; and of which adapter it is, if it is not the run's own as it is."""
    how = {"shots": 5, "template": "chat", "limit": 10, "bos": False, "truncated": 0}
    figure = {"task": "g", "metric": "acc", "part": False, "base": {"mean": 0.5}, "adapters": [{"name": "run", "mean": 0.625}]}
    content: dict[str, Any] = {
        "adapters": [{"name": "run", "adapter": "adapter", "strength": 1}],
        "groups": {"g": ["a", "b"]},
        "settings": {"a": how, "b": how},
        "figures": [figure],
    }
    assert score_words(Evaluations([content], [])) == "g acc, 5-shot, chat template, first 10 items 0.500>0.625"
    content["settings"] = {"a": how, "b": how | {"shots": 0}}
    assert score_words(Evaluations([content], [])) == "g acc 0.500>0.625"
    content["adapters"] = [{"name": "run/step-2 x0.5", "adapter": "checkpoints/step-2/adapter", "strength": 0.5}]
    assert score_words(Evaluations([content], [])) == "g acc 0.500>0.625 (run/step-2 x0.5)"


def test_tasks_that_cannot_be_used_are_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    four, other = questions(tmp_path / "q.jsonl", 4), questions(tmp_path / "b" / "q.jsonl", 4)
    rolling = write("texts", "loglikelihood_rolling", "[{metric: bits_per_byte}]", text="")
    fixed = write("fixed", "loglikelihood", "[{metric: acc}]\nnum_fewshot: 0")
    twice = write("q", "loglikelihood", "[{metric: acc}]")
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: [x\n  output_type: y\n")
    group = tmp_path / "group.yaml"
    group.write_text("group: g\ntask: [{task: a}]\n")
    for named, shots, said in (
        (f"{four},{other}", None, "q is there twice"),
        (f"{four},{twice}", None, "q is there twice"),
        (f"{four}", 4, "q has 3 examples for a prompt; give at most --shots 3"),
        (f"{rolling}", 2, "texts is made to be asked without examples"),
        (f"{fixed}", 2, "fixed is made to be asked without examples"),
        (f"{broken}", None, "not valid YAML"),
        (f"{group}", None, "reads no group from a file"),
    ):
        with pytest.raises(UserError, match=said):
            load(named, shots)
    assert load(f"{four},{fixed}", 0)["tasks"].keys() == {"q", "fixed"}
    assert load(str(four), 3)["tasks"]["q"].config.num_fewshot == 3
    assert load(str(questions(tmp_path / "v1.2.jsonl", 2)))["tasks"].keys() == {"v1.2"}


def test_what_lm_eval_cannot_load_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group beside one of its own tasks; data that would run code."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(TaskManager, "__init__", lambda self, **_: None)
    monkeypatch.setattr(TaskManager, "task_index", {"g": 1, "t": 1}, raising=False)
    for error in (ValueError("Duplicate task 't': found in both 'g' and 't'"), RuntimeError("Dataset scripts are no longer")):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(TaskManager, "load", fail)
        with pytest.raises(UserError, match=f"--tasks g, t: lm-eval cannot use it .*{str(error)[:14]}"):
            load("g,t")


NUMBERS = [("12", "12"), (12.0, "12"), ("12.00", "12"), (3.5, "3.5"), (1e-7, "0.0000001"), ("$1,200", "$1,200"), (-3, "-3")]


def test_answers_are_looked_for_as_they_can_be_found(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    rows = [{"question": f"q{n}", "answer": answer} for n, (answer, _) in enumerate(NUMBERS)]
    rows += [{"question": "solved", "answer": "1,200", "solution": "so it is\n#### 1200"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load(str(path))["tasks"]["sums"]
    expected = [*(f"#### {found}" for _, found in NUMBERS), "so it is\n#### 1200"]
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == expected


LABELLED = {"question": "q", "choices": ["a", "b", "c"]}


def test_labels_and_indices_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "choices.jsonl"
    more: list[dict[str, Any]] = [
        {"answer": "2", "labels": ["1", "2", "3"]},
        {"answer": "3", "labels": [1, 2, 3]},
        {"answer": 1, "labels": ["0", "1", "2"]},
        {"answer": 2, "labels": ["A", "B", "C"]},
    ]
    path.write_text("".join(json.dumps(LABELLED | {"question": str(n)} | row) + "\n" for n, row in enumerate(more)))
    task = load(str(path))["tasks"]["choices"]
    assert [doc["answer"] for doc in task.eval_docs] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q", "answer": "twelve"}, "answer is 'twelve'; expected a number such as 12"),
        ({"question": "q", "answer": "1/2"}, "expected a number such as 12"),
        ({"question": "q", "answer": "2", "solution": "it is\n#### 3"}, "solution has no '#### 2'"),
        ({"question": "q", "answer": "2", "solution": "#### 2\nor so"}, "solution has no '#### 2'"),
        (LABELLED | {"answer": 2, "labels": [1, 2, 3]}, "answer 2 is an index and also a label of another choice"),
        (LABELLED | {"answer": "D", "labels": ["A", "B", "C"]}, "or one of the labels A, B, C"),
        (LABELLED | {"answer": 0, "labels": ["A", "B"]}, "expected 3 different ones"),
        (LABELLED | {"answer": 0, "choices": ["a", "b", "a"]}, "the right choice, 'a', is there twice"),
    ],
)
def test_answers_that_could_only_be_wrong_are_refused(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="line 1: ") as error:
        load(str(tmp_path / "bad.jsonl"))
    assert said in str(error.value)
