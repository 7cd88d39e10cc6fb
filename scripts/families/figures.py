"""The twins that come with the package: transformers' figures of each family that mlx-lm builds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from families.zoo import NAMES, make

from lite_dil.backends.foreign import Misfit
from lite_dil.backends.mlx.twin import compare
from lite_dil.backends.twin import PACKAGED, twin
from lite_dil.base.errors import UserError


def write_figures(folder: Path, names: list[str] | None = None) -> int:
    """Write the figures of all families into the package; return how many. A family has the same twin at both sizes."""
    os.environ["LITE_DIL_CACHE"] = str(folder / "cache")
    found: dict[str, Any] = {}
    for name in names or NAMES:
        try:
            model = make(name, folder / name)
            with twin(model) as one:
                config = json.loads((one.folder / "config.json").read_text(encoding="utf-8"))
                found[name] = {"config": config, **one.figures.as_json()}
            compare(model, name)
        except (Misfit, UserError) as error:
            found.pop(name, None)
            print(f"{name}: left out, {error}")
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}" for name, entry in found.items())
    PACKAGED.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    return len(found)
