"""A model with its adapter, loaded to be used: where it comes from, and both in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lite_dil.backends import registry
from lite_dil.backends.protocol import Backend
from lite_dil.base.hashing import file_pieces, sha256
from lite_dil.base.start import quiet_bars
from lite_dil.data.encoder import Encoder
from lite_dil.models.find import load_tokenizer, resolve_model
from lite_dil.models.options import ModelOptions, ResolvedAdapter
from lite_dil.runs.folder import RunFolder, checkpoint_of


@dataclass(frozen=True)
class AdapterSource:
    """Which adapter, on which model.

    Attributes:
        adapter: the folder of the adapter's files, None for the bare model.
        run: the run that made it, where it lies in one's folder.
        options: how the model is loaded.
        strength: multiplies the adapter.
    """

    adapter: Path | None
    run: RunFolder | None
    options: ModelOptions
    strength: float = 1.0


@dataclass(frozen=True)
class Policy:
    """A model in memory with its adapter. `model` is what `resolve_model` returned."""

    backend: Backend
    encoder: Encoder
    source: AdapterSource
    model: str


def load(source: AdapterSource, say: Callable[[str], None]) -> Policy:
    """Load the model and put the adapter on it; `say` takes a line for people."""
    checkpoint = checkpoint_of(source.adapter) if source.adapter else None
    if checkpoint and source.run and not source.run.adapter.exists() and checkpoint == source.run.latest():
        say(f"{source.run.path} has not ended: its newest checkpoint, {checkpoint.name}, is used")
    options = source.options
    name = registry.resolve(options.backend)
    registry.import_library(name)
    quiet_bars()
    model = resolve_model(options.model, say)
    encoder = Encoder(load_tokenizer(model))
    backend = registry.load(name, options, model, _adapter(source), None)
    backend.set_strength(source.strength)
    say(f"{options.model} on {backend.description}")
    return Policy(backend, encoder, source, model)


def _adapter(source: AdapterSource) -> ResolvedAdapter | None:
    if source.adapter is None:
        return None
    return ResolvedAdapter(init_adapter=str(source.adapter), reference="base", lora_dropout=0.0)


def identity(source: AdapterSource) -> str:
    """Return a name for what answers: "base", or "tuned-" and 8 digits that name the adapter's weights and its strength."""
    if source.adapter is None:
        return "base"
    weights = (file_pieces(path) for path in sorted(source.adapter.glob("*.safetensors")))
    return f"tuned-{sha256(chain([str(source.strength).encode()], *weights))[:8]}"
