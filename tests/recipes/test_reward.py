"""Reward models through the command line, on both backends, on tiny models: training, resuming, scoring, exporting."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import bare_model, examples, load, write_pairs
from safetensors.numpy import load_file, save_file
from trainings import metrics, same_weights
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lite_dil as dil
from lite_dil.backends.types import POLICY, Head
from lite_dil.base.display import Silent
from lite_dil.base.errors import UserError
from lite_dil.base.observer import Event, Observer
from lite_dil.batching.batch import Batch
from lite_dil.cli.main import main
from lite_dil.config import reward_source
from lite_dil.config.options import build
from lite_dil.config.reward_source import find_reward, head_on, open_reward
from lite_dil.config.train_config import TrainConfig
from lite_dil.data.dataset import reader_of
from lite_dil.export import reward
from lite_dil.export.reward import pad_token
from lite_dil.generation import policy as policies
from lite_dil.generation.policy import AdapterSource, Policy
from lite_dil.recipes.reward import train_reward
from lite_dil.rewards.heads import HeadReward
from lite_dil.rewards.source import Answered
from lite_dil.runs.seal import DIGESTS

TRL_NAMES = {
    "loss",
    "accuracy",
    "margin",
    "mean_reward",
    "min_reward",
    "max_reward",
    "grad_norm",
    "learning_rate",
    "num_tokens",
}
LENGTH = {"eval_length_correlation", "eval_longer_accuracy"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITE_DIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def flags(tiny: str, data: Path, backend: str, *more: str) -> list[str]:
    """12 pairs in steps of 4, so that 2 epochs are 6 steps."""
    return [
        "--model", tiny, "--backend", backend, "--data", str(data), "--dtype", "float32", "--learning-rate", "1e-2",
        "--batch-size", "2", "--gradient-accumulation-steps", "2", "--epochs", "2", "--lora-r", "4", *more,
    ]  # fmt: skip


def run(options: list[str], folder: Path, *more: str) -> list[dict[str, Any]]:
    assert main(["reward", *options, "--output-dir", str(folder), *more]) == 0
    return metrics(folder)


def same_head(one: Path, other: Path) -> bool:
    a, b = load_file(one / "head.safetensors"), load_file(other / "head.safetensors")
    return all(np.array_equal(a[name], b[name]) for name in a | b)


@pytest.fixture(scope="module")
def trained(tiny: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of the cpu backend, which is only read."""
    folder = tmp_path_factory.mktemp("trained") / "rm"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITE_DIL_CACHE", str(folder.parent / "cache"))
        run(flags(tiny, data, "cpu"), folder, "--eval-data", str(data), "--reward-loss", "bce")
    return folder


# --- training


@pytest.mark.parametrize("loss", ["bt", "bt-variance", "lsif"])
def test_a_run_is_resumed_as_if_it_had_never_stopped(
    tiny: str, data: Path, backend_name: str, tmp_path: Path, loss: str
) -> None:
    """After a kill, and after a Ctrl-C; with TRL's names, and what length alone gives beside the evaluation."""
    options = flags(tiny, data, backend_name, "--eval-data", str(data), "--reward-loss", loss, "--lora-dropout", "0.1")
    whole = run(options, tmp_path / "whole", "--eval-steps", "3", "--save-steps", "4")
    training, held_out = ([line for line in whole if name in line] for name in ("loss", "eval_loss"))
    assert set(training[0]) >= TRL_NAMES
    assert set(held_out[0]) >= LENGTH | {"eval_accuracy", "eval_margin", "eval_reward/chosen"}
    assert training[0]["mean_reward"] == 0  # a head starts at zero
    assert held_out[-1]["eval_accuracy"] > 0.8 and held_out[-1]["eval_margin"] > 0
    assert ("capped" in training[0], "log_v" in training[0]) == (loss == "lsif", loss == "bt-variance")
    assert not any(name.startswith(("rewards/", "logps/", "log_ratio/")) for line in whole for name in line)
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    shutil.rmtree(killed / "adapter")
    shutil.rmtree(killed / "checkpoints" / "step-6")
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert main(["reward", "--resume", str(killed)]) == 0
    assert metrics(killed) == whole
    for name in ("adapter", "checkpoints/step-6/adapters/policy"):
        assert same_weights(killed / name, tmp_path / "whole" / name) and same_head(killed / name, tmp_path / "whole" / name)
        assert json.loads((killed / name / "reward.json").read_text())["loss"] == loss
    report = (killed / "report.html").read_text()
    assert "scores higher than the rejected one" in report and "Log-ratio to the reference" not in report


