"""Whole runs on data that is not pairs, and runs that diverge, on both backends."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_pairs
from trainings import metrics, run, same_weights

from lite_dil.cli.main import main


@pytest.fixture
def flags(tiny: str, backend_name: str) -> list[str]:
    return [
        "--model", tiny, "--backend", backend_name, "--dtype", "float32", "--learning-rate", "1e-3", "--lora-r", "4",
        "--max-length", "64", "--batch-size", "2", "--gradient-accumulation-steps", "2",
        "--report-samples", "0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same 8 pairs as single answers (8 good and 4 bad), and as demonstrations."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [json.loads(line) for line in write_pairs(folder / "pairs.jsonl", 8).read_text().splitlines()]
    good = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    bad = [{"prompt": row["prompt"], "completion": row["rejected"], "label": False} for row in pairs[::2]]
    forms = {"unpaired": [row | {"label": True} for row in good] + bad, "demonstrations": good}
    for name, rows in forms.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {path.stem: str(path) for path in folder.glob("*.jsonl")}


@pytest.mark.parametrize("loss", ["lsif", "kto"])
def test_single_answers(
    flags: list[str], files: dict[str, str], tmp_path: Path, loss: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--loss", loss, "--data", files["unpaired"], "--eval-data", files["unpaired"], "--logging-steps", "3"]
    line, held_out = run(flags, tmp_path / "run", *more)
    assert "8 good and 4 bad" in capsys.readouterr().out
    assert "rewards/accuracies" not in line
    assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"])
    assert held_out["eval_log_ratio/chosen"] > held_out["eval_log_ratio/rejected"]
    assert ("kl" in line) == ("eval_kl" in held_out) == (loss == "kto")
    # Any split of a step is the same step: kto's z0 is of the whole step, and the sides' weights of the whole data.
    split = ["--batch-size", "1", "--gradient-accumulation-steps", "4"]
    again = run(flags, tmp_path / "split", *more, *split)
    for one, other in zip((line, held_out), again, strict=True):
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("loss", ["sft", "sft-occupancy"])
def test_demonstrations(flags: list[str], files: dict[str, str], tmp_path: Path, loss: str) -> None:
    more = ["--loss", loss, "--epochs", "4"]
    lines = run(flags, tmp_path / "run", *more, "--data", files["demonstrations"], "--eval-data", files["demonstrations"])
    assert not any("rejected" in name or "accuracies" in name for name in lines[0])
    assert lines[-1]["eval_log_ratio/chosen"] > 1
    if loss == "sft":
        assert lines[-1]["eval_loss"] == pytest.approx(-lines[-1]["eval_logps/chosen"])
        # The good answers of labelled data are demonstrations too.
        run(flags, tmp_path / "labelled", *more, "--data", files["unpaired"])
        assert same_weights(tmp_path / "run" / "adapter", tmp_path / "labelled" / "adapter")


def test_rejected_answers_are_drawn_once_and_read_by_the_next_run(
    flags: list[str], files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sampled.jsonl"
    more = ["--data", files["demonstrations"], "--sample-rejected", "2", "--sample-file", str(file), "--loss"]
    first = run(flags, tmp_path / "short", *more, "lsif", "--max-steps", "1")
    assert "0 of 8 are in" in capsys.readouterr().out  # 2 draws for each of the 4 prompts that one step takes
    assert first[0]["log_ratio/rejected"] == first[0]["log_ratio/chosen"] == 0
    assert len(file.read_text().splitlines()) == 8
    lines = run(flags, tmp_path / "long", *more, "lsif", "--epochs", "3")
    assert "8 of 16 are in" in capsys.readouterr().out
    assert len(file.read_text().splitlines()) == 16
    assert lines[-1]["log_ratio/chosen"] > lines[-1]["log_ratio/rejected"]
    run(flags, tmp_path / "pairs", *more, "dpo", "--max-steps", "2")
    assert "16 of 16 are in" in capsys.readouterr().out


def test_the_drawn_answers_have_a_place_of_their_own(
    flags: list[str], files: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    more = ["--data", files["demonstrations"], "--sample-rejected", "1", "--max-steps", "1"]
    run(flags, tmp_path / "run", *more)
    (path,) = re.findall(r"are in (\S+\.jsonl)", capsys.readouterr().out)
    row = json.loads(Path(path).read_text().splitlines()[0])
    assert {"prompt", "chosen", "rejected", "rejected_ids"} <= row.keys()


@pytest.mark.parametrize(
    ("loss", "form", "message"),
    [
        ("dpo", "unpaired", "--loss dpo needs pairs (prompt, chosen, rejected), and"),
        ("dpo", "demonstrations", "--loss dpo needs pairs (prompt, chosen, rejected), and"),
        ("lsif", "demonstrations", "--loss lsif needs rejected responses besides chosen ones"),
    ],
)
def test_data_that_an_objective_cannot_use(
    tiny: str, files: dict[str, str], tmp_path: Path, loss: str, form: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "train",
        "--model",
        tiny,
        "--backend",
        "cpu",
        "--loss",
        loss,
        "--data",
        files[form],
        "--output-dir",
        str(tmp_path / "r"),
    ]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_divergence_names_the_pair_and_keeps_the_last_good_state(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = write_pairs(tmp_path / "pairs.jsonl", 12), tmp_path / "run"
    more = [
        "--data",
        str(data),
        "--logp-reduction",
        "sum",
        "--beta",
        "3e3",
        "--save-steps",
        "1000",
        "--output-dir",
        str(folder),
    ]
    assert main(["train", *flags, *more]) == 1
    err = capsys.readouterr().err
    found = re.search(
        r"step (\d+): loss (\S+), gradient norm \S+\. Farthest off is example (\d+) of the data "
        r"\(\S+pairs.jsonl line (\d+)\), with log-ratio (\S+) chosen, (\S+) rejected \(sum over its tokens",
        err,
    )
    assert found, err
    step, index, line = (int(found[i]) for i in (1, 3, 4))
    assert index == line
    # The state before the step was saved, although no checkpoint was due.
    kept = folder / "checkpoints" / f"step-{step - 1}"
    assert str(kept) in err
    assert [row["step"] for row in metrics(folder)] == list(range(1, step))
    assert all(np.isfinite(row["loss"]) for row in metrics(folder))
    assert "--log-ratio-cap" in err
    capped = [flag if flag != str(folder) else str(tmp_path / "capped") for flag in more]
    assert main(["train", *flags, *capped, "--log-ratio-cap", "2"]) == 0
    assert any(row["capped"] > 0 for row in metrics(tmp_path / "capped"))


def test_bad_rows_stop_the_run_or_are_listed(
    flags: list[str], files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [*Path(files["demonstrations"]).read_text().splitlines(), '{"prompt": "x"}', '{"prompt": "x", "completion": ""}']
    (tmp_path / "bad.jsonl").write_text("\n".join(bad))
    more = ["--loss", "sft", "--data", f"{tmp_path / 'bad.jsonl'},{files['demonstrations']}=0.5", "--output-dir"]
    assert main(["train", *flags, *more, str(tmp_path / "stopped")]) == 2
    assert re.search(r"bad\.jsonl: 2 of 10 rows .*--skip-bad-rows", capsys.readouterr().err)
    assert not (tmp_path / "stopped").exists()
    assert main(["train", *flags, *more, str(tmp_path / "run"), "--skip-bad-rows"]) == 0
    out = capsys.readouterr().out
    assert "12 demonstrations, chat messages, read as prompt and completion (completion)" in out
    assert re.search(r"demonstrations\.jsonl: .*\b8 rows 0\.5 times", out)
    assert re.search("2 of 10 rows .*: 1 .*'completion'", out)
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped_rows.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in listed] == ["no field 'completion'", "empty response"]
    assert listed[1]["place"] == f"{tmp_path / 'bad.jsonl'} line 10"
    assert metrics(tmp_path / "run")[-1]["epoch"] == 1
