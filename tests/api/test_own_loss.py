"""Losses of one's own: the table's own formula given as a function trains as the table's does; names, trials and going on."""

from __future__ import annotations

import functools
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import write_pairs
from test_api_train import StopAfter
from trainings import metrics, same_weights

import lite_dil as dil
from lite_dil.cli.main import main

OPTIONS = {"learning_rate": 1e-2, "max_steps": 3, "report_samples": 0}
SCALE = 0.25
FILE = """\
import lite_dil as dil

def tilted(chosen, rejected, power=2.0):
    return abs(rejected - chosen + 1.0) ** power

tilted_loss = dil.PairLoss(tilted, name="tilted")
"""


def library(x: Any) -> Any:
    """The backend's own: numpy has no part in it."""
    if type(x).__module__.startswith("mlx"):
        import mlx.core

        return mlx.core
    import torch

    assert isinstance(x, torch.Tensor)
    return torch


def dpo(chosen: Any, rejected: Any) -> Any:
    x = 0.1 * (rejected - chosen)
    return library(x).logaddexp(x, library(x).zeros_like(x))


def make(scale: float) -> Any:
    def loss(chosen: Any, rejected: Any) -> Any:
        return scale * (rejected - chosen)

    return loss


def scaled(chosen: Any, rejected: Any, times: float = 1.0) -> Any:
    return SCALE * times * (rejected - chosen)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.jsonl")


@pytest.fixture
def policy(tiny: str, backend_name: str) -> dil.Policy:
    return dil.load(tiny, backend=backend_name, dtype="float32", lora_r=4)


def test_an_own_loss_trains_as_the_table_s(policy: dil.Policy, data: Path, tmp_path: Path) -> None:
    """dpo written with the backend's library: metrics, held-out figures and adapter; ukl as two sides."""
    more: dict[str, Any] = {"eval_data": data, "eval_steps": 2, **OPTIONS}
    ones_own = dil.PairLoss(dpo)
    expected = dil.train(policy, data, loss="dpo", output_dir=tmp_path / "dpo", **more)
    found = dil.train(policy.fresh(), data, loss=ones_own, output_dir=tmp_path / "own", **more)
    for one, other in zip(found.metrics, expected.metrics, strict=True):
        assert one.keys() == other.keys()
        for name in [name for name in one if "loss" in name or "log_ratio" in name or name == "grad_norm"]:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    assert yaml.safe_load((found.folder / "config.yaml").read_text())["loss"] == ones_own.identity
    assert "def dpo(chosen" in (found.folder / "loss_source.txt").read_text()
    assert "dpo (a user-defined loss)" in unescape(found.report.read_text())
    card = (found.folder / "adapter" / "README.md").read_text()
    assert "Trained by a Python program with `lite_dil.train`, which gave its own loss." in card
    sides = dil.SideLoss(lambda f: -f, lambda f: library(f).exp(f), name="ukl")
    expected = dil.train(policy.fresh(), data, loss="ukl", output_dir=tmp_path / "ukl", **OPTIONS)
    found = dil.train(policy.fresh(), data, loss=sides, output_dir=tmp_path / "sides", **OPTIONS)
    np.testing.assert_allclose(
        [line["loss"] for line in found.metrics], [line["loss"] for line in expected.metrics], rtol=1e-5
    )


