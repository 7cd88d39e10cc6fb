"""The lines of metrics.jsonl."""

from __future__ import annotations

import math
from typing import Any

from lite_dil.base.strict_json import parse_json


def parse_line(text: str | bytes) -> dict[str, Any] | None:
    """Return a line's figures by name, with None for those that were not finite; None if the line is damaged."""
    try:
        line = parse_json(text)
        line["step"] = int(line["step"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    return line if all(value is None or _fits(name, value) for name, value in line.items()) else None


def parse_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return all lines, and the number of damaged ones; a last line that was cut off is not damaged."""
    *texts, _ = content.split(b"\n")
    lines = [line for text in texts if (line := parse_line(text)) is not None]
    return lines, len(texts) - len(lines)


def _fits(name: str, value: object) -> bool:
    """Return whether a value is a finite number and, of an accuracy, a share."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return number and (not name.endswith("rewards/accuracies") or 0 <= value <= 1)  # type: ignore[operator]
