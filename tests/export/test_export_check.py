"""The check of an export: a wrong one is refused, a right one is not, however small the adapter's effect."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import (
    batch,
    criterion,
    examples,
    load,
    one_step,
)
from trainings import export

from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.cli.main import main
from lite_dil.export import check as export_check
from lite_dil.models import adapter_files

Trainer = Callable[..., Path]


def test_a_wrong_merge_is_refused(
    tiny: str, backend_name: str, trained: Trainer, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    run = trained("--model", tiny, "--backend", backend_name)
    right = adapter_files.float_adapter

    def transposed(adapter: Any) -> Any:
        return {n: (b.T, a.T) if a.shape[1] == b.shape[0] else (a[:, ::-1], b) for n, (a, b) in adapter.weights.items()}

    wrong: dict[str, Callable[..., Any]] = {
        "twice": lambda files, strength: right(files, 2 * strength),
        "half": lambda files, strength: right(files, 0.5 * strength),
        "dropped": lambda files, strength: right(files, 0.0),
        "transposed": lambda files, strength: replace(right(files, strength), weights=transposed(right(files, strength))),
    }
    for name, mistake in wrong.items():
        with monkeypatch.context() as patch:
            patch.setattr(adapter_files, "float_adapter", mistake)
            output = tmp_path / name
            assert main(["export", "--adapter", str(run), "--format", "merged", "--output", str(output)]) == 1, name
        assert not output.exists()
        report = json.loads((tmp_path / f"{name}.refused" / "export.json").read_text())
        assert report["check"]["ok"] is False
        assert "rounded" not in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(adapter_files, "float_adapter", wrong["half"])
        patch.setitem(export_check.TOLERANCES, "float32", 1.4)
        assert main(["export", "--adapter", str(run), "--format", "merged", "--output", str(tmp_path / "half")]) == 1
        assert "float32" in capsys.readouterr().err
    export(run, tmp_path / "half", "--format", "merged")  # an earlier refusal is not in the way


Passed = Callable[[float], np.ndarray]


def figures(draw: np.random.Generator, effect: float, rounding: float) -> tuple[export_check.Trained, Passed]:
    """The figures of a model whose adapter does `effect`, computed with `rounding`, and what makes an exported model's."""
    base, own = draw.normal(size=2000), effect * draw.standard_t(4, 2000)

    def passed(share: float) -> np.ndarray:
        return base + share * own + rounding * draw.normal(size=2000)

    return export_check.Trained([], "x", passed(1), passed(0), passed(1.5) - passed(0.5), "bfloat16"), passed


@pytest.mark.parametrize("effect", [1.0, 0.05])
def test_a_small_effect_is_told_from_a_lost_one_where_rounding_is_as_large(effect: float) -> None:
    trained, passed = figures(np.random.default_rng(0), effect, 0.05)
    for share, ok in ((1.0, True), (0.0, False), (0.5, False), (2.0, False)):
        check = trained.compare([passed(share)], 0.1)
        # The plain slope would find 2/3 of it where all is there, as two of three parts of the difference are the adapter's.
        assert check.share == pytest.approx(share, abs=0.15)
        assert check.ok == ok, share
        assert check.conclusive and "to tell whether" not in str(check)
    assert not trained.compare([np.full(2000, np.nan)], 1.4).ok
    assert not trained.compare([passed(1) + 2], 1.4).ok, "a shift is beyond the tolerance"


def test_a_right_export_of_a_barely_trained_adapter_is_not_refused() -> None:
    shares = []
    for seed in range(40):
        trained, passed = figures(np.random.default_rng(seed), 0.004, 0.03)
        check = trained.compare([passed(1)], 0.15)
        assert check.ok, check
        shares.append((check.share - 1) / check.share_error)
        assert check.conclusive or "to tell whether the adapter is there" in str(check)
    assert np.median(np.abs(shares)) < 1.5, "the standard error is what it is called"
    base = np.zeros(9)
    idle = export_check.Trained([], "x", base, base, base, "float32").compare([base], 0.5)
    small = export_check.Check(6, 400, "x", mean=0.088, max=0.97, tolerance=0.4, effect=0.073, share=2.01, share_error=0.17)
    assert small.ok and not small.conclusive  # a right export of an adapter of two steps, in 8 bits
    large = replace(small, effect=0.75)
    assert not large.ok and large.conclusive
    # The least effect is seen where there is no rounding: a share of 1.01 +- 0.00 is not too little to tell.
    exact = replace(small, mean=1e-6, max=1e-5, tolerance=1e-3, effect=4e-4, share=1.01, share_error=0.003)
    assert exact.ok and exact.conclusive and "the share 1.01 +- 0.00 is there (expected 1)" in str(exact)
    assert not replace(exact, share=0.5, mean=9e-5).ok
    assert "share" not in str(small) and "too small, beside the rounding of these files, to tell" in str(small)
    few = replace(small, effect=0.75, share=0.9, share_error=0.3)
    assert few.ok and "0.90 +- 0.30" in str(few) and "too few rows to tell" in str(few)
    assert idle.ok and not idle.conclusive and idle.as_dict()["share_error"] is None


def test_the_figures_leave_the_model_as_it_was_and_must_be_finite(tiny: str, backend_name: str) -> None:
    backend = load(backend_name, tiny)
    one_step(backend, [batch(4)], criterion(), 1e-2)
    backend.set_strength(0.5)
    rows = examples(2)
    before = np.concatenate([backend.token_logps(Batch.of([row])) for row in rows])
    trained = export_check.measure(backend, rows, "x")
    np.testing.assert_array_equal(trained.policy, before)
    assert backend.strength == 0.5
    np.testing.assert_array_equal(np.concatenate([backend.token_logps(Batch.of([row])) for row in rows]), before)
    backend.set_strength(1)
    with backend.adapter_off():
        np.testing.assert_array_equal(trained.bare, np.concatenate([backend.token_logps(Batch.of([row])) for row in rows]))
    assert np.corrcoef(trained.change, trained.policy - trained.bare)[0, 1] > 0.9
    one_step(backend, [batch(4)], criterion(), float("nan"))
    with pytest.raises(UserError, match=r"not finite.*checkpoint"):
        export_check.measure(backend, rows, "x")
