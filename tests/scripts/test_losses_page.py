"""docs/losses.md is what the table of objectives says, and the table says all that --help and the page need."""

from __future__ import annotations

import pytest
from losses_page import PAGE, page

from lite_dil.objectives.table import OBJECTIVES, OPTIONS


def test_the_page_is_not_stale() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python scripts/losses_page.py"


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_objective_is_on_it(name: str) -> None:
    section = page().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    objective = OBJECTIVES[name]
    for part in (objective.formula, objective.use, objective.source, objective.note):
        assert part in section
    for option in objective.options:
        assert f"`--{option.replace('_', '-')}`" in section


def test_every_option_belongs_to_an_objective() -> None:
    assert {option for objective in OBJECTIVES.values() for option in objective.options} == set(OPTIONS)
