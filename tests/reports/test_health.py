"""What is said of a training that goes wrong, and that nothing is said of one that goes well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import config, write_pairs
from reported import make_run
from trainings import run

from lite_dil.reports.health import complaints, falling
from lite_dil.reports.outcome import warnings
from lite_dil.reports.record import read_record
from lite_dil.runs.history import MetricColumns

WELL = {"loss": -0.5, "grad_norm": 3.0, "clipped_steps": 1.0, "ratio/effective_share": 0.9, "log_ratio/chosen": 0.1}


def columns(steps: int = 40, every: int = 1, **last: float) -> MetricColumns:
    """Lines of a training that goes well, and from the second line on with the given figures."""
    found = MetricColumns()
    for step in range(every, steps + 1, every):
        changed = {name.replace("__", "/"): value for name, value in last.items()} if step > every else {}
        found.add({"step": step, **WELL, **changed})
    return found


@pytest.mark.parametrize(
    ("figures", "key"),
    [
        ({}, None),
        ({"grad_norm": 31.0}, "clipping"),
        ({"grad_norm": 31.0, "clipped_steps": 0.8}, None),  # a fifth of the steps as they are
        ({"grad_norm": 29.0}, None),  # clipped in every step, as usual for losses of sums
        ({"loss": 1.6}, "loss"),
        ({"loss": 1.4}, None),
        ({"loss": -90.0}, None),
        ({"ratio__effective_share": 0.24}, "carried"),
        ({"ratio__effective_share": 0.26}, None),
    ],
)
def test_what_is_complained_of(figures: dict[str, float], key: str | None) -> None:
    options = config(loss="lsif").as_dict()
    assert list(complaints(columns(**figures), options)) == ([key] if key else [])
    assert complaints(columns(19, **figures), options) == {}  # too early to tell
    # Lines of several steps count their steps.
    scaled = {"clipped_steps": 5 * figures.get("clipped_steps", 1.0)}
    assert list(complaints(columns(40, every=5, **(figures | scaled)), options)) == ([key] if key else [])


def test_what_helps_is_what_the_run_does_not_do_yet() -> None:
    said = complaints(columns(loss=9.0), config(loss="lsif", logp_reduction="sum").as_dict())["loss"]
    assert "--learning-rate" in said and "--logp-reduction mean" in said and "--log-ratio-cap 3" in said and "rulsif" in said
    said = complaints(columns(loss=9.0), config(loss="lsif", log_ratio_cap=3.0).as_dict())["loss"]
    assert "--logp-reduction" not in said and "--log-ratio-cap" not in said
    assert "--log-ratio-cap" not in complaints(columns(loss=9.0), config(loss="dpo").as_dict())["loss"]


def test_chosen_responses_that_fall() -> None:
    per_token, per_response = config(loss="lsif").as_dict(), config(loss="dpo").as_dict()
    assert "-0.03 nats per token" in falling(columns(log_ratio__chosen=-0.03), per_token)
    assert not falling(columns(log_ratio__chosen=-0.01), per_token)
    assert not falling(columns(log_ratio__chosen=-0.03), per_response)
    assert "-2 nats per response" in falling(columns(log_ratio__chosen=-2.0), per_response)


def test_a_report_has_what_was_said(tmp_path: Path) -> None:
    def sick(line: dict[str, Any]) -> None:
        line |= {"clipped_steps": 1.0, "grad_norm": 2e6 if line["step"] > 1 else 2.0}

    make_run(tmp_path, steps=40, change=sick)
    assert any("clipped in 100% of the last 10 steps" in text for text in warnings(read_record(tmp_path)))


def test_a_training_that_runs_away_says_so_once(
    tiny: str, backend_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """lsif of sums at a rate that is far too high: finite, since it is clipped, and silent before."""
    monkeypatch.setenv("LITE_DIL_CACHE", str(tmp_path / "cache"))
    flags = ["--model", tiny, "--backend", backend_name, "--data", str(write_pairs(tmp_path / "pairs.jsonl"))]
    flags += ["--loss", "lsif", "--logp-reduction", "sum", "--report-samples", "0", "--dtype", "float32", "--batch-size", "4"]
    lines = run([*flags, "--learning-rate", "1e-3", "--max-steps", "24"], tmp_path / "ill")
    said = capsys.readouterr()
    text = said.out + said.err
    assert text.count("What to try") == len(
        {line.partition(":")[2][:25] for line in text.splitlines() if "What to try" in line}
    )
    assert "the gradient was clipped in 100% of the last" in text
    assert sum(line["clipped_steps"] for line in lines) > 20
    run([*flags, "--learning-rate", "1e-5", "--max-steps", "24"], tmp_path / "well")
    said = capsys.readouterr()
    assert "What to try" not in said.out + said.err
