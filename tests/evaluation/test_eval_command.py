"""``lite-dil eval`` on rows of questions and on pairs: what it writes, shows, keeps and refuses."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import yaml
from conftest import WORDS, write_pairs
from safetensors.numpy import load_file, save_file

from lite_dil.cli.main import main
from lite_dil.evaluation.benchmarks import harness
from lite_dil.evaluation.statistics import compare_paired, holm
from lite_dil.reports.scores import EVAL, outdated_lines, read_evaluations, read_scores

harness.require()


def write_choices(path: Path, rows: int = 14) -> Path:
    draw = random.Random(3)
    made = []
    for number in range(rows):
        choices = [" ".join(draw.choices(WORDS, k=draw.randint(1, 3))) + str(i) for i in range(3)]
        made.append({"id": number, "question": " ".join(draw.choices(WORDS, k=5)), "choices": choices, "answer": number % 3})
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def write_sums(path: Path) -> Path:
    rows = [{"question": f"what is {n} and {n}", "choices": None, "answer": str(2 * n)} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    write_choices(folder / "choices.jsonl")
    write_sums(folder / "sums.jsonl")
    pairs = write_pairs(folder / "plain.jsonl").read_text().splitlines()
    with (folder / "pairs.jsonl").open("w") as file:
        for number, line in enumerate(pairs):
            file.write(json.dumps(json.loads(line) | {"subset": "even" if number % 2 == 0 else "odd"}) + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(trained: Callable[..., Path], tiny: str) -> list[Path]:
    flags = ("--model", tiny, "--backend", "cpu")
    return [trained(*flags), trained(*flags, "--seed", "5")]


@pytest.fixture(scope="module")
def done(runs: list[Path], files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation of both runs on everything, with its results in "store"."""
    output = tmp_path_factory.mktemp("done")
    tasks = f"{files / 'choices.jsonl'},{files / 'sums.jsonl'}"
    argv = ["eval", "--adapter", str(runs[0]), "--adapter", str(runs[1]), "--tasks", tasks, "--shots", "1"]
    argv += ["--preferences", str(files / "pairs.jsonl"), "--samples", "3", "--sample-tokens", "6"]
    assert main([*argv, "--output", str(output), "--store", str(output / "store")]) == 0
    return output


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "eval_samples.jsonl").read_text().splitlines()]


def test_its_figures_are_those_of_its_items(done: Path) -> None:
    content, rows = read_scores(done), samples(done)
    assert content is not None
    names = [each["name"] for each in content["adapters"]]
    figures = {(figure["task"], figure["metric"]): figure for figure in content["figures"]}
    assert {task for task, _ in figures} == {"choices", "sums"}
    assert {metric for task, metric in figures if task == "sums"} == {
        f"exact_match, {n}" for n in ("strict-match", "flexible-extract")
    }
    of = {
        name: [row["models"][name]["figures"]["acc"] for row in rows if row["task"] == "choices"] for name in ("base", *names)
    }
    figure = figures["choices", "acc"]
    assert figure["items"] == 14 and figure["base"]["mean"] == np.mean(of["base"])
    compared = [compare_paired(of["base"], of[name]) for name in names]
    assert [each["mean"] for each in figure["adapters"]] == [np.mean(of[name]) for name in names]
    assert [each["p_holm"] for each in figure["adapters"]] == holm([each.p for each in compared])
    assert [(each["gained"], each["lost"]) for each in figure["adapters"]] == [(c.gained, c.lost) for c in compared]
    how = content["settings"]
    assert (how["choices"]["template"], how["sums"]["template"]) == ("none", "chat")
    assert (how["choices"]["shots"], how["choices"]["items"], how["choices"]["truncated"]) == (1, 14, 0)
    for row in rows:  # a row's own question is no example of itself
        assert row["prompt"].count("Question:") == 2 and len(set(row["prompt"].split("Question:")[1:])) == 2
    own = json.loads((done / "lm_eval_base.json").read_text())["results"]["choices"]
    assert own["acc,none"] == figure["base"]["mean"]
    for path in (done / "store").glob("*.jsonl"):  # results of another device are others
        assert json.loads(path.read_text().partition("\n")[0])["computed"].startswith("cpu torch float32")


