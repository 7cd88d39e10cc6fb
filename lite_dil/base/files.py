"""Writing files, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from lite_dil.base.disk import writing


def replace_file(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