class StopsAt(Observer):
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, event: Event) -> None:
        if event.step == self.step:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_saves_and_the_run_goes_on(tiny: str, data: Path, backend_name: str, tmp_path: Path) -> None:
    whole = run(flags(tiny, data, backend_name), tmp_path / "whole")
    given = {"model": tiny, "backend": backend_name, "data": str(data), "output_dir": str(tmp_path / "run")}
    given |= {"learning_rate": "1e-2", "batch_size": "2", "gradient_accumulation_steps": "2", "epochs": "2", "lora_r": "4"}
    config = build({**given, "dtype": "float32"}, {"loss": "reward:bt"})
    assert train_reward(config, Silent(), observers=[StopsAt(3)]).stopped
    assert not (tmp_path / "run" / "adapter").exists()
    assert main(["reward", "--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == whole
    assert same_head(tmp_path / "run" / "adapter", tmp_path / "whole" / "adapter")


def test_a_first_start_with_resume_auto_trains_bt(tiny: str, data: Path, tmp_path: Path) -> None:
    options = flags(tiny, data, "cpu", "--max-steps", "1", "--center-rewards-coefficient", "0.01", "--label-smoothing", "0.1")
    run(options, tmp_path / "run", "--resume", "auto")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["loss"] == "reward:bt"
    assert main(["reward", "--resume", "auto", "--output-dir", str(tmp_path / "run")]) == 0


def test_responses_without_their_end_are_left_out_and_said(
    tiny: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(flags(tiny, data, "cpu", "--max-steps", "1"), tmp_path / "whole")
    assert "left out" not in capsys.readouterr().out
    run(flags(tiny, data, "cpu", "--max-steps", "1", "--max-length", "11"), tmp_path / "cut")
    said = capsys.readouterr().out
    facts = json.loads((tmp_path / "cut" / "report.json").read_text())["data"][0]
    assert 0 < facts["without_end"] < 12 and facts["examples"] == 12 - facts["without_end"]
    assert f"{facts['without_end']} of 12 examples left out, because --max-length 11 cuts a response before its end" in said
    assert main(["reward", *flags(tiny, data, "cpu", "--max-length", "4")]) == 2
    assert "no training example is left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["reward", "--beta", "0.1"], "--beta is of lite-dil train and changes nothing here"),
        (["reward", "--reference-cache", "off"], "--reference-cache is of lite-dil train"),
        (["reward", "--reward-loss", "dpo"], "expected one of bt, bt-variance"),
        (["reward", "--reward-loss", "bt", "--log-ratio-cap", "2"], "belongs to --reward-loss ukl, lsif, not to reward:bt"),
        (["reward", "--reward-loss", "bce", "--center-rewards-coefficient", "1"], "belongs to --reward-loss bt"),
        (["reward", "--label-smoothing", "0.7"], "expected between 0 and 0.499"),
        (["reward", "--config", "policy.yaml"], "dpo trains a policy, which is lite-dil train"),
        (["reward", "--config", "samples.yaml"], "--report-samples answers prompts, which a reward model cannot"),
        (["train", "--label-smoothing", "0.1"], "--label-smoothing is of lite-dil reward and changes nothing here"),
        (["train", "--loss", "bt"], "is not one of"),
        (["train", "--config", "reward.yaml"], "trains a reward model, which is lite-dil reward"),
    ],
)
def test_options_that_do_not_apply_are_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("policy.yaml").write_text("loss: dpo\n")
    Path("reward.yaml").write_text("reward_loss: bt\n")
    Path("samples.yaml").write_text("reward_loss: bt\nreport_samples: 2\n")
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_data_without_pairs_is_refused_by_bt_and_taken_by_a_ratio(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "what is", "completion": f"the {side} tea {n}", "label": side == "good"}
        for n in range(4)
        for side in ("good", "bad")
    ]
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["reward", *flags(tiny, file, "cpu")]) == 2
    assert "needs pairs" in capsys.readouterr().err
    lines = run(flags(tiny, file, "cpu", "--reward-loss", "bce"), tmp_path / "run")
    assert lines[-1]["reward/chosen"] > lines[-1]["reward/rejected"] and "accuracy" not in lines[-1]


