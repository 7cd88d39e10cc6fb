"""What transformers computes for a model's small twin, which is what MLX must compute too.

Where torch is installed, the figures are computed once and kept in the cache. Elsewhere, those of a twin of the same family
come with this package (`python scripts/families --figures` makes them), and what that twin does not cover is named.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.backends.foreign import Misfit, foreign
from lite_dil.base import files
from lite_dil.base.checked import with_digest, without_digest
from lite_dil.base.disk import DiskFailed
from lite_dil.base.errors import first_line
from lite_dil.base.hashing import digest
from lite_dil.base.strict_json import parse_json
from lite_dil.models import tensors
from lite_dil.models.find import cache_dir
from lite_dil.models.spelling import known_config
from lite_dil.models.twin import draw, shrink

PACKAGED = Path(__file__).parent / "families.json"  # the twins that come with the package, with their figures
# Entries of a config that change nothing in what a text model computes.
_NOTES = re.compile(
    r"token_id|token_index|architectures|dtype|version|name_or_path|use_cache|initializer|drop|output_|label|return_dict"
    r"|^max_position|pretraining|problem_type|chunk_size_feed_forward|is_encoder_decoder"
)


@dataclass(frozen=True)
class Figures:
    """What is known of a twin.

    Attributes:
        shapes: of its weights, by their names in a checkpoint.
        layers: `weight_digest` of each linear layer that can have an adapter, by the layer's name in transformers' model.
        logps: of the probe, (PROBE - 1,).
    """

    shapes: dict[str, tuple[int, ...]]
    layers: dict[str, str]
    logps: np.ndarray

    def as_json(self) -> dict[str, Any]:
        """Return it as it is stored."""
        return {"shapes": self.shapes, "layers": self.layers, "logps": [round(float(value), 6) for value in self.logps]}

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Figures:
        """Return what `as_json` stored."""
        shapes = {name: tuple(shape) for name, shape in stored["shapes"].items()}
        return cls(shapes, dict(stored["layers"]), np.array(stored["logps"], np.float32))


@dataclass(frozen=True)
class Twin:
    """A twin as a checkpoint in a folder, its figures, and the settings of the model that it does not cover."""

    folder: Path
    figures: Figures
    uncovered: tuple[str, ...] = ()


@contextmanager
def twin(model: Path, trust_remote_code: bool = False) -> Iterator[Twin]:
    """Yield a model's twin, or one of its family.

    Raises:
        Misfit: there is none, with the reason.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(files.work_folder(cache_dir() / "twin"))
            key = write_config(model, folder, trust_remote_code)
            made = _made(key, folder, trust_remote_code) or _of_family(folder, trust_remote_code)
            write_weights(folder, made.figures.shapes)
        except (OSError, DiskFailed) as error:
            raise Misfit(f"its small copy cannot be written ({first_line(error)})") from None
        yield made


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


def _whole(value: Any) -> list[Any]:
    return [value]


def write_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write the twin's weights."""
    drawn = {name: draw(name, shape) for name, shape in shapes.items()}
    planned = [tensors.Planned(name, "F32", value.shape, partial(_whole, value)) for name, value in drawn.items()]
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


def _made(key: str, folder: Path, trust_remote_code: bool) -> Twin | None:
    """Return the twin in the folder with transformers' figures, from the cache or computed; None without torch."""
    from transformers import __version__

    cached = cache_dir() / "twins" / f"{key}-{__version__}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return Twin(folder, Figures.read(without_digest(parse_json(cached.read_text(encoding="utf-8")))))
    if importlib.util.find_spec("torch") is None:
        return None
    from lite_dil.backends.torch.twin import figures_of

    figures = Figures(*figures_of(folder, trust_remote_code, write_weights))
    with suppress(OSError, DiskFailed):  # they are computed again at the next load
        files.make_folder(cached.parent)
        files.replace_file(cached, json.dumps(with_digest(figures.as_json())))
    return Twin(folder, figures)


def _of_family(folder: Path, trust_remote_code: bool) -> Twin:
    """Put the packaged twin of the same model_type that differs least in its settings in the place of the folder's."""
    own = dict(_settings(foreign(known_config, folder, trust_remote_code)))
    best: tuple[tuple[str, ...], Mapping[str, Any]] | None = None
    for entry in json.loads(PACKAGED.read_text(encoding="utf-8")).values():
        if entry["config"]["model_type"] != own["model_type"]:
            continue
        files.write(folder / "config.json", json.dumps(entry["config"]))
        theirs = dict(_settings(foreign(known_config, folder)))
        differing = tuple(sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name)))
        if best is None or len(differing) < len(best[0]):
            best = differing, entry
    if best is None:
        raise Misfit("torch is not installed, and this package has no figures of its family")
    files.write(folder / "config.json", json.dumps(best[1]["config"]))
    return Twin(folder, Figures.read(best[1]), best[0])


def _settings(config: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in _essence(config).items():
        if isinstance(value, dict):
            yield from _settings(value, f"{where}{name}.")
        else:
            yield where + name, value
