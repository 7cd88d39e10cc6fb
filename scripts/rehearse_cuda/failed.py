"""The failure of a case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Failed(Exception):
    """A requirement was not met; the figures are kept."""

    def __init__(self, text: str, figures: Mapping[str, Any] | None = None) -> None:
        super().__init__(text)
        self.figures = dict(figures or {})


def require(condition: bool, text: str, figures: Mapping[str, Any] | None = None) -> None:
    """Raise Failed unless the condition holds."""
    if not condition:
        raise Failed(text, figures)
