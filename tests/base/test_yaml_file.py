"""YAML of strangers: plain values or one message, within a moment."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lite_dil.cli.main import main

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB + "loss: *i\n", "write the value of *a out"),
        ("loss: " + "[" * 500 + "]" * 500, "more than 20 levels"),
        (
            "loss: " + "[" * 5000 + "]" * 5000,
            "exceeded maximum nesting depth" if yaml.__with_libyaml__ else "more than 20 levels",
        ),
        ("loss: " + "{a: " * 5000 + "}" * 5000, "more than 20 levels"),
        ("seed: " + "9" * 5000, "not a value that can be read"),
        ("seed: 2024-99-99", "not a value that can be read"),
        ("seed: !!int x", "not a value that can be read"),
        ("seed: !!bool x", "not a value that can be read"),
        ("learning_rate: !!set {}", "is not a number"),
        ("seed: !!timestamp x", "not a value that can be read"),
        ("seed: !!python/object/apply:os.system [touch here]", "could not determine a constructor"),
        ("lora_r: 8\nlora_r: 16\n", "'lora_r' is given twice"),
        ("seed: 1\n" + "# long\n" * 20_000, "larger than 128 KB"),
        ("seed: \x1b[31m", "characters are not allowed"),
    ],
)
def test_a_config_file_that_would_do_harm(text: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(text, encoding="utf-8")
    assert main(["train", "--config", str(path)]) == 2
    said = capsys.readouterr().err
    assert f"{path}:" in said and problem in said and len(said) < 1000
    assert not (tmp_path / "here").exists()


def test_a_damaged_run_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("one", "seed: 2024-99-99"), ("two", BOMB)):
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(text, encoding="utf-8")
    main(["runs", str(tmp_path)])
    assert capsys.readouterr().out.count("config.yaml is not valid YAML") == 2
