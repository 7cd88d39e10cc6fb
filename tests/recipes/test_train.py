"""Whole runs through the command line, on both backends, on tiny models."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
import yaml
from conftest import batch, load, make_checkpoint, write_pairs
from trainings import metrics, run, same_weights, weights

from lite_dil.backends import registry
from lite_dil.batching.batch import Batch
from lite_dil.cli.main import main
from lite_dil.runs.folder import adapter_of
from lite_dil.training.divergence import MAX_SKIPPED

TRL_NAMES = {
    "loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
    "rewards/margins", "logps/chosen", "logps/rejected",
}  # fmt: skip
OURS = {"step", "log_ratio/chosen", "log_ratio/rejected", "tokens_per_second", "peak_memory_mb"}

UNSAMPLED = ("--report-samples", "0")

# Of what is above the backends, and the same code for both.
one_backend = pytest.mark.parametrize("backend_name", ["cpu"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for each test: where two runs are compared to the bit, no third one has computed a part of the reference."""
    monkeypatch.setenv("LITE_DIL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def flags(tiny: str, data: Path, backend_name: str) -> list[str]:
    """12 pairs in steps of 4, so that 2 epochs are 6 steps."""
    return [
        "--model", tiny, "--backend", backend_name, "--data", str(data), "--dtype", "float32", "--learning-rate", "1e-3",
        "--batch-size", "2", "--gradient-accumulation-steps", "2", "--epochs", "2", "--report-samples", "0", "--lora-r", "4",
    ]  # fmt: skip


def test_a_run_writes_what_the_design_says(flags: list[str], data: Path, tmp_path: Path) -> None:
    lines = run(flags, tmp_path / "run", "--eval-data", str(data), "--eval-steps", "3", "--save-steps", "2")
    raw = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert raw.keys() >= TRL_NAMES | OURS
    training = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in held_out] == [3, 6]
    assert training[-1]["epoch"] == 2
    assert training[0]["log_ratio/chosen"] == training[0]["log_ratio/rejected"] == 0
    assert held_out[-1]["eval_rewards/margins"] > held_out[0]["eval_rewards/margins"] > 0
    # A reward is beta * f, and logps are sums: the run's own numbers must agree with each other.
    assert training[-1]["rewards/chosen"] == training[-1]["log_ratio/chosen"]
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["learning_rate"], saved["lora_alpha"], saved["logp_reduction"]) == (1e-3, 8.0, "mean")
    checkpoints = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert checkpoints == {"step-2", "step-4", "step-6"}
    assert same_weights(tmp_path / "run" / "adapter", adapter_of(tmp_path / "run" / "checkpoints" / "step-6"))


def test_the_same_seed_gives_the_same_run_and_another_does_not(flags: list[str], tmp_path: Path) -> None:
    first, second = run(flags, tmp_path / "a"), run(flags, tmp_path / "b")
    assert first == second
    assert same_weights(tmp_path / "a" / "adapter", tmp_path / "b" / "adapter")
    assert run(flags, tmp_path / "c", "--seed", "1") != first


@pytest.mark.parametrize("dropout", ["0", "0.3"])
def test_resumed_equals_never_stopped(flags: list[str], data: Path, tmp_path: Path, dropout: str) -> None:
    more = ["--lora-dropout", dropout, "--logging-steps", "2", "--eval-data", str(data), "--eval-steps", "2"]
    whole = run(flags, tmp_path / "whole", *more, "--save-steps", "3")
    # As if killed after step 4: metrics beyond the checkpoint, half a line, and a half-written checkpoint.
    broken = shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(broken / "adapter")
    shutil.rmtree(broken / "checkpoints" / "step-6")
    (broken / "checkpoints" / ".step-6.partial").mkdir()
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert main(["train", "--resume", str(broken)]) == 0
    assert metrics(broken) == whole
    assert same_weights(broken / "adapter", tmp_path / "whole" / "adapter")