def test_the_command_line_takes_one_and_goes_on_with_it(
    policy: dil.Policy, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never because a config.yaml names it: it must be given again, unchanged."""
    name, model = policy.backend.name, policy.source.options.model
    (tmp_path / "losses.py").write_text(FILE)
    flags = ["train", "--model", model, "--backend", name, "--dtype", "float32", "--lora-r", "4", "--data", str(data)]
    flags += ["--learning-rate", "0.01", "--max-steps", "3", "--report-samples", "0"]
    loss = f"{tmp_path / 'losses.py'}:tilted_loss"
    assert main([*flags, "--loss", loss, "--output-dir", str(tmp_path / "whole")]) == 0
    from lite_dil.cli.own_loss import load_loss

    own = load_loss(tmp_path / "losses.py", "tilted_loss")
    part = dil.train(policy, data, loss=own, output_dir=tmp_path / "part", observers=[StopAfter(1)], **OPTIONS)
    assert part.stopped
    capsys.readouterr()
    assert main(["data", str(data), "--model", model, "--loss", loss]) == 0
    assert f"--loss {loss}" in capsys.readouterr().out
    assert main(["train", "--loss", own.identity, "--model", "./none"]) == 2  # before anything is looked for
    assert "give it again" in capsys.readouterr().err
    assert main(["train", "--resume", str(part.folder)]) == 2
    assert "tilted is a user-defined loss, whose code a run does not keep: give it again" in capsys.readouterr().err
    (tmp_path / "losses.py").write_text(FILE.replace("power=2.0", "power=3.0"))
    assert main(["train", "--resume", str(part.folder), "--loss", loss]) == 2
    assert "--loss is own:tilted:pairs:sum:" in capsys.readouterr().err
    (tmp_path / "losses.py").write_text(FILE)
    assert main(["train", "--resume", str(part.folder), "--loss", loss]) == 0
    assert metrics(part.folder) == metrics(tmp_path / "whole")
    assert same_weights(part.folder / "adapter", tmp_path / "whole" / "adapter")
    assert main(["export", "--adapter", str(part.folder), "--format", "adapter", "--output", str(tmp_path / "made")]) == 0
    assert json.loads((tmp_path / "made" / "export.json").read_text())["check"]["rows"] == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no.py:x", "no such file no.py"),
        ("losses.py:tilted", "wrap the function: tilted = lite_dil.PairLoss"),
        ("losses.py:tilted_los", "did you mean 'tilted_loss'"),
        ("broken.py:x", "ZeroDivisionError: division by zero .line 2."),
    ],
)
def test_a_file_without_the_loss(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("losses.py").write_text(FILE)
    Path("broken.py").write_text("\n1 / 0\n")
    assert main(["plan", "--loss", text]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_what_names_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text, its defaults, what it closes over, and the values of its module that it reads; nothing else."""

    def named(function: Any, **more: Any) -> str:
        return dil.PairLoss(function, **more).identity.rpartition(":")[2]

    assert named(make(0.3)) == named(make(0.3)) != named(make(0.5))
    before = named(scaled)
    assert named(functools.partial(scaled, times=2.0), name="scaled") != named(
        functools.partial(scaled, times=3.0), name="scaled"
    )
    with monkeypatch.context() as patch:
        patch.setattr(scaled, "__defaults__", (2.0,))
        assert named(scaled) != before
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "SCALE", 0.5)
        assert named(scaled) != before
    with monkeypatch.context() as patch:  # a function that it calls
        patch.setitem(globals(), "library", make(1.0))
        assert named(dpo) != dil.PairLoss(dpo, version="1").identity.rpartition(":")[2]
    assert named(scaled) == before
    first, second = (lambda a, b: a - b), (lambda a, b: b - a)  # fmt: skip
    assert named(first) != named(second)
    assert named(make(np.array([1.0, 2.0]))) != named(make(np.array([1.0, 3.0])))  # type: ignore[arg-type]
    with pytest.raises(dil.UserError, match=r"'scale', which it closes over, is a object.* give name= and version="):
        dil.PairLoss(make(object()))  # type: ignore[arg-type]
    typed: dict[str, Any] = {}
    exec("def loss(a, b): return a - b", typed)
    with pytest.raises(dil.UserError, match="the source of loss is not available"):
        dil.PairLoss(typed["loss"])
    assert dil.PairLoss(typed["loss"], name="mine", version="1").identity.startswith("own:mine:pairs:sum:")
    with pytest.raises(dil.UserError, match="reduction is 'max'"):
        dil.PairLoss(scaled, reduction="max")


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda a, b: (b - a).mean(), r"shape \(\); expected one value per pair"),
        (lambda a, b: 1 / (b - a) ** 0.5, "not finite"),
        (lambda a, b: (b - a) * 0, "its gradient is 0 everywhere"),
        (lambda a, b: (b - a) - (b - a).mean(), "depends on the other responses"),
        (lambda a, b: [0.0] * 4, "TypeError: it returned a list"),
        (lambda a, b: (b - a).no_such_thing(), "AttributeError"),
    ],
)
def test_a_loss_is_tried_before_the_run(policy: dil.Policy, data: Path, loss: Any, said: str, tmp_path: Path) -> None:
    """The error names function, file and line."""
    with pytest.raises(dil.UserError, match=rf"--loss mine, .*test_own_loss\.py line \d+.*({said})"):
        dil.train(policy, data, loss=dil.PairLoss(loss, name="mine", version="1"), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists() and not policy.trained