def with_margins(data: Path, folder: Path, margins: list[Any]) -> Path:
    """The pairs with a column 'margin'; None leaves it out."""
    rows, file = [json.loads(line) for line in data.read_text().splitlines()], folder / "margins.jsonl"
    for row, margin in zip(rows, margins, strict=False):
        row |= {} if margin is None else {"margin": margin}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[: len(margins)]))
    return file


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_a_margin_is_part_of_the_loss(tiny: str, data: Path, tmp_path: Path, backend: str) -> None:
    """In micro-batches of one pair; the held-out part has its own; another margin is other data on --resume."""
    file = with_margins(data, tmp_path, [2.5] * 12)
    options = flags(tiny, file, backend, "--batch-size", "1", "--eval-fraction", "0.25", "--max-steps", "2")
    lines = run(options, tmp_path / "run", "--logging-steps", "1", "--eval-steps", "1", "--save-steps", "1")
    assert lines[0]["loss"] == pytest.approx(np.log1p(np.exp(2.5)), abs=1e-6)  # a head at zero
    held_out = next(line for line in lines if "eval_loss" in line)
    assert held_out["eval_loss"] > np.log1p(np.exp(2.5 - held_out["eval_margin"])) - 1e-6  # Jensen
    shutil.rmtree(tmp_path / "run" / "adapter")
    with_margins(data, tmp_path, [2.5] * 11 + [2.0])
    assert main(["reward", "--resume", str(tmp_path / "run")]) == 2


