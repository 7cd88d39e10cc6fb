"""What people, disks and other processes do to a run's folder between two commands: seen, said and never computed from."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import warm
import yaml
from conftest import write_pairs
from trainings import metrics, run, same_weights

import lite_dil as dil
from lite_dil.base.files import HOST
from lite_dil.base.observer import Event
from lite_dil.cli.main import main
from lite_dil.evaluation.held_out import Evaluation
from lite_dil.runs.folder import RunFolder

Said = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 3 steps with a checkpoint each, its model and its data; only read."""
    place = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny, place / "model")
    write_pairs(place / "pairs.jsonl")
    write_pairs(place / "held_out.jsonl", 3)
    flags = ["--model", str(place / "model"), "--data", str(place / "pairs.jsonl"), "--dtype", "float32", "--backend", "cpu"]
    flags += ["--max-steps", "3", "--save-steps", "1", "--report-samples", "0", "--lora-r", "4", "--learning-rate", "1e-2"]
    run(flags, place / "run", "--eval-data", str(place / "held_out.jsonl"))
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the run; its data and model stay where they are."""
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path


def resume(place: Path, *more: str, step: int | None = None) -> int:
    where = place / "run" / "checkpoints" / f"step-{step}" if step else place / "run"
    return main(["train", "--resume", str(where), *more])


def flip(path: Path, part: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(part * (len(content) - 1))] ^= 1 << 4
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: flip(path, 0.6),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(made: Path, place: Path, damage: str, capsys: Said) -> None:
    """Every file of the newest checkpoint in turn; the run then goes back, and ends in the same bits."""
    newest = place / "run" / "checkpoints" / "step-3"
    files = [path for path in newest.rglob("*") if path.is_file() and path.suffix != ".md"]  # PEFT writes a README
    assert {path.name for path in files} >= {"progress.json", "digests.json", "adapter_model.safetensors"}
    for path in files:
        before = path.read_bytes()
        DAMAGE[damage](path)
        if damage == "gone" and path.name == "progress.json":  # it was never finished
            assert RunFolder(place / "run").latest() == newest.with_name("step-2")
        else:
            problems: list[str] = []
            assert RunFolder(place / "run").whole(newest, problems.append) == newest.with_name("step-2")
            assert [str(newest) in problem for problem in problems] == [True]
        path.write_bytes(before)
    assert RunFolder(place / "run").whole(newest, print) == newest
    whole = metrics(place / "run")
    DAMAGE[damage](newest / "adapters" / "policy" / "adapter_model.safetensors")
    assert resume(place) == 0
    assert f"{newest} is damaged" in (said := capsys.readouterr().out) and "going back to step-2" in said
    assert metrics(place / "run") == whole
    assert same_weights(place / "run" / "adapter", place / "run" / "checkpoints" / "step-3" / "adapters" / "policy")
    assert same_weights(place / "run" / "adapter", made / "run" / "adapter")


@pytest.mark.parametrize("name", ["best", "set_aside/step-3"])
def test_a_checkpoint_elsewhere_is_not_taken_for_another(place: Path, name: str, capsys: Said) -> None:
    copy = place / "run" / ("checkpoints/best" if name == "best" else name)
    shutil.copytree(place / "run" / "checkpoints" / "step-3", copy)
    shutil.rmtree(place / "run" / "checkpoints" / "step-3")
    assert main(["train", "--resume", str(copy)]) == 2
    assert "as checkpoints/step-N of its run" in capsys.readouterr().err


def test_what_a_kill_left_between_two_renames_is_put_right(place: Path) -> None:
    checkpoints = place / "run" / "checkpoints"
    (checkpoints / "step-3").rename(checkpoints / ".step-3.old")
    (checkpoints / ".step-3.partial").mkdir()
    (checkpoints / f".step-1.123456789-{HOST}.abcdefgh.partial").mkdir()
    with RunFolder(place / "run").alone():
        assert sorted(path.name for path in checkpoints.iterdir()) == ["step-1", "step-2", "step-3"]


def test_without_a_whole_checkpoint_there_is_one_message(place: Path, capsys: Said) -> None:
    for path in (place / "run" / "checkpoints").glob("*/adapters/policy/*.safetensors"):
        flip(path, 0.9)
    assert resume(place) == 2
    said = capsys.readouterr().err
    assert said.count("is damaged: adapters/policy/adapter_model.safetensors is not what was written") == 3


def test_checkpoints_of_before_are_resumed(made: Path, place: Path, capsys: Said) -> None:
    """They have no digests, and config.yaml has no newer format."""
    for path in (place / "run").rglob("digests.json"):
        path.unlink()
    for path in (place / "run" / "checkpoints").glob("*/progress.json"):
        content = json.loads(path.read_text())
        path.write_text(
            json.dumps({"format": 2, **{name: content[name] for name in ("step", "num_tokens", "fingerprint", "window")}})
        )
    config = place / "run" / "config.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"format": 2}))
    assert resume(place, step=1) == 0
    assert "of an older lite-dil" in capsys.readouterr().out
    assert same_weights(place / "run" / "adapter", made / "run" / "adapter")


@pytest.mark.parametrize("cut", range(2, 30, 9))
def test_a_cut_config_is_refused(place: Path, cut: int, capsys: Said) -> None:
    path = place / "run" / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:cut]))
    assert resume(place) == 2
    said = capsys.readouterr().err
    assert f"{path} is not what the run wrote" in said and "--accept-changes" in said and "is missing" in said


def test_an_edited_config_is_taken_on_purpose_alone(place: Path, capsys: Said) -> None:
    path = place / "run" / "config.yaml"
    path.write_text(path.read_text().replace("max_steps: 3", "max_steps: 4"))
    assert resume(place) == 2
    assert "max_steps was 3, and is 4" in capsys.readouterr().err
    assert resume(place, "--accept-changes") == 0
    assert "accepted: max_steps was 3, and is 4" in capsys.readouterr().out
    assert metrics(place / "run")[-1]["step"] == 4
    assert resume(place) == 0  # accepted once
    path.write_text("- no config")
    assert resume(place) == 0
    assert "the options are those that step-4 records" in capsys.readouterr().out
    assert path.with_name("config.damaged.yaml").read_text() == "- no config"
    assert yaml.safe_load(path.read_text())["max_steps"] == 4


def test_another_base_model_or_other_held_out_rows(made: Path, place: Path, capsys: Said) -> None:
    weights, config, rows = made / "model" / "model.safetensors", made / "model" / "config.json", made / "held_out.jsonl"
    before = {path: path.read_bytes() for path in (weights, config, rows)}
    tensors = safetensors.numpy.load_file(weights)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    safetensors.numpy.save_file(tensors | {name: tensors[name] * np.float32(1.01)}, weights, {"format": "pt"})
    content = json.loads(config.read_text()) | {"transformers_version": "0", "rms_norm_eps": 0.5}
    config.write_text(json.dumps(dict(reversed(content.items()))))
    write_pairs(rows, 4)
    try:
        assert resume(place, step=2) == 2
        (said,) = capsys.readouterr().err.splitlines()[1:]  # before the model is loaded
        assert f"--eval-data {rows} is not what" in said
        rows.write_bytes(before[rows])
        assert resume(place, step=2) == 2
        said, also = capsys.readouterr().err.splitlines()[1:]
        assert "other weights" in said and "rms_norm_eps in its config.json was" in also
        write_pairs(rows, 4)
        assert resume(place, "--accept-changes", step=2) == 0
        assert capsys.readouterr().out.count("accepted: ") == 3
        assert resume(place) == 0  # accepted once
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def test_damaged_metrics_keep_their_good_lines(place: Path, capsys: Said) -> None:
    path, whole = place / "run" / "metrics.jsonl", metrics(place / "run")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"step": \xff\n' + b"".join(lines[1:]) + b'{"step": 3, "lo')
    damaged = path.read_bytes()
    assert resume(place) == 0
    assert "1 lines cannot be read" in capsys.readouterr().out
    assert metrics(place / "run") == whole
    assert (place / "run" / "metrics.damaged.jsonl").read_bytes() == damaged
    path.write_text(re.sub(r'"loss": [^,]+', '"loss": 7', path.read_text(), count=1))
    assert resume(place) == 0
    assert "not those that the run wrote" in capsys.readouterr().out


def test_a_damaged_adapter_is_refused(place: Path, capsys: Said) -> None:
    for path in (place / "run" / "adapter", place / "run" / "checkpoints" / "step-2"):
        flip(next(path.rglob("adapter_model.safetensors")), 0.9)
        with pytest.raises(dil.UserError, match=r"adapter_model\.safetensors is not what was written"):
            dil.load(adapter=path, trainable=False)


def test_a_run_writes_through_no_link(place: Path, tmp_path: Path, capsys: Said) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (place / "run" / "report.html").unlink()
    (place / "run" / "report.html").symlink_to(victim)
    assert resume(place) == 2
    assert "report.html is a link" in capsys.readouterr().err and victim.read_text() == "mine"


def test_one_process_at_a_time(place: Path, capsys: Said) -> None:
    """A second one is refused while the first lives, also after kill -9 of another."""
    folder = RunFolder(place / "run")
    argv = ["train", "--resume", str(place / "run"), "--accept-changes"]
    path = place / "run" / "config.yaml"
    path.write_text(path.read_text().replace("max_steps: 3", "max_steps: 4000"))
    first = warm.Piped(argv)
    while not (place / "run" / ".lock").exists() and first.poll() is None:
        time.sleep(0.02)
    while not (number := (place / "run" / ".lock").read_text().strip()):
        time.sleep(0.02)
    assert main(argv) == 2
    assert f"{place / 'run'}: process {number} is writing there" in capsys.readouterr().err
    first.send_signal(signal.SIGKILL)
    first.done()
    assert (place / "run" / ".lock").exists()
    with folder.alone(), pytest.raises(dil.UserError, match="this process is writing there"):
        RunFolder(place / "run").alone().__enter__()
    assert not (place / "run" / ".lock").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_base_with_numbers_that_are_not_finite(
    value: float, tiny: str, tmp_path: Path, backend_name: str, capsys: Said
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    safetensors.numpy.save_file(tensors, model / "model.safetensors", {"format": "pt"})
    data = str(write_pairs(tmp_path / "pairs.jsonl"))
    argv = ["train", data, "--model", str(model), "--backend", backend_name, "--output-dir", str(tmp_path / "run")]
    assert main([*argv, "--max-steps", "1", "--report-samples", "0"]) == 2
    assert "weights hold numbers that are not finite" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_held_out_figures_that_are_not_finite_are_said() -> None:
    said: list[str] = []

    class Diverged:
        def run(self, stop: Callable[[], bool], tell: Any) -> dict[str, float]:
            return {"eval_loss": math.nan, "eval_rewards/margins": 1.0, "eval_logps/chosen": -math.inf}

    held_out: Any = Diverged()
    Evaluation(held_out, 1, float, [], [], lambda text: nullcontext(print), said.append).after_step(Event(3, 5))
    assert said == ["warning: held-out figures of step 3 are not finite: eval_loss, eval_logps/chosen; training diverges"]
