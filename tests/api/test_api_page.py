"""docs/api.md: its examples run as they stand, in their order, with a tiny model in place of the model's name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import lite_dil as dil

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def examples() -> list[str]:
    first, *rest = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert "import lite_dil as dil" in first and len(rest) >= 10
    return rest


def test_the_examples_run(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"dil": dil}
    for number, code in enumerate(examples(), 1):
        # A function's text is looked for in a file.
        file = tmp_path / f"example_{number}.py"
        file.write_text(code.replace('"MODEL"', f'"{tiny}", backend="cpu", max_length=64'))
        exec(compile(file.read_text(), str(file), "exec"), names)
    assert "this policy was closed" in capsys.readouterr().out
    assert (tmp_path / "merged" / "config.json").is_file() and (tmp_path / "adapter-alone").is_dir()
    assert names["same"].metrics == names["part"].metrics and names["better"] and 0 < names["best"].best <= 1


def test_the_page_names_what_is_stable() -> None:
    """All of it, and nothing that is not there."""
    said = PAGE.read_text(encoding="utf-8").partition("The names in `lite_dil.__all__`:")[2].partition(". Modules")[0]
    assert set(re.findall(r"`(\w+)`", said)) == set(dil.__all__) - {"__version__"}