@pytest.mark.parametrize(
    ("margins", "more", "message"),
    [
        ([1.0, "much"], [], "line 2: field 'margin' is 'much'; expected a finite number"),
        ([1.0, True], [], "line 2: field 'margin' is 'True'; expected a finite number"),
        ([1.0, float("nan")], [], "line 2:"),
        ([1.0, None], [], "line 1 has a field 'margin', but the row has none; all or no rows"),
        ([None, 1.0], [], "line 1 has no field 'margin', but the row has one; all or no rows"),
        ([1.0, 1.0], ["--reward-loss", "bce"], "which --reward-loss bce cannot take: only bt compares two rewards"),
        ([1.0, 1.0], ["--columns", "margin=gap", "--reward-loss", "bce"], "--columns margin=gap: only lite-dil reward with"),
        ([1.0, 1.0], ["--columns", "margins=gap"], "unknown field 'margins' (did you mean 'margin'?)"),
        ([1.0, 1.0], ["--label-smoothing", "0.1"], "what the margin of a wrong label is nobody says"),
    ],
)
def test_margins_that_are_refused(
    tiny: str,
    data: Path,
    tmp_path: Path,
    margins: list[Any],
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = with_margins(data, tmp_path, margins)
    assert main(["reward", *flags(tiny, file, "cpu"), *more, "--output-dir", "run"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_margin_may_have_another_name(data: Path, tmp_path: Path) -> None:
    file = with_margins(data, tmp_path, [2.5, -1.0])
    file.write_text(file.read_text().replace('"margin"', '"gap"'))
    read = [reader_of(str(file), "train", TrainConfig(columns=columns), margins=True) for columns in ("margin=gap", None)]
    assert [[row.margin for row in rows] for rows in read] == [[2.5, -1.0], [0.0, 0.0]]


# --- what a score reads


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_a_score_is_of_the_end_tokens_own_state_in_any_layout_and_batch(tiny: str, backend: str) -> None:
    """Responses end with the token that is also the pad token: padding is told by place, never by token."""
    end = 2  # the tiny model's pad token and end
    rows = [type(e)(e.prompt, tuple((*r[:-1], end) for r in e.responses), e.signs, e.place) for e in examples(4)]
    whole, shared = Batch.of(rows), {"cpu": "packed", "mlx": "prefix"}[backend]
    found = []
    for layout in ("plain", shared):
        model = load(backend, tiny, layout=layout)
        model.set_head(Head(1))
        _draw_head(model)
        found += [
            model.scores(whole, POLICY)[:, 0],
            np.concatenate([model.scores(Batch.of([row]), POLICY)[:, 0] for row in rows]),
        ]
    weight, bias = _weights()
    bare = bare_model(tiny)
    expected = []
    with torch.no_grad():
        for row in rows:
            for response in row.responses:
                states = bare(torch.tensor([[*row.prompt, *response]]), output_hidden_states=True).hidden_states[-1][0]
                expected.append(float(states[-1].numpy() @ weight[0] + bias[0]))
    for each in found:
        np.testing.assert_allclose(each, expected, atol=2e-4)


def _weights() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(3)
    return draw.normal(size=(1, 64)).astype(np.float32) / 8, np.array([0.25], np.float32)


def _draw_head(model: Any) -> None:
    """Give the policy's head weights, through its files."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_state(Path(folder))
        weight, bias = _weights()
        save_file({"weight": weight, "bias": bias}, Path(folder) / "adapters" / POLICY / "head.safetensors")
        model.load_state(Path(folder))


# --- scoring


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_score_marks_the_best_makes_pairs_and_goes_on(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = tmp_path / "answers.jsonl"
    given: list[dict[str, Any]] = [
        {
            "id": "a",
            "prompt": [{"role": "user", "content": "what is tea"}],
            "responses": ["the tea yes", "the tea no", "Paris no"],
        },
        {"prompt": [{"role": "user", "content": "how"}], "completion": [{"role": "assistant", "content": "do yes"}]},
        {"prompt": [{"role": "user", "content": "how"}], "response": "do no"},
        {"prompt": [{"role": "user", "content": "good"}], "responses": ["bread", "bread"]},
        {"prompt": [{"role": "user", "content": "red"}], "chosen": "house yes", "rejected": "house no"},
        {"prompt": [{"role": "user", "content": "cut"}], "completion": "the the the", "finish_reason": "length"},
    ]
    answers.write_text("".join(json.dumps(row) + "\n" for row in given))
    argv = ["score", str(answers), "--reward", str(trained), "--pairs", "pairs.jsonl"]
    assert main(argv) == 0
    said, scored = capsys.readouterr().err, rows_of(tmp_path / "answers.scores.jsonl")
    assert [(row["id"], row["response"]) for row in scored[:4]] == [("a", 0), ("a", 1), ("a", 2), (f"{answers} line 2", 0)]
    assert [row.get("label") for row in scored] == [None] * 7 + [True, False, None]
    assert "1 of 10 responses are not scored" in said and scored[-1]["score"] is None and "best" not in scored[-1]
    for group in (scored[:3], scored[3:5], scored[5:7], scored[7:9]):  # rows with the same prompt are one group
        assert sum(row["best"] for row in group) == 1
        assert next(row for row in group if row["best"])["score"] == max(row["score"] for row in group)
    pairs = rows_of(tmp_path / "pairs.jsonl")
    assert len(pairs) == 3 and "1 prompts left out, whose responses all have the same score" in said
    assert pairs[0]["chosen_score"] > pairs[0]["rejected_score"] and "yes" in pairs[0]["chosen"][0]["content"]
    assert main(["data", "pairs.jsonl", "--model", str(yaml.safe_load((trained / "config.yaml").read_text())["model"])]) == 0
    # A part of the file, as a Ctrl-C leaves it: the same command scores the rest, and the file is the same.
    whole = (tmp_path / "answers.scores.jsonl").read_text()
    (tmp_path / "answers.scores.jsonl").write_text("".join(whole.splitlines(keepends=True)[:4]) + '{"id": "a", "resp')
    assert main(argv) == 0
    again = rows_of(tmp_path / "answers.scores.jsonl")
    for one, other in zip(scored, again, strict=True):  # in other batches, whose rounding differs
        assert (one.pop("score") or 0) == pytest.approx(other.pop("score") or 0, abs=1e-5)
        assert {**one, "key": one["key"][:16]} == {**other, "key": other["key"][:16]}
    whole = (tmp_path / "answers.scores.jsonl").read_text()
    (tmp_path / "answers.scores.jsonl").write_text(whole.replace('"score": ', '"score": 1', 1))
    assert main(argv) == 2 and "line 1 was changed" in capsys.readouterr().err


def test_scores_are_those_of_the_evaluation(trained: Path, data: Path, tmp_path: Path) -> None:
    assert main(["score", str(data), "--reward", str(trained)]) == 0
    scored = [row["score"] for row in rows_of(tmp_path / "pairs.scores.jsonl")]
    last = [line for line in metrics(trained) if "eval_loss" in line][-1]
    assert np.mean(scored) == pytest.approx(last["eval_mean_reward"], abs=1e-5)
    assert (min(scored), max(scored)) == pytest.approx((last["eval_min_reward"], last["eval_max_reward"]), abs=1e-5)


TEXTS = ["the tea yes", "Paris no"]


def test_a_program_scores_as_the_command_does(trained: Path, tmp_path: Path) -> None:
    """Data read without --chat: a text prompt is continued, although the model has a chat template."""
    Path("a.jsonl").write_text(json.dumps({"prompt": "what is", "responses": TEXTS}) + "\n")
    scores = []
    for chat in ([], ["--chat"]):
        assert main(["score", "a.jsonl", "--reward", str(trained), "--output", f"s{len(chat)}.jsonl", *chat]) == 0
        scores.append([row["score"] for row in rows_of(tmp_path / f"s{len(chat)}.jsonl")])
    with dil.load_reward(trained, backend="cpu") as found:
        assert found.score("what is", TEXTS) == pytest.approx(scores[0], abs=1e-5)
        assert found.score([{"role": "user", "content": "what is"}], TEXTS) == pytest.approx(scores[1], abs=1e-5)
    assert scores[0] != pytest.approx(scores[1], abs=1e-3)


def test_an_adapter_outside_its_run_keeps_how_its_data_was_read(trained: Path) -> None:
    shutil.copytree(trained / "adapter", "rm")
    read = find_reward("rm", {"backend": "cpu"}).read
    assert read == find_reward(str(trained), {"backend": "cpu"}).read and read.keys() == {"chat", "max_length"}


def test_a_reward_that_cannot_be_loaded_closes_its_base(
    trained: Path, tiny_tied: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, "copy")
    Path("copy", "adapter", DIGESTS).unlink()
    file = Path("copy", "config.yaml")
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"model": tiny_tied}))
    closed, real = list[Policy](), Policy.close
    monkeypatch.setattr(Policy, "close", lambda policy: closed.append(policy) or real(policy))
    with pytest.raises(UserError, match="has other weights"):
        dil.load_reward("copy", backend="cpu")
    assert len(closed) == 1


def test_rows_that_are_the_same_have_their_own_scores(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All are counted, one is the best, and nothing is left for a second run to score."""
    Path("a.jsonl").write_text((json.dumps({"id": "a", "prompt": "what is", "responses": TEXTS}) + "\n") * 2)
    argv = ["score", "a.jsonl", "--reward", str(trained), "--pairs", "p.jsonl"]
    assert main(argv) == 0
    whole = rows_of(tmp_path / "a.scores.jsonl")
    assert [sum(row["best"] for row in whole), len({row["key"] for row in whole})] == [1, 4]
    assert whole[0]["score"] == whole[2]["score"] and len(rows_of(tmp_path / "p.jsonl")) == 1
    capsys.readouterr()
    monkeypatch.setattr(reward_source, "open_reward", None)  # the model is not loaded again
    assert main(argv) == 0
    assert "4 of 4 scores are in" in capsys.readouterr().err and rows_of(tmp_path / "a.scores.jsonl") == whole


def test_pairs_replace_no_other_file(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = json.dumps({"id": "a", "prompt": "what is", "responses": TEXTS}) + "\n"
    for name in ("a.jsonl", "b.jsonl", "notes.jsonl"):
        Path(name).write_text(row)
    Path("linked.jsonl").hardlink_to("b.jsonl")
    Path("folder").symlink_to(".")
    argv = ["score", "a.jsonl,b.jsonl", "--reward", str(trained), "--output", "s.jsonl", "--pairs"]
    for pairs, message in [
        ("linked.jsonl", "is the file of answers"),
        ("folder/a.jsonl", "is the file of answers"),
        ("folder/s.jsonl", "is the file of scores"),
        ("notes.jsonl", "line 1 is not from this command"),
    ]:
        assert main([*argv, pairs]) == 2
        assert message in capsys.readouterr().err
    assert main([*argv[:-2], "b.jsonl"]) == 2 and "--output b.jsonl is the file of answers" in capsys.readouterr().err
    assert Path("b.jsonl").read_text() == Path("notes.jsonl").read_text() == row and not Path("s.jsonl").exists()
    assert main([*argv, "p.jsonl"]) == 0 == main([*argv, "p.jsonl"])  # its own file is written again
    Path("p.jsonl").write_text(Path("p.jsonl").read_text().replace("yes", "no", 1))
    assert main([*argv, "p.jsonl"]) == 2 and "--pairs p.jsonl line 1 was changed" in capsys.readouterr().err


def test_a_head_is_refused_on_another_base_and_where_it_is_damaged(trained: Path, tiny_tied: str, tmp_path: Path) -> None:
    found = find_reward(str(trained), {"backend": "cpu"})
    other = find_reward(str(trained), {"backend": "cpu", "model": tiny_tied})
    with pytest.raises(UserError, match="has other weights: its head reads states that this model does not have"):
        open_reward(other, lambda text: None).__enter__()
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    file = copy / "adapter" / "reward.json"
    file.write_text(file.read_text().replace('"scale": 1.0', '"scale": 2.0'))
    with pytest.raises(UserError, match=r"reward\.json is not what was written"):
        find_reward(str(copy), {"backend": "cpu"})
    for argv in (["chat"], ["generate", "x.txt", "--output", "o.jsonl"]):
        Path("x.txt").write_text("hello\n")
        assert main([*argv, "--adapter", str(trained)]) == 2
    assert found.description.loss == "bce"


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_a_reward_beside_a_policy_on_one_base(trained: Path, tiny: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of either backend, added to the policy's base: rewards of token ids, NaN where a response was cut."""
    options = build({"model": tiny, "backend": backend, "dtype": "float32", "data": "x.jsonl"}, {})
    policy = policies.load(AdapterSource(None, None, options), lambda text: None, options)
    head = head_on(policy, find_reward(str(trained), {"backend": backend}), lambda text: None)
    assert head.name == "rm"
    answers = [Answered("", "", (5, 6, 7), (8, 9, 2), True, {}), Answered("", "", (4, 3), (8, 2), True, {})]
    answers += [Answered("", "", (5, 6, 7), (9, 9), False, {}), Answered("", "", (5, 6, 7), (10, 2), True, {})]
    got = head.rewards(answers)
    assert np.isnan(got).tolist() == [False, False, True, False]
    one = [head.rewards([answer])[0] for answer in answers]
    np.testing.assert_allclose(got, one, atol=1e-5)
    assert len(set(got[[0, 1, 3]].tolist())) == 3
    passes, real = list[int](), policy.backend.scores
    monkeypatch.setattr(policy.backend, "scores", lambda batch, adapter: passes.append(batch.examples) or real(batch, adapter))
    limited = HeadReward(policy.backend, head.adapter, head.description, head.name, lambda text: None, row_tokens=6)
    np.testing.assert_allclose(limited.rewards(answers), got, atol=1e-5)  # two responses to a prompt in passes of their own
    assert passes == [1, 1, 1]
    policy.close()


# --- export


def test_the_exported_classifier_scores_as_the_trained_model(trained: Path, data: Path, tmp_path: Path) -> None:
    """Loaded by transformers alone, on texts in a padded batch, with the checkpoint's pad token the end token."""
    assert main(["export", "--adapter", str(trained), "--format", "reward", "--output", "out", "--check-rows", "6"]) == 0
    facts = json.loads(Path("out/export.json").read_text())
    assert facts["check"]["ok"] and facts["check"]["rows"] == 6 and facts["pad_token"] == "<|endoftext|>"
    assert main(["score", str(data), "--reward", str(trained)]) == 0
    rows = rows_of(tmp_path / "pairs.scores.jsonl")[:6]
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained("out").eval(), AutoTokenizer.from_pretrained("out")
    assert model.config.num_labels == 1 and tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    texts = [tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False).rstrip() for row in rows]
    for side in ("left", "right"):
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            got = model(**inputs).logits[:, 0].numpy() + facts["bias"]
        np.testing.assert_allclose(got, [row["score"] for row in rows], atol=1e-4)
    card = Path("out/README.md").read_text()
    assert "text-classification" in card and "scores higher in" in card
    # Scored in bfloat16 by lite-dil, in float32 by transformers: rounding, which is allowed.
    rounded = ["--dtype", "bfloat16", "--output", "rounded", "--check-rows", "6"]
    assert main(["export", "--adapter", str(trained), "--format", "reward", *rounded]) == 0
    check = json.loads(Path("rounded/export.json").read_text())["check"]
    assert check["mean"] > 1e-3 * check["spread"] and check["allowed"] == 0.25


def test_an_export_of_another_kind_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--adapter", str(trained), "--format", "merged", "--output", "out"]) == 2
    assert "is a reward model, which writes no text: --format reward" in capsys.readouterr().err


def test_an_export_with_another_head_is_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check fails where the files are not the trained model: here with the head's weight negated."""
    real = reward._head
    monkeypatch.setattr(reward, "_head", lambda folder, scale: (-real(folder, scale)[0], real(folder, scale)[1]))
    assert main(["export", "--adapter", str(trained), "--format", "reward", "--output", "out"]) == 1
    assert Path("out.refused").is_dir() and not Path("out").exists()


def test_a_pad_token_is_one_that_ends_no_response(tiny: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert pad_token(tokenizer, [2], 512)[0] == "<|endoftext|>"
    with pytest.raises(UserError, match="no special token but those that end a response"):
        pad_token(tokenizer, [0, 1, 2], 512)
