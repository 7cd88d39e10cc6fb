"""docs/models.md, from the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def page(results: Any) -> str:
    return ""