def test_preferences_by_subset(done: Path, files: Path, runs: list[Path]) -> None:
    content = read_scores(done)
    assert content is not None
    for found in content["preferences"].values():
        every, even, odd = found["subsets"]
        assert [each["subset"] for each in (every, even, odd)] == ["all", "even", "odd"]
        for rule in ("implicit reward", "mean log-prob", "the longer answer"):
            both = even["pairs"] * even[rule]["mean"] + odd["pairs"] * odd[rule]["mean"]
            assert every[rule]["mean"] == pytest.approx(both / every["pairs"])
        assert sum(each["pairs"] for each in found["calibration"]["bins"]) == every["pairs"] == 12
        away = found["distance"]
        assert away["answers"] == 3 and away["kl"]["low"] <= away["kl"]["mean"] <= away["kl"]["high"]
    for run, found in zip(runs, content["preferences"].values(), strict=True):  # as the run's own loss takes it
        trained = yaml.safe_load((run / "config.yaml").read_text())
        assert (found["beta"], found["reduction"]) == (trained["beta"] or 1, trained["logp_reduction"])
    # It was trained on these pairs, which by implicit reward it then prefers.
    assert all(found["subsets"][0]["implicit reward"]["mean"] > 0.8 for found in content["preferences"].values())


def test_what_is_known_is_not_computed_again(
    done: Path,
    runs: list[Path],
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither the base's nor an adapter's results; items and figures come out the same."""
    tasks, copy = f"{files / 'choices.jsonl'},{files / 'sums.jsonl'}", tmp_path / "output"

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("it is known")

    monkeypatch.setattr("lite_dil.evaluation.stored_model.token_hits", never)
    monkeypatch.setattr("lite_dil.generation.batch_generator.BatchGenerator.draw", never)
    argv = ["eval", "--adapter", str(runs[0]), "--tasks", tasks, "--shots", "1", "--store", str(done / "store")]
    pairs = ["--preferences", str(files / "pairs.jsonl"), "--samples", "3", "--sample-tokens", "6"]
    assert main([*argv, *pairs, "--output", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "asked: choices: 1-shot, no chat template, no BOS" in said and "no difference can be seen with n = 14" in said
    table = said.partition("Benchmarks")[2].partition("choices acc:")[0].splitlines()
    assert len(table) > 5 and max(map(len, table)) <= 80
    names = ("base", runs[0].name)
    first = [{name: row["models"][name] for name in names} for row in samples(done)]
    assert [row["models"] for row in samples(copy)] == first
    of_pairs = [(read_scores(folder) or {})["preferences"][runs[0].name] for folder in (done, copy)]
    for name in ("subsets", "calibration", "distance"):
        assert of_pairs[0][name] == of_pairs[1][name]
    with pytest.raises(AssertionError, match="it is known"):  # other examples in the prompt are other requests
        main([*argv[:-3], "0", *argv[-2:], "--output", str(tmp_path / "other")])
    with pytest.raises(AssertionError, match="it is known"):  # and so are other answers of a model
        main([*argv, *pairs, "--seed", "1", "--output", str(tmp_path / "other")])


def test_an_evaluation_that_is_stopped_continues(
    runs: list[Path], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was computed before is kept, and the result is that of one that was not stopped."""
    argv = ["eval", "--adapter", str(runs[0]), "--tasks", str(files / "choices.jsonl"), "--store", str(tmp_path / "store")]
    monkeypatch.setattr("lite_dil.evaluation.stored_model._SCORED_TOKENS", 1)
    from lite_dil.evaluation import stored_model

    real, calls = stored_model.token_hits, list[int]()

    def stopping(*given: Any) -> Any:
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*given)

    monkeypatch.setattr(stored_model, "token_hits", stopping)
    assert main([*argv, "--output", str(tmp_path / "a")]) == 130
    assert "the same command continues" in capsys.readouterr().out and not (tmp_path / "a").exists()
    calls[:] = [0] * 10
    assert main([*argv, "--output", str(tmp_path / "a")]) == 0
    assert len(calls) == 10 + 2 * 14 - 5
    monkeypatch.setattr(stored_model, "token_hits", real)
    assert main([*argv[:-1], str(tmp_path / "other"), "--output", str(tmp_path / "b")]) == 0
    one, other = (read_scores(tmp_path / name) for name in "ab")
    assert one is not None and other is not None and one.pop("made") < other.pop("made")
    assert one == other