@one_backend
def test_resume_auto_starts_then_goes_on(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "auto"
    run(flags, folder, "--resume", "auto", "--max-steps", "3")
    assert "continuing after" not in capsys.readouterr().out
    run(flags, folder, "--resume", "auto", "--max-steps", "3")
    assert "step 3 of 3" in capsys.readouterr().out
    assert main(["train", *flags, "--output-dir", str(folder), "--resume", "--learning-rate", "5"]) == 2
    assert "--learning-rate is 5.0, but the run has 0.001" in capsys.readouterr().err


@one_backend
def test_resume_auto_starts_anew_where_nothing_was_saved(flags: list[str], tmp_path: Path) -> None:
    """A machine that was cut off before the first checkpoint: the same command starts again, and drops nothing else."""
    folder = tmp_path / "run"
    run(flags, folder, "--max-steps", "2")
    whole = (folder / "metrics.jsonl").read_text()
    shutil.rmtree(folder / "adapter")
    (folder / "checkpoints" / "step-2").rename(folder / "checkpoints" / ".step-2.partial")
    run(flags, folder, "--resume", "auto", "--max-steps", "2")
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == len(whole.splitlines())
    assert (folder / "adapter").is_dir()
    shutil.rmtree(folder / "checkpoints")  # a result without its checkpoints is never written over
    assert main(["train", *flags, "--output-dir", str(folder), "--resume", "auto", "--max-steps", "2"]) == 2
    assert (folder / "metrics.jsonl").is_file()


@one_backend
def test_resume_names_what_it_cannot_do(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    whole = run(flags, folder, "--save-steps", "2")
    for resume, more, message in (
        (folder, ["--output-dir", str(tmp_path / "other")], f"continues in {folder}; leave --output-dir"),
        (tmp_path, [], "no checkpoint there"),
    ):
        assert main(["train", "--resume", str(resume), *more]) == 2
        assert message in capsys.readouterr().err
    # From within the run's folder, by a relative name, from an earlier checkpoint, with --backend auto.
    monkeypatch.chdir(folder / "checkpoints")
    assert main(["train", "--resume", "step-2", "--backend", "auto", "--dtype", "auto"]) == 0
    assert metrics(folder) == whole
    aside = folder / "set_aside"
    assert sorted(path.name for path in aside.iterdir()) == ["metrics.jsonl", "step-4", "step-6"]
    assert metrics(aside) == [line for line in whole if line["step"] > 2]
    assert same_weights(adapter_of(aside / "step-6"), folder / "adapter")


@pytest.mark.parametrize("split", [(1, 4), (3, 2)])
def test_any_split_into_micro_batches_is_the_same_run(flags: list[str], tmp_path: Path, split: tuple[int, int]) -> None:
    """10 pairs in steps of 4 (or 6), so that the last batch of an epoch is short; compared with one pass a step."""
    flags[flags.index("--data") + 1] = str(write_pairs(tmp_path / "ten.jsonl", 10))
    size = split[0] * split[1]
    runs = []
    for passes, name in ((split, "split"), ((size, 1), "whole")):
        more = ["--batch-size", str(passes[0]), "--gradient-accumulation-steps", str(passes[1])]
        runs.append(run(flags, tmp_path / name, *more))
    for one, two in zip(*runs, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=2e-4), name


@one_backend
def test_resume_refuses_other_data(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = write_pairs(tmp_path / "mine.jsonl", 8)
    flags = [str(mine) if "pairs.jsonl" in flag else flag for flag in flags]
    run(flags, tmp_path / "run", "--max-steps", "1")
    write_pairs(mine, 9)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert f"- {mine} is not the data" in capsys.readouterr().err


def test_a_moved_run_goes_on(flags: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On another machine: every path is another, and none of the old ones is read or written."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        shutil.copytree(flags[flags.index("--model") + 1], folder / "model")
        shutil.copy(data, folder / "train.jsonl")
        write_pairs(folder / "test.jsonl", 3)

    def paths(folder: Path) -> list[str]:
        return [
            "--model",
            str(folder / "model"),
            "--data",
            str(folder / "train.jsonl"),
            "--eval-data",
            str(folder / "test.jsonl"),
        ]

    for name in ("--model", "--data"):
        del flags[flags.index(name) : flags.index(name) + 2]
    flags += [*paths(old), "--save-steps", "2", "--max-steps", "4", "--reference-cache", str(old / "cache")]
    whole = run(flags, old / "run")
    shutil.move(old / "run", new / "run")
    (new / "run" / "checkpoints" / "step-4").rename(tmp_path / "step-4")
    shutil.rmtree(old)
    make_checkpoint(tmp_path / "other", seed=5)
    write_pairs(tmp_path / "other.jsonl", 2)
    resume = ["train", "--resume", str(new / "run"), *paths(new)]
    before = (new / "run" / "metrics.jsonl").read_text()
    capsys.readouterr()
    for name, path in (
        ("--model", tmp_path / "other"),
        ("--eval-data", tmp_path / "other.jsonl"),
        ("--data", new / "test.jsonl"),
    ):
        command = list(resume)
        command[command.index(name) + 1] = str(path)
        assert main(command) == 2
        assert str(path) in (told := capsys.readouterr()).err and "this run" in told.err
    assert (new / "run" / "metrics.jsonl").read_text() == before
    assert main(resume) == 0
    assert f"not written to, unless it is given again: --reference-cache {old / 'cache'}" in capsys.readouterr().out
    assert metrics(new / "run") == whole and not old.exists()
    saved = yaml.safe_load((new / "run" / "config.yaml").read_text())
    assert (saved["data"], saved["output_dir"]) == (str(new / "train.jsonl"), str(new / "run"))
    # A run of before the fingerprints.
    progress = new / "run" / "checkpoints" / "step-2" / "progress.json"
    shutil.rmtree(new / "run" / "checkpoints" / "step-4")
    kept = json.loads(progress.read_text())
    unknown = ("base", "held_out", "init_adapter", "metrics", "format")
    progress.write_text(json.dumps({name: value for name, value in kept.items() if name not in unknown}))
    progress.with_name("digests.json").unlink()
    (new / "model").rename(new / "model-2")
    assert main(["train", "--resume", str(new / "run"), "--model", str(new / "model-2")]) == 0
    told = capsys.readouterr().out
    assert "recorded nothing of its --model" in told and f"reading what the run did: --data {new / 'train.jsonl'}" in told
    assert metrics(new / "run") == whole


@one_backend
def test_a_run_is_never_written_over(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = run(flags, tmp_path / "run", "--max-steps", "1")
    assert main(["train", *flags, "--output-dir", str(tmp_path / "run")]) == 2
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().err
    assert metrics(tmp_path / "run") == before


def test_ctrl_c_saves_and_resume_goes_on(flags: list[str], tmp_path: Path) -> None:
    whole = run(flags, tmp_path / "whole", "--max-steps", "40")
    folder = tmp_path / "stopped"
    process = warm.Piped(["train", *flags, "--max-steps", "40", "--output-dir", str(folder)])
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    done = process.done()
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert f"--resume {folder}" in done.stdout
    last = metrics(folder)[-1]["step"]
    assert last < 40
    assert (folder / "checkpoints" / f"step-{last}").is_dir()
    assert main(["train", "--resume", str(folder)]) == 0
    assert metrics(folder) == whole
    assert same_weights(folder / "adapter", tmp_path / "whole" / "adapter")


@one_backend
def test_save_total_limit_keeps_the_newest(flags: list[str], tmp_path: Path) -> None:
    run(flags, tmp_path / "run", "--save-steps", "1", "--save-total-limit", "2")
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-5", "step-6"}


@one_backend
def test_config_yaml_of_a_run_trains_the_same(flags: list[str], tmp_path: Path) -> None:
    first = run(flags, tmp_path / "a", "--max-steps", "2")
    assert main(["train", "--config", str(tmp_path / "a" / "config.yaml"), "--output-dir", str(tmp_path / "b")]) == 0
    assert metrics(tmp_path / "b") == first


@one_backend
def test_learning_rate_schedules(flags: list[str], tmp_path: Path) -> None:
    rates = {}
    for kind in ("linear", "cosine", "constant"):
        lines = run(flags, tmp_path / kind, "--lr-scheduler-type", kind, "--warmup-ratio", "0.3")
        rates[kind] = [line["learning_rate"] / 1e-3 for line in lines]
    # 6 steps, 2 of them warm-up, then 4 more: linear falls by fifths.
    assert rates["linear"] == pytest.approx([0.5, 1, 0.8, 0.6, 0.4, 0.2])
    assert rates["constant"] == pytest.approx([0.5, 1, 1, 1, 1, 1])
    assert rates["cosine"] == pytest.approx([0.5, 1, *((1 - np.cos(np.pi * np.array([0.8, 0.6, 0.4, 0.2]))) / 2)])


def test_going_on_from_an_adapter(flags: list[str], tmp_path: Path) -> None:
    """base: f starts at what the adapter has learned; initial-adapter: at 0 exactly, and the reference stays what it was."""
    run(flags, tmp_path / "sft")
    start = str(tmp_path / "sft" / "adapter")
    flags = [*flags[: flags.index("--lora-r")], "--init-adapter", start, "--max-steps", "3"]
    from_base = run(flags, tmp_path / "base", "--reference", "base")
    from_adapter = run(flags, tmp_path / "initial", "--reference", "initial-adapter")
    assert from_base[0]["log_ratio/chosen"] > 0.01
    assert from_adapter[0]["log_ratio/chosen"] == from_adapter[0]["log_ratio/rejected"] == 0
    assert from_adapter[0]["logps/chosen"] == from_base[0]["logps/chosen"]
    assert from_adapter[0]["grad_norm"] > 0
    backend = load(flags[3], flags[1], init_adapter=start, reference="initial-adapter")
    tuned = load(flags[3], flags[1], init_adapter=start, reference="base")
    with backend.adapter_off():
        np.testing.assert_array_equal(backend.token_logps(batch()), tuned.token_logps(batch()))
    # The adapter that was handed in is untouched, and the new one has its rank and only the policy's weights.
    assert weights(tmp_path / "initial" / "adapter").keys() == weights(tmp_path / "sft" / "adapter").keys()
    assert not same_weights(tmp_path / "initial" / "adapter", tmp_path / "sft" / "adapter")


def test_resume_with_a_reference_adapter(flags: list[str], tmp_path: Path) -> None:
    run(flags, tmp_path / "sft", "--max-steps", "2")
    flags = [*flags[: flags.index("--lora-r")], "--init-adapter", str(tmp_path / "sft" / "adapter")]
    flags += ["--reference", "initial-adapter", "--save-steps", "2"]
    whole = run(flags, tmp_path / "whole")
    broken = shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for step in (4, 6):
        shutil.rmtree(broken / "checkpoints" / f"step-{step}")
    assert main(["train", "--resume", str(broken)]) == 0
    assert metrics(broken) == whole


def test_adapters_of_one_backend_go_on_in_the_other(tiny: str, data: Path, tmp_path: Path) -> None:
    folders = {}
    for name in ("cpu", "mlx"):
        folder = folders[name] = tmp_path / name
        flags = ["--model", tiny, "--data", str(data), "--dtype", "float32", "--max-steps", "3", "--learning-rate", "1e-2"]
        run([*flags, "--backend", name, *UNSAMPLED], folder)
    for written in ("cpu", "mlx"):
        adapter = str(folders[written] / "adapter")
        logps = [load(n, tiny, init_adapter=adapter, reference="base").token_logps(batch()) for n in ("cpu", "mlx")]
        np.testing.assert_allclose(*logps, atol=1e-4)
        assert np.abs(logps[0] - load("cpu", tiny).token_logps(batch())).max() > 0.05


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own
def test_peft_loads_our_adapter(tiny: str, data: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    flags = ["--model", tiny, "--data", str(data), "--dtype", "float32", "--max-steps", "3", "--learning-rate", "1e-2"]
    run([*flags, "--backend", "cpu", *UNSAMPLED], tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].numpy()
    ours = load("cpu", tiny, init_adapter=str(adapter), reference="base")
    mine = ours.token_logps(Batch([ids[0, :1].numpy()], [ids[0, 1:].numpy()], np.array([0]), np.array([1])))
    np.testing.assert_allclose(mine, logps, atol=1e-5)
    target = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert sorted(target) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_mlx_lm_loads_our_adapter(data: Path, tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm import load as mlx_load

    # mlx-lm's own loader takes rope theta 10000 for this folder, so the checkpoint has that.
    tiny = str(make_checkpoint(tmp_path / "tiny", rope_theta=10000.0))
    flags = ["--model", tiny, "--data", str(data), "--dtype", "float32", "--max-steps", "3", "--learning-rate", "1e-2"]
    run([*flags, "--backend", "mlx", "--target-modules", "q_proj,up_proj", *UNSAMPLED], tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    model, _ = mlx_load(tiny, adapter_path=str(adapter))
    ids = np.arange(3, 12)
    logits = model(mx.array(ids[None, :-1]))[0]
    logps = np.array(mx.take_along_axis(logits - mx.logsumexp(logits, -1, keepdims=True), mx.array(ids[1:, None]), -1)[:, 0])
    ours = load("mlx", tiny, init_adapter=str(adapter), reference="base")
    mine = ours.token_logps(Batch([ids[:1]], [ids[1:]], np.array([0]), np.array([1])))
    np.testing.assert_allclose(mine, logps, atol=1e-5)
    with ours.adapter_off():
        assert np.abs(ours.token_logps(Batch([ids[:1]], [ids[1:]], np.array([0]), np.array([1]))) - logps).max() > 0.05


def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    more = ["--logp-reduction", "sum", "--beta", "1e4", "--save-steps", "1", "--output-dir", str(folder)]
    assert main(["train", *flags, *more]) == 1
    err = capsys.readouterr().err
    assert "log-ratio" in err
    assert str(folder / "checkpoints") in err
    assert not (folder / "adapter").exists()


@one_backend
def test_long_rows_are_cut_and_counted(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(flags, tmp_path / "run", "--max-length", "12", "--max-steps", "2")
    assert "--max-length 12 cut 12 prompts and" in capsys.readouterr().out
    assert all(np.isfinite(line["loss"]) for line in lines)


def with_scaler(monkeypatch: pytest.MonkeyPatch, **settings: float) -> None:
    """Give the torch backend the loss scaler that float16 has on a GPU; it runs on a CPU too."""
    original = registry.load

    def load_scaled(*args: Any) -> Any:
        backend: Any = original(*args)
        backend.adapters["policy"].scaler = torch.amp.GradScaler("cpu", **settings)
        return backend

    monkeypatch.setattr(registry, "load", load_scaled)


def steep(model: str, data: Path) -> list[str]:
    """Flags with gradients so large that a scale of 2 ** 127 overflows."""
    return ["--model", model, "--backend", "cpu", "--data", str(data), "--dtype", "float32", "--loss", "dpo", "--beta", "10"]


def test_skipped_steps_are_counted_and_training_goes_on(
    tiny: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_scaler(monkeypatch, init_scale=2.0**127)
    lines = run([*steep(tiny, data), "--epochs", "8", *UNSAMPLED], tmp_path / "run")
    skipped = [line["skipped_steps"] for line in lines]
    assert skipped[0] == 1
    assert skipped[-1] == 0
    assert lines[0]["grad_norm"] == 0 < lines[-1]["grad_norm"]


def test_endless_skipping_stops_the_run(
    tiny: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_scaler(monkeypatch, init_scale=2.0**127, backoff_factor=0.9999)
    assert main(["train", *steep(tiny, data), "--epochs", "30", "--output-dir", str(tmp_path / "run")]) == 1
    assert f"step {MAX_SKIPPED}: loss" in capsys.readouterr().err
