"""On-policy runs of a tiny model, by the command: what they learn from, write, and repeat to the bit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, oracle_logps
from test_more_recipes import eager_model
from trainings import metrics, run, same_weights, weights
from transformers import AutoTokenizer

import lite_dil as dil
from lite_dil.batching.batch import Batch
from lite_dil.cli.main import main
from lite_dil.data.encoder import Example
from lite_dil.online.kept_answers import ANSWERS
from lite_dil.online.rollouts_file import RolloutsFile

REWARDS = '''
import os, signal

def brief(completions, **columns):
    return [-len(completion[0]["content"]) for completion in completions]

def vowels(completions, **columns):
    """Share of letters that are an a or an e."""
    texts = [completion[0]["content"] for completion in completions]
    if (left := os.environ.get("INTERRUPT_AFTER")) is not None:
        os.environ["INTERRUPT_AFTER"] = str(int(left) - 1)
        if left == "1":
            os.kill(os.getpid(), signal.SIGINT)
    if (left := os.environ.get("FAIL_AFTER")) is not None:
        os.environ["FAIL_AFTER"] = str(int(left) - 1)
        if left == "1":
            raise ConnectionError("the judge does not answer")
    return [sum(letter in "ae" for letter in text) / (len(text) + 1) for text in texts]

def same(completions, **columns):
    return [0.5 for _ in completions]

def broken(completions, **columns):
    return [1 / (3 - len(completions)) for _ in completions][:2]
'''

SAMPLED = ("--report-samples", "1")  # of one test: the report's answers cost as much as the steps


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"{' '.join(WORDS[at : at + 3])}?", "answer": at} for at in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARDS)
    return path


@pytest.fixture
def flags(questions: Path, tiny: str, backend_name: str) -> list[str]:
    found = ["--model", tiny, "--backend", backend_name, "--data", str(questions), "--chat", "--max-new-tokens", "6"]
    found += [
        "--dtype",
        "float32",
        "--lora-r",
        "4",
        "--learning-rate",
        "0.01",
        "--logging-steps",
        "1",
        "--report-samples",
        "0",
    ]
    found += ["--batch-size", "2", "--gradient-accumulation-steps", "1", "--max-steps", "4", "--save-steps", "2"]
    return [*found, "--reward", f"{questions.parent / 'rewards.py'}:vowels", "--samples", "3"]


def rollouts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def test_a_step_is_the_eager_gradient_of_the_drawn_answers(flags: list[str], tiny: str, tmp_path: Path) -> None:
    # Passes of 30 tokens hold only parts of a group.
    split = ["--row-tokens", "30", "--target-modules", "q_proj,v_proj,down_proj", "--lora-alpha", "8", "--max-steps", "1"]
    (line,) = run([*flags, "--loss", "rloo", *split], tmp_path / "run")
    rows = rollouts(tmp_path / "run")
    assert len(rows) == 6 and line["reward"] == pytest.approx(np.mean([row["reward"] for row in rows]))
    assert all(row["log_ratio"] == 0 for row in rows)
    for at in (0, 3):  # of a fresh adapter: the reward less the mean of the two siblings'
        r = [row["reward"] for row in rows[at : at + 3]]
        assert rows[at]["advantage"] == pytest.approx(r[0] - (r[1] + r[2]) / 2)

    model, value = eager_model(tiny), torch.zeros(())
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for row in rows:
        prompt = tuple(tokenizer(row["prompt"], add_special_tokens=False).input_ids)
        logps = oracle_logps(model, Batch.of([Example(prompt, (tuple(row["ids"]),), (1,))]))
        value = value - row["advantage"] * logps.sum() / len(rows)
    value.backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None))
    assert line["loss"] == pytest.approx(value.item(), abs=1e-4)
    assert line["grad_norm"] == pytest.approx(norm, rel=2e-3)


def test_online_dpo_is_dpo_of_the_best_and_the_worst(flags: list[str], tmp_path: Path) -> None:
    lines = run([*flags, "--loss", "dpo", "--beta", "0.5", "--max-steps", "2", "--learning-rate", "0.05"], tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    losses, rows = [], [row for row in rollouts(tmp_path / "run") if row["step"] == 2]
    for group in (rows[:3], rows[3:]):
        best, worst = (of(group, key=lambda row: row["reward"]) for of in (max, min))
        if best["reward"] > worst["reward"]:
            losses.append(math.log1p(math.exp(-0.5 * (best["log_ratio"] - worst["log_ratio"]))))
    assert lines[1]["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert any(row["log_ratio"] != 0 for row in rows)
    assert lines[1]["skipped_groups"] == 2 - len(losses)


def test_the_metrics_have_trls_names(flags: list[str], tmp_path: Path) -> None:
    spec = f"answer:number=2,{tmp_path / 'rewards.py'}:vowels"
    lines = run(
        [*flags[:-4], "--reward", spec, "--samples", "3", "--loss", "rloo", "--missing-eos-penalty", "1", *SAMPLED],
        tmp_path / "r",
    )
    assert (tmp_path / "r" / "report_samples.jsonl").is_file()
    rows = [row for row in rollouts(tmp_path / "r") if row["step"] == 3]
    line = lines[2]
    f, r = np.array([row["log_ratio"] for row in rows]), np.array([row["reward"] for row in rows])
    parts = [row["rewards"] for row in rows]
    tokens = sum(len(row["ids"]) for row in rows)
    cut = [not row["ended"] for row in rows]
    np.testing.assert_allclose(r, [2 * p["answer:number"] + p["vowels"] - c for p, c in zip(parts, cut, strict=True)])
    expected = {
        "reward": r.mean(),
        "reward_std": np.mean([r[:3].std(ddof=1), r[3:].std(ddof=1)]),
        "rewards/vowels/mean": np.mean([p["vowels"] for p in parts]),
        "objective": (r - 0.05 * f).mean(),
        "kl/answer": f.mean(),
        "kl": f.sum() / tokens,
        "completions/mean_length": tokens / 6,
        "completions/clipped_ratio": np.mean(cut),
    }
    for name, value in expected.items():
        assert line[name] == pytest.approx(value, abs=1e-6), name
    assert line["entropy"] > 0
    page = (tmp_path / "r" / "report.html").read_text()
    last = [row for row in rollouts(tmp_path / "r") if row["step"] == 4]
    r, lengths = np.array([row["reward"] for row in last]), [len(row["ids"]) for row in last]
    by_length = f"{np.corrcoef(r, lengths)[0, 1]:+.2f}" if np.ptp(r) and np.ptp(lengths) else "not defined"
    assert "The mean reward of new answers went from" in page
    assert f"length with its reward is {by_length}".replace("+", "&#43;") in page or f"reward is {by_length}" in page
    assert f"best: reward {r.max():.3g}" in page and f"worst: reward {r.min():.3g}" in page
    assert {"frac_reward_zero_std", "skipped_groups", "refilled_groups"} <= line.keys()


def test_equal_rewards_take_no_step_at_all(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], backend_name: str
) -> None:
    same = [flag.replace(":vowels", ":same") for flag in flags]
    lines = run([*same, "--loss", "rloo", "--weight-decay", "0.5", "--refill", "2", "--max-steps", "2"], tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: all rewards are equal within each prompt" in said
    assert all(line["grad_norm"] == 0 and line["skipped_groups"] == 2 for line in lines)
    assert all(line["refilled_groups"] == 4 and line["frac_reward_zero_std"] == 1 for line in lines)
    up = {name: value for name, value in weights(tmp_path / "run" / "adapter").items() if "lora_B" in name or "lora_b" in name}
    assert up and not any(value.any() for value in up.values())
    first = run([*flags, "--loss", "rloo", "--max-steps", "1", "--learning-rate", "1e-30"], tmp_path / "other")
    assert first[0]["grad_norm"] > 0
    a = {name: value for name, value in weights(tmp_path / "run" / "adapter").items() if name not in up}
    b = weights(tmp_path / "other" / "adapter")
    assert all(np.allclose(value, b[name], rtol=1e-6) for name, value in a.items())  # no decay of the other half either


def test_the_datas_own_answers_are_rewarded_before_training(
    flags: list[str], questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that a drawn one could be: the others are longer than --max-new-tokens, here 6 with the end token."""
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    own = ["a e", "a", "z", " ".join(WORDS[:9]), " ".join(WORDS[:12]), ""]
    questions.write_text("".join(json.dumps(row | {"response": text}) + "\n" for row, text in zip(rows, own, strict=True)))
    run([*flags, "--loss", "rloo", "--max-steps", "1"], tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert "reward of the data's own answers: mean 0.333, 0 to 0.5 over 3 rows" in said
    assert "2 of the data's own answers are longer than --max-new-tokens 6, and were not rewarded" in said


class Killed(BaseException):
    """Ends a run as a kill does: nothing is saved."""


def killed(flags: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = RolloutsFile.after_step

    def die(self: RolloutsFile, event: Any) -> None:
        write(self, event)
        if event.step == 3:
            raise Killed

    monkeypatch.setattr(RolloutsFile, "after_step", die)
    with pytest.raises(Killed):
        main(["train", *flags, "--output-dir", str(folder)])
    monkeypatch.setattr(RolloutsFile, "after_step", write)
    assert rollouts(folder)[-1]["step"] == 3 and metrics(folder)[-1]["step"] == 3


def interrupted(flags: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first is the preflight's, which is step 1's. With two steps on each set of answers, step 3 begins the second set.
    monkeypatch.setenv("INTERRUPT_AFTER", "2" if "--num-iterations" in flags else "3")
    assert main(["train", *flags, "--output-dir", str(folder)]) == 130
    monkeypatch.delenv("INTERRUPT_AFTER")


def failed(flags: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL_AFTER", "4")
    assert main(["train", *flags, "--save-steps", "100", "--output-dir", str(folder)]) == 2
    monkeypatch.delenv("FAIL_AFTER")


SEVERAL = ["--num-iterations", "2", "--kl-estimator", "k3", "--reward-scale", "running"]


@pytest.mark.parametrize(
    ("ended", "more"),
    [(killed, []), (interrupted, []), (interrupted, SEVERAL), (failed, [])],
    ids=["killed", "interrupted", "within a set", "failed"],
)
def test_a_resumed_run_is_the_same_to_the_bit(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ended: Callable[..., None],
    more: list[str],
) -> None:
    own = flags[flags.index("--reward") + 1]
    if more:  # the held-out reward is part of what a checkpoint within a set keeps
        more = [*more, "--eval-reward", own.replace("vowels", "brief")]
    flags = [*flags, "--loss", "rloo", "--refill", "0", *more]
    run(flags, tmp_path / "whole")
    ended(flags, tmp_path / "parts", monkeypatch)
    assert (tmp_path / "parts" / "checkpoints" / "step-3" / ANSWERS).is_file() == bool(more)
    if ended is failed:
        said = " ".join(capsys.readouterr().err.split())
        assert "ConnectionError: the judge does not answer" in said and "Step 3 is saved" in said
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "parts")]) == 2
    assert "which no file grants to run: give it again" in capsys.readouterr().err
    again = ["--reward", own, *more[-2:]]
    assert main(["train", "--resume", str(tmp_path / "parts"), *again]) == 0
    assert rollouts(tmp_path / "parts") == rollouts(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert same_weights(tmp_path / "parts" / "adapter", tmp_path / "whole" / "adapter")


def test_several_steps_on_the_same_answers(flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, "--loss", "rloo", "--refill", "0", "--learning-rate", "0.1", "--warmup-ratio", "0"]
    one = run([*flags, "--max-steps", "1"], tmp_path / "one")
    first = run([*flags, "--max-steps", "1", "--num-iterations", "3"], tmp_path / "first")
    assert same_weights(tmp_path / "one" / "adapter", tmp_path / "first" / "adapter")
    assert first[0]["grad_norm"] == one[0]["grad_norm"] and not {"clip_ratio", "importance_ratio"} & one[0].keys()

    lines = run([*flags, "--max-steps", "4", "--num-iterations", "3"], tmp_path / "run")
    assert [row["step"] for row in rollouts(tmp_path / "run")] == [1] * 6 + [4] * 6
    assert [line["reward"] == lines[0]["reward"] for line in lines] == [True, True, True, False]
    assert [line["epoch"] for line in lines] == pytest.approx([1 / 9, 2 / 9, 1 / 3, 4 / 9])
    for at in (0, 3):
        assert lines[at]["importance_ratio"] == pytest.approx(1, abs=1e-5) and lines[at]["clip_ratio"] == 0
        assert lines[at]["loss"] == pytest.approx(0, abs=1e-5)
    assert lines[1]["clip_ratio"] > 0.05 and lines[1]["loss"] < -1e-3  # the surrogate gains
    wide = run([*flags, "--max-steps", "2", "--num-iterations", "3", "--epsilon", "0.9"], tmp_path / "wide")
    assert wide[1]["clip_ratio"] < lines[1]["clip_ratio"] and wide[1]["importance_ratio"] == lines[1]["importance_ratio"]


def test_k3_and_a_scale_of_rewards(flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, "--loss", "rloo", "--beta", "0.5", "--max-steps", "2", "--refill", "0"]
    k3 = run([*flags, "--kl-estimator", "k3", "--reward-scale", "running"], tmp_path / "k3")
    k1 = run([*flags, "--reward-scale", "group"], tmp_path / "k1")
    rows, seen = rollouts(tmp_path / "k3"), []
    for line, at in zip(k3, (0, 6), strict=True):
        seen += [row["reward"] for row in rows[at : at + 6]]
        assert line["reward_scale"] == pytest.approx(np.std(seen, ddof=1))
        r = np.array([row["reward"] for row in rows[at : at + 3]]) / np.std(seen, ddof=1)
        assert [row["advantage"] for row in rows[at : at + 3]] == pytest.approx(1.5 * (r - r.mean()), abs=1e-12)
    for row in rollouts(tmp_path / "k1")[:3]:
        r = np.array([other["reward"] for other in rollouts(tmp_path / "k1")[:3]])
        scaled = 1.5 * (row["reward"] - r.mean()) / (r.std(ddof=1) + 1e-4)
        assert row["advantage"] == pytest.approx(scaled, abs=1e-12)
    assert any(row["log_ratio"] != 0 for row in rows) and k1[0]["grad_norm"] > 0
    # At the reference k3 has no gradient at all: equal rewards take no step with it either.
    same = [flag.replace(":vowels", ":same") for flag in flags]
    assert run([*same, "--kl-estimator", "k3", "--max-steps", "1"], tmp_path / "same")[0]["grad_norm"] == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--loss rloo --epsilon 0.1", "--epsilon needs --num-iterations above 1"),
        ("--loss dpo --kl-estimator k3", "--kl-estimator: --loss dpo has its own term for the reference"),
        ("--loss dpo --reward-scale group", "--reward-scale: --loss dpo takes only the order of rewards"),
    ],
)
def test_options_without_a_use_are_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, said: str
) -> None:
    assert main(["train", *flags, *given.split(), "--output-dir", str(tmp_path / "run")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_target_kl_ends_the_training(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast = [*flags, "--loss", "rloo", "--target-kl", "0.001", "--learning-rate", "0.2"]
    lines = run(fast, tmp_path / "run")
    assert 1 < len(lines) < 4 and (tmp_path / "run" / "adapter").is_dir()
    # The step that shows the distance is logged, and changes nothing.
    assert lines[-1]["kl/answer"] > 0.001 and lines[-1]["grad_norm"] == 0 and lines[0]["grad_norm"] > 0
    assert "above --target-kl 0.001: the training ends with step" in " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["state"], report["steps"]) == ("finished", len(lines)) and "before the 4 steps" in report["why"]
    again = ["--reward", flags[flags.index("--reward") + 1]]
    assert main(["train", "--resume", str(tmp_path / "run"), *again]) == 0
    assert "the run is finished" in capsys.readouterr().out
    assert metrics(tmp_path / "run") == lines


def test_target_kl_is_looked_at_before_each_step_on_the_same_answers(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--loss", "rloo", "--num-iterations", "4", "--learning-rate", "0.05"]
    lines = run([*flags, *more, "--target-kl", "0.01"], tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert 1 < len(lines) < 4 and lines[-1]["grad_norm"] == 0  # within the first set of answers
    assert re.search(r"the KL from the reference is \S+ nats, above --target-kl 0.01: the training ends with step", said)
    # Up to there nothing differs from a run without a limit.
    assert run([*flags, *more], tmp_path / "free")[: len(lines) - 1] == lines[:-1]


def test_a_prompt_with_two_right_answers_is_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "1 + 1?", "answer": "2"}, {"prompt": "1 + 1?", "answer": "3"}]
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags[flags.index("--data") + 1] = str(path)
    assert main(["train", *flags, "--loss", "rloo", "--output-dir", str(tmp_path / "run")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "line 2" in said and "line 1" in said and "'answer'" in said


def test_a_program_gives_rows_and_a_function(questions: Path, tiny: str, backend_name: str, tmp_path: Path) -> None:
    def short(completions: list[Any]) -> list[float]:
        return [-len(completion[0]["content"]) for completion in completions]

    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    options = {"max_new_tokens": 4, "samples": 2, "batch_size": 1, "max_steps": 1, "report_samples": 0}
    with dil.load(tiny, backend=backend_name, dtype="float32", lora_r=4) as policy:
        data = dil.read(rows, chat=True)
        trained = dil.train(policy, data, loss="rloo", reward=["answer:number", short], output_dir=tmp_path / "run", **options)
        assert {"reward", "rewards/short/mean", "rewards/answer:number/mean"} <= trained.metrics[0].keys()
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "answer:number,function:short:" in config
