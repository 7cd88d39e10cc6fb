"""Times of a training from rates that were measured on this machine: what is kept, and what is said of it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import config, write_pairs

from lite_dil.cli.main import main
from lite_dil.data.dataset import load
from lite_dil.data.encoder import Encoder
from lite_dil.models.find import load_tokenizer
from lite_dil.runs import rates
from lite_dil.runs.rates import Rate, Setting, keep, known, rate_of

SETTING = Setting("owner/model", "cuda", "float16", True, "packed")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LITE_DIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_rate_of_a_run_is_that_of_its_seconds() -> None:
    """The first line, whose steps compile, is left out: 3 steps of 2 s at 100 tokens/s, and 3 of 4 s at 40."""
    figures = ((2, 90.0, 1.0), (5, 2.0, 100.0), (8, 4.0, 40.0))
    lines = [
        {"step": step, "seconds_per_step": seconds, "tokens_per_second": tokens, "examples_per_second": tokens / 50}
        for step, seconds, tokens in figures
    ]
    rate = rate_of(lines, 0, SETTING)
    assert rate and rate.tokens_per_second == pytest.approx((6 * 100 + 12 * 40) / 18)
    assert rate.examples_per_second == pytest.approx((6 * 2 + 12 * 0.8) / 18) and rate.steps == 6
    assert rate_of(lines[:2], 0, SETTING) is None  # 3 steps after the first line
    assert rate_of([{**line, "step": line["step"] + 40} for line in lines], 40, SETTING) == rate  # of a resumed run


def test_rates_are_found_by_what_they_were_measured_with(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert known("owner/model") is None
    first = Rate(SETTING, 100.0, 1.0, 10, "2026-01-02")
    plain = replace(first, setting=replace(SETTING, layout="plain"), tokens_per_second=50.0)
    for rate in (plain, first):
        keep(rate)
    assert known("owner/model", replace(SETTING, layout="auto")) == first == known("owner/model")
    assert known("owner/model", plain.setting) == plain
    for change in ({"backend": "cpu"}, {"dtype": "float32"}, {"load_in_4bit": False}, {"layout": "prefix"}):
        assert known("owner/model", replace(SETTING, **change)) is None  # type: ignore[arg-type]
    assert known("owner/other") is None
    keep(newer := replace(plain, tokens_per_second=60.0))
    assert known("owner/model") == newer and len(json.loads((cache / "rates.json").read_text())) == 2
    for number in range(60):
        keep(replace(first, setting=replace(SETTING, model=f"owner/{number}")))
    assert len(json.loads((cache / "rates.json").read_text())) == 50 and known("owner/model") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    keep(replace(first, setting=replace(SETTING, model=rates.named("model"))))
    assert known(str(tmp_path / "model")) is not None
    (cache / "rates.json").write_text('[{"setting": {}}]')
    assert known("owner/model") is None


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert main(["plan", *flags]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert main(["plan", *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["epoch"], text


def test_a_finished_run_gives_the_time_of_the_next(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(write_pairs(tmp_path / "pairs.jsonl", 11))
    common = [data, "--model", tiny, "--batch-size", "2", "--gradient-accumulation-steps", "1"]
    run = ["train", *common, "--report-samples", "0", "--output-dir"]
    assert main([*run, str(tmp_path / "short"), "--max-steps", "3"]) == 0
    epoch, text = planned(capsys, *common)
    assert (epoch["steps"], epoch["seconds"]) == (6, None) and "Time: not known; --measure" in text
    assert main([*run, str(tmp_path / "whole")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines[1:] if "loss" in line]
    seconds = sum(line["seconds_per_step"] for line in lines)
    examples, tokens = (
        sum(line[f"{what}_per_second"] * line["seconds_per_step"] for line in lines) / seconds
        for what in ("examples", "tokens")
    )
    epoch, text = planned(capsys, *common, "--epochs", "3")
    assert epoch["seconds"] == pytest.approx(11 / examples) and epoch["run_seconds"] == pytest.approx(33 / examples)
    assert epoch["steps"] == 18 and "measured here in 5 steps on" in text and "cpu, " in text
    epoch, _ = planned(capsys, *common, "--max-steps", "4")
    assert epoch["steps"] == 4 and epoch["run_seconds"] == pytest.approx(8 / examples)
    assert "not known" in planned(capsys, *common, "--dtype", "float16")[1]  # another type is another rate
    assert "not known" in planned(capsys, *common, "--memory", "8", "--backend", "cpu")[1]  # and so is another machine
    whole = load(data, "train", Encoder(load_tokenizer(tiny)), config()).examples
    passed = sum(len(example.prompt) + len(response) for example in whole for response in example.responses)
    assert main(["data", data, "--model", tiny, "--json"]) == 0
    time = json.loads(capsys.readouterr().out)["time"]
    assert time["seconds"] == pytest.approx(passed / tokens) and time["steps"] == math.ceil(11 / 4)
    assert main(["data", data, "--model", tiny]) == 0
    assert re.search(r"training takes 3 steps, about \d+ s at [\d,]+ tokens/s \(measured here in 5 ", capsys.readouterr().out)


def test_a_measurement_leaves_its_rate_and_nothing_else(
    tiny: str,
    backend_name: str,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = str(write_pairs(tmp_path / "pairs.jsonl", 6))
    before = set(tmp_path.rglob("*"))
    flags = ["plan", data, "--model", tiny, "--backend", backend_name, "--batch-size", "1", "--max-length", "64"]
    assert main([*flags, "--measure"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    rate = known(tiny)
    assert rate and rate.setting.backend == backend_name and f"Time at {rate}: " in out
    left = {path for path in tmp_path.rglob("*") if "twins" not in path.parts}  # MLX keeps what its check found
    assert left - before == {cache, cache / "rates.json"}
    for more, told in ((["--memory", "8"], "leave out --memory"), (["--like", "x"], "not allowed with argument")):
        assert main([*flags, "--measure", *more]) == 2 and told in capsys.readouterr().err
