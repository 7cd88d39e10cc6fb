"""What transformers computes for a model's small twin, which is what MLX must compute too.

The figures are transformers' own where torch is installed, and stay in the cache; else those of the families that come with this
package, if the model is of one.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.backends.foreign import Misfit, foreign
from lite_dil.base import files
from lite_dil.base.hashing import digest
from lite_dil.models import tensors
from lite_dil.models.find import cache_dir
from lite_dil.models.spelling import known_config
from lite_dil.models.twin import draw, shrink

FAMILIES = Path(__file__).parent / "families.json"  # the figures that come with the package, by key
# Entries of a config that change nothing in what a text model computes.
_NOTES = re.compile(
    r"token_id|token_index|architectures|dtype|version|name_or_path|use_cache|initializer|drop|output_|label|return_dict"
    r"|^max_position|pretraining|problem_type|chunk_size_feed_forward|is_encoder_decoder"
)


@dataclass(frozen=True)
class Figures:
    """Of a twin: its weights' shapes by their names in a checkpoint, and the log-probs of the probe, (PROBE - 1,)."""

    shapes: dict[str, tuple[int, ...]]
    logps: np.ndarray

    def as_json(self) -> dict[str, Any]:
        """Return it as it is stored."""
        return {"shapes": self.shapes, "logps": [round(float(value), 6) for value in self.logps]}

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Figures:
        """Return what `as_json` stored."""
        return cls({name: tuple(shape) for name, shape in stored["shapes"].items()}, np.array(stored["logps"], np.float32))


@contextmanager
def twin(model: Path, trust_remote_code: bool = False) -> Iterator[tuple[Path, Figures]]:
    """Yield the folder of a model's twin, a checkpoint, and its figures.

    Raises:
        Misfit: there are none, with the reason.
    """
    with files.work_folder(cache_dir() / "twin") as folder:
        key = write_config(model, folder, trust_remote_code)
        figures = _stored(key) or _computed(key, folder, trust_remote_code)
        write_weights(folder, figures.shapes)
        yield folder, figures


def write_config(model: Path, folder: Path, trust_remote_code: bool) -> str:
    """Write the twin's config.json, and the model's own code if it may run. Return the key of the twin's figures.

    Raises:
        Misfit: transformers does not know the model.
    """
    raw = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if trust_remote_code:
        for file in model.glob("*.py"):
            files.copy(file, folder / file.name)
    small = foreign(shrink, raw, foreign(known_config, model, trust_remote_code))
    files.write(folder / "config.json", json.dumps(small))
    return digest(json.dumps(_essence(foreign(known_config, folder, trust_remote_code)), sort_keys=True))


def write_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write the twin's weights."""
    drawn = {name: draw(name, shape) for name, shape in shapes.items()}
    planned = [tensors.Planned(name, "F32", value.shape, lambda value=value: [value]) for name, value in drawn.items()]
    tensors.write(folder / "model.safetensors", planned, "pt")


def _essence(config: Any) -> Any:
    """Return the settings that change what a text model computes."""
    if not isinstance(config, dict):
        return config
    return {
        key: _essence(value)
        for key, value in config.items()
        if value is not None and not _NOTES.search(key) and not re.search("vision|audio", key)
    }


def _stored(key: str) -> Figures | None:
    for file in (_cached(key), FAMILIES):
        with suppress(OSError, ValueError, KeyError):
            found = json.loads(file.read_text(encoding="utf-8"))
            return Figures.read(found if file != FAMILIES else found[key])
    return None


def _cached(key: str) -> Path:
    from transformers import __version__

    return cache_dir() / "twins" / f"{key}-{__version__}.json"


def _computed(key: str, folder: Path, trust_remote_code: bool) -> Figures:
    """Compute the figures with transformers, and keep them."""
    if importlib.util.find_spec("torch") is None:
        raise Misfit("it is not among the families that this package has figures of, and torch is not installed")
    from lite_dil.backends.torch.twin import shapes_and_logps

    figures = Figures(*shapes_and_logps(folder, trust_remote_code, write_weights))
    with files.writing(cache_dir(), "LITE_DIL_CACHE"):
        files.make_folder(_cached(key).parent)
    files.replace_file(_cached(key), json.dumps(figures.as_json()))
    return figures
