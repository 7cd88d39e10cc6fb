"""Models that reward a policy's own answers: a trained head, another policy's log-ratio, a classifier of transformers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, bare_model, examples, oracle_logps, write_pairs
from safetensors.numpy import load_file, save_file
from trainings import export, metrics, run, same_weights
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lite_dil.backends.types import POLICY, REFERENCE
from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.cli.main import main
from lite_dil.config.implicit_source import find_implicit
from lite_dil.config.options import build
from lite_dil.config.reward_source import find_reward, head_on
from lite_dil.data.encoder import Example
from lite_dil.generation import policy as policies
from lite_dil.generation.policy import AdapterSource, Policy
from lite_dil.models.adapter_files import read_adapter
from lite_dil.reports.drawn_answers import warnings_of
from lite_dil.rewards.classifier import ClassifierReward, ClassifierText
from lite_dil.rewards.description import read_description
from lite_dil.rewards.source import Answered
from lite_dil.rewards.spec import parse
from lite_dil.runs.history import History
from lite_dil.runs.seal import DIGESTS, seal

QUICK = ["--dtype", "float32", "--lora-r", "4", "--batch-size", "2", "--gradient-accumulation-steps", "1"]


@pytest.fixture(scope="module")
def short(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model that ends about a third of its answers within 5 tokens: its end token points along the mean state."""
    folder = tmp_path_factory.mktemp("short") / "base"
    shutil.copytree(tiny, folder)
    model, tokens = bare_model(tiny), torch.from_numpy(np.random.default_rng(0).integers(3, 512, (16, 24)))
    with torch.no_grad():
        mean = model(tokens, output_hidden_states=True).hidden_states[-1].mean((0, 1))
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][2] = 3.5 * mean.numpy() / float(mean @ mean)
    save_file(weights, file, {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def place(short: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts, a reward model `rm` and a policy `dpo`, both of the cpu backend, which are only read."""
    folder = tmp_path_factory.mktemp("models")
    data = write_pairs(folder / "pairs.jsonl")
    rows = [{"prompt": f"{' '.join(WORDS[at : at + 3])}?", "answer": at} for at in range(6)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", short, "--backend", "cpu", "--data", str(data), *QUICK, "--learning-rate", "0.02"]
    assert main(["reward", *given, "--epochs", "2", "--output-dir", str(folder / "rm")]) == 0
    run([*given, "--loss", "dpo", "--beta", "0.3", "--max-steps", "4", "--report-samples", "0"], folder / "dpo")
    return folder


@pytest.fixture
def flags(place: Path, short: str, backend_name: str) -> list[str]:
    """A short run on answers of at most 5 tokens, some of which end and some of which are cut."""
    given = ["--model", short, "--backend", backend_name, "--data", str(place / "questions.jsonl"), "--chat", *QUICK]
    given += ["--max-new-tokens", "5", "--learning-rate", "0.01", "--report-samples", "0", "--logging-steps", "1"]
    return [*given, "--loss", "rloo", "--samples", "4", "--max-steps", "2", "--save-steps", "1", "--refill", "0"]


def rollouts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def beside(model: str, backend: str, **more: Any) -> Policy:
    """A fresh policy, for training."""
    options = build({"model": model, "backend": backend, "dtype": "float32", "lora_r": 4, "data": "x.jsonl", **more}, {})
    return policies.load(AdapterSource(None, None, options), lambda text: None, options)


def examples_of(rows: list[dict[str, Any]], model: str) -> list[Example]:
    """The drawn answers, each with its prompt, as token ids."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tuple(tokenizer(row["prompt"], add_special_tokens=False).input_ids) for row in rows]
    return [Example(prompt, (tuple(row["ids"]),), (1,)) for prompt, row in zip(prompts, rows, strict=True)]


# --- a trained head


def test_a_head_rewards_the_answers_and_a_cut_one_gets_its_lowest_score(
    flags: list[str],
    short: str,
    place: Path,
    tmp_path: Path,
    backend_name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rm = str(place / "rm")
    lines = run([*flags, "--reward", f"{rm}=2", "--missing-eos-penalty", "0.5"], tmp_path / "run")
    assert "of 2 prompts have answers of different rewards" in " ".join(capsys.readouterr().out.split())
    rows = rollouts(tmp_path / "run")
    cut = np.array([not row["ended"] for row in rows])
    assert 0 < cut.sum() < len(rows)
    policy = beside(short, backend_name)
    head = head_on(policy, find_reward(rm, {"backend": backend_name}), lambda text: None)
    expected = np.concatenate(head.scores(examples_of(rows, short)))[:, 0]
    policy.close()
    lowest = read_description(place / "rm" / "adapter").lowest
    assert lowest is not None
    expected[cut] = lowest
    np.testing.assert_allclose([row["rewards"]["rm"] for row in rows], expected, atol=1e-5)
    np.testing.assert_allclose([row["reward"] for row in rows], 2 * expected - 0.5 * cut, atol=1e-5)
    assert lines[0]["rewards/rm/mean"] == pytest.approx(expected[:8].mean(), abs=1e-5) and lines[0]["grad_norm"] > 0
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints" / "step-2" / "adapters").iterdir()) == ["policy"]


def test_the_lowest_score_is_that_of_the_training_data(place: Path, tmp_path: Path, short: str) -> None:
    assert main(["score", str(place / "pairs.jsonl"), "--reward", str(place / "rm"), "--output", str(tmp_path / "s")]) == 0
    scores = [json.loads(line)["score"] for line in (tmp_path / "s").read_text().splitlines()]
    found = read_description(place / "rm" / "adapter")
    assert (found.lowest, found.highest) == pytest.approx((min(scores), max(scores)), abs=1e-5)
    assert found.cut_score(0.1, place) == found.lowest and found.cut_score(-2.0, place) == found.highest


@pytest.mark.parametrize("bits", [[], [("load_in_4bit", True)]], ids=["full", "4bit"])
def test_policy_reference_and_head_do_not_disturb_each_other(
    short: str, place: Path, backend_name: str, bits: list[tuple[str, bool]]
) -> None:
    policy = beside(short, backend_name, **dict(bits))
    backend, batch = policy.backend, Batch.of(examples(4))
    alone = {}
    for name in (POLICY, REFERENCE):
        with backend.using(name):
            alone[name] = backend.token_logps(batch)
    head = head_on(policy, find_reward(str(place / "rm"), {"backend": backend_name}), lambda text: None)
    again = head_on(policy, find_reward(str(place / "rm"), {"backend": backend_name}), lambda text: None)
    assert head.adapter == again.adapter  # loaded once
    scores = backend.scores(batch, head.adapter)
    assert scores.std() > 0.1
    for _ in range(2):
        for name in (POLICY, REFERENCE):
            with backend.using(name):
                assert np.array_equal(backend.token_logps(batch), alone[name])
                assert np.array_equal(backend.scores(batch, head.adapter), scores)
        assert np.array_equal(backend.token_logps(batch), alone[POLICY])
    policy.close()


def _other_head(run: Path, to: Path) -> None:
    """Copy a reward model, and change its head on purpose."""
    shutil.copytree(run, to)
    head = load_file(to / "adapter" / "head.safetensors")
    save_file({**head, "bias": head["bias"] + 1}, to / "adapter" / "head.safetensors")
    (to / "adapter" / DIGESTS).unlink()


def test_a_run_is_resumed_with_the_same_head_only(
    flags: list[str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "rm", tmp_path / "rm")
    given = [*flags, "--reward", str(tmp_path / "rm"), "--eval-reward", f"implicit:{place / 'dpo'}", "--max-steps", "3"]
    whole = run(given, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for gone in ("adapter", "checkpoints/step-3", "checkpoints/step-2"):
        shutil.rmtree(tmp_path / "part" / gone)
    assert main(["train", "--resume", str(tmp_path / "part")]) == 0
    assert metrics(tmp_path / "part") == whole and rollouts(tmp_path / "part") == rollouts(tmp_path / "whole")
    assert same_weights(tmp_path / "part" / "adapter", tmp_path / "whole" / "adapter")
    for gone in ("adapter", "checkpoints/step-3"):
        shutil.rmtree(tmp_path / "part" / gone)
    # The head's folder moves and gets another name.
    (tmp_path / "rm").rename(tmp_path / "judge")
    resume, source = ["train", "--resume", str(tmp_path / "part")], f"{tmp_path / 'judge'}"
    for more, message in (
        ([], f"{tmp_path / 'rm'} is not there; put it back, or give --reward {tmp_path / 'rm'} with its new place"),
        (["--reward", f"{source}=2"], f"--reward is {source}=2, but the run has {tmp_path / 'rm'}"),
        (["--reward", "answer:number"], "--reward is answer:number, but the run has"),
        (["--reward", str(place / "other")], "--reward other is not the model that this run began with"),
    ):
        if more and "other" in more[1] and not (place / "other").exists():
            _other_head(place / "rm", place / "other")
        assert main([*resume, *more]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert main([*resume, "--reward", source]) == 0
    assert "what was called rm is judge in metrics from here on" in " ".join(capsys.readouterr().out.split())
    assert same_weights(tmp_path / "part" / "adapter", tmp_path / "whole" / "adapter")
    assert metrics(tmp_path / "part")[-1]["rewards/judge/mean"] == whole[-1]["rewards/rm/mean"]
    for gone in ("adapter", "checkpoints/step-3"):  # config.yaml has its new place, the older checkpoint the old one
        shutil.rmtree(tmp_path / "part" / gone)
    assert main(resume) == 0
    assert same_weights(tmp_path / "part" / "adapter", tmp_path / "whole" / "adapter")
    for gone in ("adapter", "checkpoints/step-3"):
        shutil.rmtree(tmp_path / "part" / gone)
    adapter = tmp_path / "judge" / "adapter"
    head = load_file(adapter / "head.safetensors")
    save_file({**head, "bias": head["bias"] + 1}, adapter / "head.safetensors")
    assert main(["train", "--resume", str(tmp_path / "part")]) == 2
    assert "head.safetensors is not what was written" in capsys.readouterr().err
    (adapter / DIGESTS).unlink()  # changed on purpose
    assert main(["train", "--resume", str(tmp_path / "part")]) == 2
    assert "--reward judge is not the model that this run began with" in " ".join(capsys.readouterr().err.split())
    assert main(["train", "--resume", str(tmp_path / "part"), "--accept-changes"]) == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{place}/rm", "has other weights: its head reads states that this model does not have"),
        ("implicit:{place}/dpo", "was trained on another base than"),
        ("implicit:{place}/rm", "is a reward model, whose head scores: give it as --reward"),
        ("{place}/dpo", "is no reward model: it has no reward.json"),
        ("implicit:{place}/none", "no such folder; expected that of a run of lite-dil train"),
        ("implicit:{place}/peft", "nothing there says which beta it was trained with; give it as the weight"),
        ("implicit:{place}/peft=0.1", "was trained on another base than"),
        ("hf:{place}/none", "--reward hf:{place}/none: no such folder, and not a hub id"),
        ("hf:{tiny}", "it has 2 labels; expected a reward model, which has one"),
        ("{place}/rm,{place}/rm", "is there twice"),
    ],
)
def test_models_that_are_refused(
    place: Path, tiny: str, source: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (place / "peft").exists():
        shutil.copytree(place / "dpo" / "adapter", place / "peft", ignore=shutil.ignore_patterns(DIGESTS))
    given = ["--model", tiny, "--backend", "cpu", "--data", str(place / "questions.jsonl"), "--loss", "rloo", *QUICK]
    where = {"place": place, "tiny": tiny}
    assert main(["train", *given, "--reward", source.format(**where), "--output-dir", str(tmp_path / "run")]) == 2
    assert message.format(**where) in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "run").exists()


def test_a_head_whose_score_is_not_a_number_is_refused_before_the_first_step(
    flags: list[str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = shutil.copytree(place / "rm" / "adapter", tmp_path / "rm", ignore=shutil.ignore_patterns(DIGESTS))
    head = load_file(adapter / "head.safetensors")
    save_file({**head, "bias": head["bias"] * np.float32(np.nan)}, adapter / "head.safetensors")
    assert main(["train", *flags, "--reward", str(adapter), "--output-dir", str(tmp_path / "run")]) == 2
    assert re.search(r"--reward rm is nan for \S+questions.jsonl line \d", " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "run").exists()


def test_a_head_of_an_earlier_version_is_refused(
    flags: list[str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "old"
    shutil.copytree(place / "rm" / "adapter", adapter, ignore=shutil.ignore_patterns(DIGESTS))
    content = json.loads((adapter / "reward.json").read_text())
    kept = {name: value for name, value in content.items() if name not in ("lowest", "highest", "digest")}
    (adapter / "reward.json").write_text(json.dumps(kept))
    assert main(["train", *flags, "--reward", str(adapter), "--output-dir", str(tmp_path / "run")]) == 2
    assert "lacks the lowest score" in capsys.readouterr().err


# --- another policy's log-ratio


@pytest.mark.parametrize("changed", [{}, {"loss": "lsif", "beta": 1.0, "logp_reduction": "mean"}], ids=["sum", "mean"])
def test_an_implicit_reward_is_beta_times_the_log_ratio(
    flags: list[str], short: str, place: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    """Against transformers with the adapter merged; also of a cut answer; with beta as the weight where no run has it."""
    source = shutil.copytree(place / "dpo" / "adapter", tmp_path / "policy", ignore=shutil.ignore_patterns(DIGESTS))
    options = {"model": short, "load_in_4bit": False, "reference": "base", "loss": "dpo", "beta": 0.3, "logp_reduction": "sum"}
    seal(source, options | changed)
    lines = run([*flags, "--reward", f"implicit:{source}=2", "--max-steps", "1"], tmp_path / "run")
    rows = rollouts(tmp_path / "run")
    merged, base, expected = bare_model(short), bare_model(short), []
    adapter, modules = read_adapter(str(source)), dict(merged.named_modules())
    with torch.no_grad():
        for name, (a, b) in adapter.weights.items():
            modules[name.removeprefix("model.model.")].weight += torch.from_numpy(adapter.scale * b @ a)
        for example in examples_of(rows, short):
            f = oracle_logps(merged, Batch.of([example])) - oracle_logps(base, Batch.of([example]))
            expected.append(float(f.mean() if changed else 0.3 * f.sum()))
    np.testing.assert_allclose([row["rewards"]["implicit:policy"] for row in rows], expected, atol=2e-4)
    assert np.std(expected) > 0.01 and not all(row["ended"] for row in rows)
    np.testing.assert_allclose([row["reward"] for row in rows], 2 * np.array(expected), atol=4e-4)
    assert lines[0]["reward"] == pytest.approx(2 * np.mean(expected), abs=4e-4)


def test_the_weight_is_beta_where_nothing_says_it(
    flags: list[str], short: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(place / "dpo" / "adapter", tmp_path / "peft", ignore=shutil.ignore_patterns(DIGESTS))
    run([*flags, "--reward", f"implicit:{source}=1", "--max-steps", "1"], tmp_path / "a")
    assert "warning" not in capsys.readouterr().out
    about = json.loads((source / "adapter_config.json").read_text()) | {"base_model_name_or_path": "some/other"}
    (source / "adapter_config.json").write_text(json.dumps(about))
    run([*flags, "--reward", f"implicit:{source}=1", "--max-steps", "1"], tmp_path / "c")
    assert "its base is called some/other, and no hash of that is there" in " ".join(capsys.readouterr().out.split())
    run([*flags, "--reward", f"implicit:{place / 'dpo'}", "--max-steps", "1"], tmp_path / "b")
    found = [np.array([row["reward"] for row in rollouts(tmp_path / name)]) for name in "ab"]
    np.testing.assert_allclose(0.3 * found[0], found[1], atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": "simpo"}, "was trained by simpo, which has no reference"),
        ({"loss": "f-dpo", "divergence": "js"}, "with --divergence js, whose reward is not beta times f"),
        ({"reference": "initial-adapter"}, "has no checkpoint left, which says what it was trained against"),
    ],
)
def test_policies_whose_log_ratio_is_no_reward_are_refused(
    place: Path, short: str, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    source = shutil.copytree(place / "dpo" / "adapter", tmp_path / "policy", ignore=shutil.ignore_patterns(DIGESTS))
    seal(source, {"model": short, "reference": "base", "loss": "dpo", "beta": 0.3, "logp_reduction": "sum"} | changed)
    (part,) = parse(f"implicit:{source}")
    with pytest.raises(UserError, match=message):
        find_implicit(part, build({"model": short, "backend": "cpu", "data": "x.jsonl"}, {}))


def test_an_implicit_reward_needs_the_runs_own_reference(
    flags: list[str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = flags.index("--lora-r")
    given = [*flags[:at], *flags[at + 2 :], "--init-adapter", str(place / "dpo" / "adapter"), "--reference", "initial-adapter"]
    source = f"implicit:{place / 'dpo'}"
    assert main(["train", *given, "--reward", source, "--output-dir", str(tmp_path / "run")]) == 2
    assert "was trained against the bare base, which is not the reference of this run" in capsys.readouterr().err


# --- a classifier of transformers


@pytest.fixture(scope="module")
def exported(place: Path) -> Path:
    """The reward model as a sequence classifier."""
    export(place / "rm", place / "classifier", "--format", "reward", "--check-rows", "4")
    return place / "classifier"


def test_a_classifier_rewards_as_the_head_that_it_was_exported_from(
    flags: list[str], short: str, place: Path, exported: Path, tmp_path: Path, backend_name: str
) -> None:
    given = [*flags, "--reward", f"hf:{exported}", "--eval-reward", str(place / "rm"), "--max-steps", "1", "--samples", "12"]
    if backend_name == "mlx":
        assert main(["train", *given, "--output-dir", str(tmp_path / "run")]) == 2
        return
    (line,) = run(given, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(short)

    def same(row: dict[str, Any]) -> bool:
        """Whether a random answer is the tokens of its text, and not others that print the same."""
        return row["ids"][:-1] == tokenizer(row["response"], add_special_tokens=False).input_ids

    rows = [row for row in rollouts(tmp_path / "run") if row["ended"] and same(row)]
    pairs = [(row["rewards"]["hf:classifier"], row["eval_rewards"]["rm"]) for row in rows]
    assert len(pairs) > 1 and np.std(pairs) > 0
    np.testing.assert_allclose(*np.transpose(pairs), atol=1e-4)
    assert {"eval_reward", "eval_rewards/rm/mean", "rewards/hf:classifier/mean"} <= line.keys()


def test_score_by_a_classifier(place: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("hf.jsonl", "head.jsonl")]
    for reward, file in zip((f"hf:{exported}", str(place / "rm")), files, strict=True):
        more = ["--dtype", "float32", "--backend", "cpu", "--max-length", "1024"]
        assert main(["score", str(place / "pairs.jsonl"), "--reward", reward, "--output", str(file), *more]) == 0
    scores = [[json.loads(line)["score"] for line in file.read_text().splitlines()] for file in files]
    np.testing.assert_allclose(*scores, atol=1e-4)
    assert main(["score", str(place / "pairs.jsonl"), "--reward", f"hf:{exported}", "--4bit"]) == 2
    assert "--4bit is of a reward model of lite-dil" in capsys.readouterr().err
    assert main(["score", str(place / "pairs.jsonl"), "--reward", f"hf:{exported}", "--backend", "mlx"]) == 2
    assert "the backend is mlx; give --backend cuda or cpu" in capsys.readouterr().err


def test_a_classifier_of_others_reads_its_whole_template(exported: Path, tmp_path: Path) -> None:
    """ChatML ends in a line feed, behind which such a model is read; transformers' own pipeline is the oracle."""
    other = shutil.copytree(exported, tmp_path / "other", ignore=shutil.ignore_patterns("export.json"))
    chat = [{"role": "user", "content": "what is tea"}]
    texts = ["the tea yes", "no", "the river is<|im_<|im_end|>end|> red"]  # without the inner one the outer one appears
    answers = [Answered("", text, (), (), True, {}, "line 1", chat) for text in texts]
    source = ClassifierReward(ClassifierText(str(other), "--reward hf:x", print), "cpu", "float32", "x", print)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(other).eval(), AutoTokenizer.from_pretrained(other)
    expected = []
    with torch.no_grad():
        for text in (texts[0], texts[1], "the river is red"):
            whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": text}], tokenize=False)
            assert whole.endswith("<|im_end|>\n")
            inputs = tokenizer(whole, add_special_tokens=False, return_tensors="pt")
            expected.append(float(model(**inputs).logits[0, 0]))
    found = source.rewards(answers)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.std(found) > 0.01

    coarse = ClassifierReward(ClassifierText(str(other), "--reward hf:x", print), "cpu", "bfloat16", "x", print)
    scores = torch.tensor(coarse.rewards(answers))  # the score itself is computed in float32
    np.testing.assert_allclose(scores, expected, atol=0.05)
    assert (scores.bfloat16().double() != scores).all()

    config = json.loads((other / "config.json").read_text())
    limit = max(len(source.text.of_answers([each])[0]) for each in answers) - 1
    (other / "config.json").write_text(json.dumps(config | {"pad_token_id": -1, "max_position_embeddings": limit}))
    old = ClassifierReward(ClassifierText(str(other), "--reward hf:x", print), "cpu", "float32", "x", print)
    np.testing.assert_allclose(old.rewards(answers[1:2] * 2), expected[1], atol=1e-5)  # -1 is an old config's word for none
    with pytest.raises(
        UserError, match=rf"line 1: the prompt with a response has {limit + 1} of its tokens, .* takes {limit}"
    ):
        old.rewards(answers)


# --- a held-out reward


def test_a_held_out_reward_is_measured_and_not_trained_on(
    flags: list[str], place: Path, tmp_path: Path, backend_name: str
) -> None:
    (tmp_path / "judge.py").write_text("def brief(completions):\n    return [-len(c[0]['content']) for c in completions]\n")
    plain = run([*flags, "--reward", str(place / "rm"), "--missing-eos-penalty", "3"], tmp_path / "plain")
    judge = ["--eval-reward", f"{tmp_path / 'judge.py'}:brief=0.5"]
    lines = run([*flags, "--reward", str(place / "rm"), "--missing-eos-penalty", "3", *judge], tmp_path / "judged")
    rows = rollouts(tmp_path / "judged")
    assert [row["eval_rewards"]["brief"] for row in rows] == [-len(row["response"]) for row in rows]
    for line in lines:
        own = [row["eval_reward"] for row in rows if row["step"] == line["step"]]
        assert line.pop("eval_reward") == pytest.approx(np.mean(own))  # without the penalty for cut answers
        assert line.pop("eval_rewards/brief/mean") == pytest.approx(2 * np.mean(own))
    assert lines == plain and same_weights(tmp_path / "judged" / "adapter", tmp_path / "plain" / "adapter")
    pages = [(tmp_path / name / "report.html").read_text() for name in ("judged", "plain")]
    assert ["The held-out reward went from" in page for page in pages] == [True, False]
    assert ['data-chart="eval-reward"' in page for page in pages] == [True, False]


def test_rewards_that_part_are_a_warning() -> None:
    histories = []
    for judged in (-1.0, 1.0):
        histories.append(history := History())
        for step in range(1, 13):
            noise = 0.1 * (step % 3)
            history.add({"step": step, "reward": step + noise, "eval_reward": judged * step + noise, "kl/answer": 0.1})
    assert any("rose while the held-out reward fell" in text for text in warnings_of(histories[0], None))
    assert not warnings_of(histories[1], None)


def test_a_held_out_reward_that_is_trained_on_is_refused(
    flags: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *flags, "--reward", str(place / "rm"), "--eval-reward", f"answer:number,{place / 'rm'}"]) == 2
    assert "'rm' is there twice" in capsys.readouterr().err
    at = flags.index("--samples")
    assert main(["train", *flags[:at], "--loss", "dpo", "--eval-reward", "answer:number", "--output-dir", "x"]) == 2
    assert "--eval-reward needs --reward" in capsys.readouterr().err
