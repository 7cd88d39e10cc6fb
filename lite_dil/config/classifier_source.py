"""``hf:MODEL``: a reward model of transformers, as a source of rewards and for ``lite-dil score``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lite_dil.backends import registry
from lite_dil.base.errors import UserError
from lite_dil.config.options import build
from lite_dil.config.train_config import ResolvedConfig, flag
from lite_dil.data.encoder import Encoder
from lite_dil.data.prompts import FLAGS
from lite_dil.models.fingerprint import fingerprint
from lite_dil.models.options import MODEL_FIELDS
from lite_dil.rewards.classifier import ClassifierReward, ClassifierText
from lite_dil.rewards.spec import HF, Part
from lite_dil.training.options import ReferenceOptions
from lite_dil.training.reference_cache import cache_folder

_OWN = ("backend", "dtype")  # options of a model that it is loaded by


class ClassifierModel:
    """A sequence classifier's files, its tokenizer in memory.

    Args:
        part: what the user gave.
        options: how it is loaded; its backend and type count.

    Raises UserError if there is none, or the backend is not torch.
    """

    def __init__(self, part: Part, options: ResolvedConfig, say: Callable[[str], None]) -> None:
        self.part, self.options = part, options
        self.backend, where = registry.resolve(options.backend), f"--reward {HF}:{part.value}"
        if self.backend == "mlx":
            raise UserError(f"{where}: transformers computes it by torch, and the backend is mlx; give --backend cuda or cpu")
        self.text = ClassifierText(part.value, where, say)
        self.identity = fingerprint(Path(self.text.folder), cache_folder(ReferenceOptions()))

    chat = False  # whether plain-text prompts are user messages

    def open(self, say: Callable[[str], None]) -> ClassifierReward:
        """Load it. Raises UserError if it cannot be loaded."""
        return ClassifierReward(self.text, self.backend, self.options.dtype, self.part.name, say)

    def data_options(self, given: Mapping[str, Any]) -> ResolvedConfig:
        """Return options that read data, `FLAGS`."""
        return build({name: value for name, value in given.items() if name in FLAGS and value is not None}, {})

    def encoder(self, say: Callable[[str], None]) -> Encoder:
        """Return its encoder."""
        return self.text.encoder


def find_classifier(name: str, given: Mapping[str, Any], say: Callable[[str], None]) -> ClassifierModel:
    """Return the classifier that ``hf:MODEL`` names.

    Args:
        given: options by field name, of which those in `MODEL_FIELDS` count.

    Raises UserError if there is none, or an option is of another kind of reward model.
    """
    options = {name: value for name, value in given.items() if name in MODEL_FIELDS and value is not None}
    for wrong in options.keys() - set(_OWN):
        raise UserError(f"{flag(wrong)} is of a reward model of lite-dil, not of {name}; leave it out")
    return ClassifierModel(Part(HF, name.removeprefix(f"{HF}:"), 1.0), build(options, {}), say)