def test_at_strength_0_nothing_differs(runs: list[Path], files: Path, tmp_path: Path) -> None:
    argv = ["eval", "--adapter", str(runs[0]), "--tasks", str(files / "choices.jsonl"), "--strength", "0"]
    assert main([*argv, "--output", str(tmp_path), "--store", str(tmp_path / "store"), "--limit", "5"]) == 0
    for row in samples(tmp_path):
        assert row["models"]["base"] == row["models"][f"{runs[0].name} x0"]


def test_without_an_adapter_it_is_the_base_alone(
    tiny: str, files: Path, tmp_path: Path, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", "--model", tiny, "--backend", "cpu", "--dtype", "float32", "--tasks", str(files / "choices.jsonl")]
    assert main([*argv, "--shots", "1", "--output", str(tmp_path), "--store", str(done / "store")]) == 0
    assert "base: " in (said := capsys.readouterr().out) and "no results are known" not in said
    first = [row["models"]["base"] for row in samples(done) if row["task"] == "choices"]
    assert [row["models"] for row in samples(tmp_path)] == [{"base": each} for each in first]


BAD = [
    (
        {"question": "q", "choices": ["a", "b"], "answer": 7},
        "line 1: answer is 7; expected the index of the right choice, 0 to 1",
    ),
    ({"question": "", "choices": ["a", "b"], "answer": 0}, "line 1: question is ''; expected a text"),
    ({"question": "q", "choices": ["a"], "answer": 0}, "expected a list of at least 2 texts"),
    ({"question": "q", "answer": None}, "answer is None; expected a number"),
    ({"question": "q", "answer": "2", "solution": "two"}, "solution has no '#### 2'"),
]


@pytest.mark.parametrize(("row", "said"), BAD)
def test_rows_that_cannot_be_used_are_named(
    row: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["eval", "--tasks", str(tmp_path / "bad.jsonl")]) == 2
    assert said in capsys.readouterr().err


def test_requests_that_make_no_sense_are_refused(
    files: Path, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks, pairs, adapter = str(files / "choices.jsonl"), str(files / "pairs.jsonl"), ["--adapter", str(runs[0])]
    damaged = tmp_path / "damaged.yaml"
    damaged.write_text("task: x\noutput_type: nonsense\n")
    away = tmp_path / "away.yaml"  # of the hub, which no test reaches
    away.write_text("task: y\ndataset_path: nobody/nothing\noutput_type: multiple_choice\ntest_split: test\n")
    for argv, said in (
        ([], "give --tasks, --preferences or both"),
        (["--preferences", pairs], "give --adapter too"),
        (["--tasks", tasks, "--strength", "0.5"], "--strength 0.5 is for one --adapter"),
        (["--tasks", tasks, "--limit", "0"], "--limit is 0"),
        (["--tasks", f"{tasks},{tasks}"], "given twice"),
        (["--tasks", "paper", "--shots", "2"], "sets the examples"),
        (["--tasks", str(tmp_path / "none.jsonl")], "no such file"),
        ([*adapter, *adapter, "--tasks", tasks], "it is given twice"),
        (["--tasks", tasks, "--samples", "3", "--max-rows", "5"], "--samples, --max-rows: only for --preferences"),
        (["--tasks", tasks, "--seed", "0"], "--seed: only for --preferences"),
        ([*adapter, "--preferences", pairs, "--shots", "1"], "--shots: only for --tasks"),
        ([*adapter, "--preferences", pairs, "--template", "chat"], "--template: only for --tasks"),
        (["--tasks", str(damaged)], "lm-eval cannot use it"),
        (["--tasks", str(away)], "the data cannot be downloaded or read"),
    ):
        assert main(["eval", *argv]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["eval", "--tasks", tasks]) == 2
    assert "benchmarks need lm-eval: pip install" in capsys.readouterr().err


def test_the_results_of_a_run_are_in_its_folder_and_shown(
    runs: list[Path], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report, the card and the list of runs show them; a damaged file is one message."""
    run = Path(shutil.copytree(runs[0], tmp_path / "my-run"))
    argv = ["eval", "--adapter", str(run), "--tasks", str(files / "choices.jsonl"), "--store", str(tmp_path / "store")]
    assert main(argv) == 0
    page = (run / "report.html").read_text()
    assert "Benchmarks" in page and "no difference can be seen with n = 14" in page and "0-shot" in page
    assert "Benchmarks" in (run / "adapter" / "README.md").read_text()
    capsys.readouterr()
    assert main(["runs", str(tmp_path / "my-run")]) == 0
    assert "choices acc, 0-shot" in capsys.readouterr().out
    (path,) = run.glob(f"evaluations/*/{EVAL}")
    path.write_text(path.read_text().replace('"items": 14', '"items": 15'))
    assert main(["runs", str(tmp_path / "my-run")]) == 0
    assert "damaged" in capsys.readouterr().out


def test_evaluations_of_a_run_lie_side_by_side(
    runs: list[Path], files: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another evaluation replaces none; that of a checkpoint or a strength says so; one of another adapter is left out."""
    run = Path(shutil.copytree(runs[0], tmp_path / "task"))  # a name that is also a field of each item
    card = run / "adapter" / "README.md"
    card.write_text(card.read_text().replace("## Limits", "My own words.\n\n## Limits"))
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    choices, store = str(files / "choices.jsonl"), ["--store", str(tmp_path / "store")]
    for argv in (
        ["--adapter", str(run), "--tasks", choices, "--limit", "5"],
        ["--adapter", str(run), "--preferences", str(files / "pairs.jsonl"), "--samples", "0"],
        ["--adapter", str(checkpoint), "--tasks", choices, "--strength", "0.5", "--limit", "4"],
        ["--adapter", str(checkpoint), "--tasks", choices, "--strength", "0.5", "--limit", "4"],  # once more
    ):
        assert main(["eval", *argv, *store]) == 0
    found = read_evaluations(run)
    half = f"task/{checkpoint.name} x0.5"
    assert [each["adapters"][0]["name"] for each in found.current] == [half, "task", "task"] and not found.outdated
    (folder,) = (run / "evaluations").glob("choices-*/lm_eval_task.json")
    assert {row["task"] for row in samples(folder.parent)} == {"choices"}
    assert samples(folder.parent)[0]["models"].keys() == {"base", "task"}
    page = (run / "report.html").read_text()
    assert all(title in page for title in ("Benchmarks: task<", f"Benchmarks: {half}<", "Preferences: task<"))
    written = card.read_text()
    assert written.count("## Benchmarks and preferences") == 1 and "My own words.\n\n## Limits" in written
    assert "**Benchmarks: task**" in written and "**Preferences: task**" in written and "x0.5" not in written
    capsys.readouterr()
    assert main(["runs", str(run)]) == 0
    assert "choices acc, 0-shot, first 4 items 0." in (said := capsys.readouterr().out) and f"({half})" in said
    weights = next((run / "adapter").glob("*.safetensors"))
    shutil.copy(next(runs[1].glob("adapter/*.safetensors")), weights)
    found = read_evaluations(run)
    assert [each["adapters"][0]["name"] for each in found.current] == [half] and len(found.outdated) == 2
    assert "not shown; evaluate again" in " ".join(outdated_lines(found))


def test_the_base_serves_every_adapter(
    runs: list[Path], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one whose numbers in 16 bits differ so much between layouts that a model with it is given another one."""
    loud = Path(shutil.copytree(runs[1], tmp_path / "loud")) / "adapter"
    for path in loud.glob("*.safetensors"):
        save_file({name: 300 * value for name, value in load_file(path).items()}, path)
    (loud / "digests.json").unlink()
    argv = ["eval", "--tasks", str(files / "choices.jsonl"), "--limit", "3", "--backend", "cpu", "--dtype", "bfloat16"]
    argv += ["--store", str(tmp_path / "store")]
    for number, adapter in enumerate((runs[0] / "adapter", loud)):
        assert main([*argv, "--adapter", str(adapter), "--output", str(tmp_path / str(number))]) == 0
        said = capsys.readouterr().out
        assert "packed layout" in said and ("base: 9 results are known" in said) == bool(number)


def test_an_output_folder_keeps_its_evaluation(runs: list[Path], files: Path, done: Path) -> None:
    before = (done / EVAL).read_bytes()
    argv = ["eval", "--adapter", str(runs[0]), "--tasks", str(files / "choices.jsonl"), "--output", str(done)]
    assert main(argv) == 2
    assert (done / EVAL).read_bytes() == before


def test_bad_pairs_are_found_before_anything_is_computed(
    runs: list[Path], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')

    def never(*_: Any) -> Any:
        raise AssertionError("it computes")

    monkeypatch.setattr("lite_dil.evaluation.stored_model.token_hits", never)
    argv = ["eval", "--adapter", str(runs[0]), "--tasks", str(files / "choices.jsonl"), "--store", str(tmp_path / "store")]
    assert main([*argv, "--preferences", str(tmp_path / "bad.jsonl")]) == 2
    assert "rejected" in capsys.readouterr().err


def test_a_comparison_evaluates_every_loss(tiny: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["compare", "--model", tiny, "--backend", "cpu", "--data", str(files / "plain.jsonl"), "--losses", "lsif,dpo"]
    argv += ["--eval-data", str(files / "plain.jsonl"), "--max-steps", "2", "--lora-r", "4", "--sample-prompts", "1"]
    argv += ["--sample-tokens", "4", "--output", str(tmp_path / "out"), "--eval", str(files / "choices.jsonl")]
    assert main([*argv, "--eval-limit", "6"]) == 0
    assert "dpo-seed0: choices acc: no difference" in capsys.readouterr().out
    (content,) = read_evaluations(tmp_path / "out").current
    assert [each["name"] for each in content["adapters"]] == ["lsif-seed0", "dpo-seed0"]
    assert content["settings"]["choices"]["items"] == 6
    for file in ("index.html", "table.md"):
        assert "Benchmarks: dpo-seed0" in (tmp_path / "out" / file).read_text()
    assert main([*argv[:-2], "--eval-limit", "6"]) == 2
    assert main([*argv[:-1], str(tmp_path / "none.jsonl")]) == 2
    assert main([*argv, "--auto"]) == 2 and "--eval needs one way to load the model" in capsys.readouterr().err


def test_an_evaluation_that_fails_leaves_the_comparison(tiny: str, files: Path, tmp_path: Path) -> None:
    """Its page and table are written; the API gives the scores of one that went well."""
    import lite_dil as dil

    given: dict[str, Any] = {"backend": "cpu", "max_steps": 1, "sample_prompts": 1, "sample_tokens": 4, "losses": ["dpo"]}
    given |= {"eval_data": str(files / "plain.jsonl"), "output_dir": tmp_path / "out"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lite_dil.recipes.comparison.evaluate", Mock(side_effect=dil.UserError("no such data")))
        with pytest.raises(dil.UserError, match=r"no such data\nonly the evaluation is missing; .*index\.html"):
            dil.compare(tiny, str(files / "plain.jsonl"), eval_tasks=str(files / "choices.jsonl"), **given)
    assert (tmp_path / "out" / "index.html").exists() and (tmp_path / "out" / "table.md").exists()
    found = dil.compare(tiny, str(files / "plain.jsonl"), eval_tasks=str(files / "choices.jsonl"), eval_limit=2, **given)
    assert found.scores[0]["settings"]["choices"]["items"] == 2
    run, store = next((tmp_path / "out").rglob("dpo-seed0")), tmp_path / "store"
    one = dil.evaluate(run, tasks=str(files / "choices.jsonl"), limit=2, output_dir=tmp_path / "one", store=store)
    assert one.content["figures"] == found.scores[0]["figures"] and len(list(store.glob("*.jsonl"))) == 2
    with pytest.raises(dil.UserError, match="eval_limit belongs to eval_tasks"):
        dil.compare(tiny, str(files / "plain.jsonl"), eval_limit=2, **given)
