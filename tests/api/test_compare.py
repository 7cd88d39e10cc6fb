"""dil.compare: the figures of the command line, from a program's rows, on one base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import undrawn
from conftest import write_pairs

import lite_dil as dil
from lite_dil.backends import registry
from lite_dil.cli.main import main
from lite_dil.evaluation.comparison import page


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what a clock and the machine decide."""
    figures = {name: value for name, value in row["figures"].items() if name not in ("seconds", "peak_memory_mb")}
    return row | {"figures": figures}


def test_compare_is_the_command(
    tiny: str, backend_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From a generator of rows; nothing is loaded for its four runs; a second call does nothing again."""
    monkeypatch.setattr(page, "_curves", undrawn.blank)
    data = write_pairs(tmp_path / "pairs.jsonl", 40)
    flags = ["--model", tiny, "--backend", backend_name, "--dtype", "float32", "--lora-r", "4", "--data", str(data)]
    flags += ["--losses", "lsif,dpo", "--seeds", "1,2", "--max-steps", "2", "--batch-size", "4", "--sample-prompts", "2"]
    flags += ["--sample-tokens", "4", "--learning-rate", "0.01", "--learning-rates", "dpo=0.02", "--eval-steps", "2"]
    assert main(["compare", *flags, "--output", str(tmp_path / "command"), "--reference-cache", "off"]) == 0
    expected = json.loads((tmp_path / "command" / "table.json").read_text())
    policy = dil.load(tiny, backend=backend_name, dtype="float32", lora_r=4, seed=7)
    first = policy.save(tmp_path / "first")
    capfd.readouterr()
    loads: list[str] = []
    monkeypatch.setattr(registry, "load", lambda *_: loads.append("again"))
    asked: dict[str, Any] = {"losses": ["lsif", "dpo"], "seeds": [1, 2], "max_steps": 2, "batch_size": 4, "sample_prompts": 2}
    asked |= {"sample_tokens": 4, "learning_rate": 0.01, "learning_rates": {"dpo": 0.02}, "eval_steps": 2}
    asked |= {"output_dir": tmp_path / "own", "reference_cache": "off"}
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    found = dil.compare(policy, (row for row in rows), **asked)
    assert list(map(flat, found.rows)) == list(map(flat, expected["rows"])) and found.verdict == expected["verdict"]
    assert found.page.is_file() and not found.stopped and not loads and capfd.readouterr() == ("", "")
    again = policy.save(tmp_path / "again")  # the policy is as it was
    weights = "adapters.safetensors" if backend_name == "mlx" else "adapter_model.safetensors"
    assert (first / weights).read_bytes() == (again / weights).read_bytes() and not policy.trained
    before = (found.folder / "runs" / "dpo-seed2" / "result.json").stat().st_mtime_ns
    assert dil.compare(policy, rows, **asked).rows == found.rows
    assert (found.folder / "runs" / "dpo-seed2" / "result.json").stat().st_mtime_ns == before
    with pytest.raises(dil.UserError, match=r"holds another comparison; .*--max-steps is 3"):
        dil.compare(policy, rows, **asked | {"max_steps": 3})
