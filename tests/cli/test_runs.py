"""lite-dil runs: every run with its own figures, newest first, whole in 80 columns; one that is damaged hides no other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reported import HOSTILE, make_run
from trainings import metrics

from lite_dil.cli.main import main
from lite_dil.reports.listing import list_runs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Runs of each kind, the first one the newest."""
    runs = tmp_path / "runs"
    make_run(runs / "lsif-20261130-131120")
    make_run(runs / "dpo-20261130-120000", loss="dpo", steps=7, facts={"state": "stopped", "steps": 9})
    make_run(
        runs / "compare-20261129-120000/runs/sft-seed0", loss="sft", form="demonstrations", text="a/prefs.jsonl,b/more.csv"
    )
    make_run(runs / "kto", loss="kto", form="unpaired", eval_steps=None, facts={"state": "running"})
    make_run(runs / "old")
    (runs / "old" / "report.json").unlink()
    (runs / "old" / "adapter").mkdir()
    make_run(runs / "no-options")
    (runs / "no-options" / "config.yaml").unlink()
    make_run(runs / "newer-version")
    (runs / "newer-version" / "config.yaml").write_text("format: 99\nloss: lsif\n")
    make_run(runs / "half")
    (runs / "half" / "report.json").write_text('{"state": "fin')
    (runs / "exported").mkdir()
    (runs / "exported" / "config.json").write_text("{}")
    names = [
        *("lsif-20261130-131120", "dpo-20261130-120000", "compare-20261129-120000/runs/sft-seed0", "kto", "old"),
        *("no-options", "newer-version", "half"),
    ]
    for age, name in enumerate(names):
        for path in (runs / name).iterdir():
            os.utime(path, (1e9 - age, 1e9 - age))
        os.utime(runs / name, (1e9 - age, 1e9 - age))
    return runs


@pytest.mark.parametrize("columns", [80, 120])
def test_the_list(folder: Path, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["runs", str(folder)]) == 0
    shown, _, rest = capsys.readouterr().out.partition("damaged: ")
    expected = """
run                                    loss data                 step  acc.  chosen rejected time state
lsif-20261130-131120                   lsif short answers       20/20 0.900  +0.400   -0.200 10 s finished
dpo-20261130-120000                    dpo  short answers         7/9 0.786  +0.286   -0.143  4 s stopped
compare-20261129-120000/runs/sft-seed0 sft  prefs.jsonl,more.csv 20/20     ?  +0.400        ? 10 s finished
kto                                    kto  short answers       20/20     ? +0.360*  -0.180* 10 s unfinished
old                                    lsif short answers          20 0.900  +0.400   -0.200 10 s finished
no-options                             ?    ?                       ?     ?       ?        ?    ? damaged
newer-version                          ?    ?                       ?     ?       ?        ?    ? damaged
half                                   ?    ?                       ?     ?       ?        ?    ? damaged
""".replace("?", "\u2013")
    lines = [line.rstrip() for line in shown.splitlines()]
    assert all(len(line) <= columns for line in lines)
    if columns == 120:
        assert [line.split() for line in lines] == [line.split() for line in expected.strip().splitlines()]
    else:  # figures and states are whole
        ends = [line.split()[-5:] for line in lines if not line.startswith(("uns/", "eed"))]
        assert [end for end in ends if len(end) == 5] == [line.split()[-5:] for line in expected.strip().splitlines()]
    assert "no-options: config.yaml is missing\n" in rest and "newer-version was made by a newer lite-dil" in rest
    assert "per token (lsif), per response (dpo, sft, kto). * of the last training steps" in " ".join(rest.split())


def test_json_has_the_figures_that_were_logged(
    folder: Path, tiny: str, trained: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", str(folder), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [run["state"] for run in found] == ["finished", "stopped", "finished", "unfinished", "finished", *["damaged"] * 3]
    assert (found[1]["step"], found[1]["steps"], found[1]["per"]) == (7, 9, "response")
    assert found[0]["seconds"] == pytest.approx(20 * 0.5)
    real = trained("--model", tiny, "--backend", "cpu")
    (run,) = list_runs(real)
    last = metrics(real)[-1]
    assert (run.folder, run.state, run.step, run.steps, run.loss) == (real, "finished", 3, 3, "lsif")
    for name in ("log_ratio/chosen", "log_ratio/rejected"):
        assert run.figures and run.figures[name] == last[f"eval_{name}" if "eval_loss" in last else name]


@pytest.mark.parametrize("name", ["none", "empty"])
def test_a_folder_without_runs_is_one_message(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty" / "below").mkdir(parents=True)
    assert main(["runs", str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and f"{tmp_path / name}: no " in err


def test_nothing_in_a_name_is_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "[red]\x1b[31m", text=HOSTILE)
    make_run(tmp_path / "\u65e5\u672c")
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[red]\\x1b[31m" in out and "\u65e5\u672c" in out
