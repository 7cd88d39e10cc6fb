"""A trained adapter to be used: where it is, which model it belongs to, and both loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from lite_dil import backends
from lite_dil.base.errors import UserError
from lite_dil.base.hashing import file_pieces, sha256
from lite_dil.base.start import quiet_bars
from lite_dil.config.options import add_flags, build, read_yaml
from lite_dil.config.train_config import FIELDS, TrainConfig
from lite_dil.data.encoder import Encoder
from lite_dil.models.find import load_tokenizer, resolve_model
from lite_dil.runs.folder import RunFolder

# The flags of train that say how the model is loaded; a run's own are taken where they are not given.
FLAGS = ("model", "backend", "load_in_4bit", "dtype", "head_bits")


@dataclass(frozen=True)
class Source:
    """What ``--adapter`` names.

    `adapter` is the folder of the adapter's files, None for the bare model; `run` is the run that made it, where it lies in
    one's folder. `strength` multiplies the adapter.
    """

    adapter: Path | None
    run: RunFolder | None
    config: TrainConfig
    strength: float = 1.0


@dataclass(frozen=True)
class Tuned:
    """A model in memory with its adapter, to be used and not to be trained. `model` is what `resolve_model` returned."""

    backend: backends.Backend
    encoder: Encoder
    source: Source
    model: str


def add_arguments(parser: argparse.ArgumentParser, required: bool = True, flags: Iterable[str] = FLAGS) -> None:
    """Add --adapter and how the model is loaded, by the `flags` of train."""
    group = parser.add_argument_group("adapter")
    group.add_argument(
        "--adapter",
        metavar="DIR",
        required=required,
        help="a run's folder, one of its checkpoints, or the folder of an adapter in PEFT's or mlx-lm's format; model and "
        "quantisation are the run's unless given" + ("" if required else " (default: none, the bare --model)"),
    )
    group.add_argument(
        "--strength",
        metavar="X",
        type=float,
        default=1.0,
        help=f"multiply the adapter: 0 is the bare model, {backends.MAX_STRENGTH:g} the most (default: 1, as it was trained)",
    )
    add_flags(parser, flags)


def find(args: argparse.Namespace) -> Source:
    """Return what --adapter and the model's flags name, without loading anything but small files.

    Raises:
        UserError: there is no adapter, or nothing says which model it belongs to.
    """
    strength = backends.check_strength(args.strength)
    given = {name: value for name, value in vars(args).items() if name in FIELDS}
    # No gradient is taken: what training needs beside the model is left out.
    base: dict[str, Any] = {"layout": "plain", "gradient_checkpointing": "off"}
    if args.adapter is None:
        if strength != 1:
            raise UserError(f"--strength {strength:g} is of an adapter; give --adapter too")
        return Source(None, None, build(given, base | {"lora_r": 1}))
    adapter, run = _locate(Path(args.adapter))
    saved = read_yaml(run.path / "config.yaml") if run else {}
    if "backend" not in given and "backend" in saved:
        base["backend"] = _usable(saved["backend"])
    same = given.get("backend", base.get("backend")) == saved.get("backend")
    # Another backend has another 16-bit type, and perhaps no head of fewer bits.
    names = [name for name in FLAGS if name in saved and (same or name in ("model", "load_in_4bit"))]
    base |= {name: saved[name] for name in names if name != "backend"}
    if "model" not in base:
        base["model"] = given.get("model") or _own_model(adapter)
    return Source(adapter, run, build(given, base | {"init_adapter": str(adapter), "reference": "base"}), strength)


def load(source: Source, say: Callable[[str], None]) -> Tuned:
    """Load the model and put the adapter on it; `say` takes a line for people."""
    if source.adapter and source.run and not source.run.adapter.exists() and source.adapter.parent == source.run.latest():
        say(f"{source.run.path} has not ended: its newest checkpoint, {source.adapter.parent.name}, is used")
    name = backends.resolve(source.config.backend)
    backends.import_library(name)
    quiet_bars()
    model = resolve_model(source.config.model, say)
    encoder = Encoder(load_tokenizer(model))
    # The fused layers are for the backward pass, and unpack 4-bit weights for every token; on a GPU bitsandbytes' own do not.
    config = replace(source.config, fused_layers=False) if name == "cuda" else source.config
    backend = backends.load(name, config, model)
    backend.set_strength(source.strength)
    say(f"{source.config.model} on {backend.description}")
    return Tuned(backend, encoder, source, model)


def identity(source: Source) -> str:
    """Return a name for what answers: "base", or "tuned-" and 8 digits that name the adapter's weights and its strength."""
    if source.adapter is None:
        return "base"
    weights = (file_pieces(path) for path in sorted(source.adapter.glob("*.safetensors")))
    return f"tuned-{sha256(chain([str(source.strength).encode()], *weights))[:8]}"


def _locate(path: Path) -> tuple[Path, RunFolder | None]:
    """Return the adapter's folder, and the run that it lies in."""
    for folder in (path, path / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder, _run_of(folder.absolute())
    run = RunFolder(path)
    if latest := run.latest():  # of a run that is still going on, or was stopped
        return latest / "adapter", run
    raise UserError(
        f"--adapter {path}: no adapter there; give a run's folder, one of its checkpoints, or a folder that holds "
        "adapter_config.json"
    )


def _run_of(adapter: Path) -> RunFolder | None:
    """Return the run in one of whose places an adapter lies; a config.yaml elsewhere above it is some other program's."""
    above = adapter.parent
    if above.parent.name == "checkpoints":
        above = above.parent.parent
    return RunFolder(above) if adapter.name == "adapter" and (above / "config.yaml").is_file() else None


def _usable(backend: str) -> str:
    """Return the run's own backend where this machine has it, else auto."""
    try:
        return backends.resolve(backend)
    except UserError:
        return "auto"


def _own_model(adapter: Path) -> str:
    """Return the model that an adapter's own config names."""
    from lite_dil.models.adapters import read_config

    config = read_config(adapter)
    model = config.get("base_model_name_or_path") or config.get("model")
    if not isinstance(model, str):
        raise UserError(f"--adapter {adapter}: its adapter_config.json names no model; give --model")
    return model
