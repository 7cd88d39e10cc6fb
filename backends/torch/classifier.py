"""Sequence classifiers of transformers with one label, which score: exported reward models, and those of others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification

from lite_dil.backends.torch import out_of_memory
from lite_dil.backends.torch.device import compute_dtype
from lite_dil.backends.types import Sequences
from lite_dil.base.errors import UserError, first_line
from lite_dil.models.hub import STRANGE

_TOGETHER = 4  # sequences of unequal lengths in a batch, so that padding is read past


def class_name(folder: Path) -> str:
    """Return the name of the class that scores sequences with this model's decoder.

    Raises UserError if transformers has none, or one whose head is not the linear map `score`.
    """
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    found: Any = AutoModelForSequenceClassification._model_mapping.get(type(config), None)
    if found is None:
        raise UserError(f"--format reward: transformers has no sequence classifier for models of type {config.model_type}")
    with torch.device("meta"):
        head = getattr(found(config), "score", None)
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise UserError(f"--format reward: {found.__name__} does not score by a linear map of the last state")
    return str(found.__name__)


def scores(folder: Path, sequences: Sequences) -> np.ndarray:
    """Return the score of each prompt with its response, (sequences,) float64, by transformers, in padded batches.

    Raises UserError if the files lack a weight, or have one that the class does not know.
    """
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        str(folder), output_loading_info=True, trust_remote_code=False
    )
    wrong = sorted(name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in map(str, loading[kind]))
    if wrong:
        raise UserError(f"transformers does not take the weights as they were written: {', '.join(wrong[:3])}")
    whole, found = [[*prompt, *response] for prompt, response in sequences], list[float]()
    for start in range(0, len(whole), _TOGETHER):
        found += _logits(model.eval(), whole[start : start + _TOGETHER])
    return np.array(found)


class Classifier:
    """A sequence classifier in memory, beside any other model.

    Args:
        model: its folder or hub id.
        name: the option with which it was given, for messages.
        device: "cuda" or "cpu".
        dtype: the value of --dtype.

    Raises UserError if it cannot be loaded, or has not exactly one label.
    """

    def __init__(self, model: str, name: str, device: str, dtype: str) -> None:
        self.device, self._name = torch.device(device), name
        self.model = out_of_memory.loaded(model, self.device, [], lambda: self._load(model, compute_dtype(dtype, device)))
        if isinstance(head := getattr(self.model, "score", None), torch.nn.Linear):  # 16 bits would make answers equal
            head.float().register_forward_pre_hook(lambda _, inputs: tuple(state.float() for state in inputs))
        text = self.model.config.get_text_config()
        text.use_cache = False  # keys and values of all layers would be kept, and nothing reads them
        # Without a pad token, which old configs write as -1, transformers reads the last token of a single sequence.
        self.batched = text.pad_token_id is not None and text.pad_token_id >= 0
        self.longest = getattr(text, "max_position_embeddings", None)

    def _load(self, model: str, dtype: torch.dtype) -> Any:
        try:
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
            if config.num_labels != 1:
                raise UserError(f"{self._name}: it has {config.num_labels} labels; expected a reward model, which has one")
            with out_of_memory.conversion_report():
                found, loading = AutoModelForSequenceClassification.from_pretrained(
                    model,
                    config=config,
                    dtype=dtype,
                    device_map={"": self.device},
                    output_loading_info=True,
                    trust_remote_code=False,
                )
        except (OSError, ImportError, RuntimeError, SafetensorError, *STRANGE) as error:
            if out_of_memory.ran_out(error):
                raise
            why = "it brings Python files of its own, which are not run" if "trust_remote_code" in str(error) else ""
            raise UserError(f"{self._name}: cannot be loaded ({why or first_line(error)})") from None
        if absent := sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]])):
            raise UserError(f"{self._name}: its files lack {absent[0]}, so it is no sequence classifier")
        found.requires_grad_(False)
        return found.eval()

    def scores(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the score of each sequence of tokens, (sequences,) float64, as the model's own class reads it.

        Raises:
            UserError: a sequence is longer than the model takes.
            OutOfMemory: the device does not hold them all at once.
        """
        if self.longest is not None and (longest := max(map(len, sequences))) > self.longest:
            raise UserError(
                f"{self._name}: a prompt with its answer has {longest} of its tokens, and it takes {self.longest}; give a "
                "lower --max-new-tokens or --max-length"
            )
        groups = [list(sequences)] if self.batched else [[each] for each in sequences]

        def run() -> np.ndarray:
            return np.array([score for group in groups for score in _logits(self.model, group)])

        return out_of_memory.whole("a pass of the reward model", self.device, run)


@torch.no_grad()
def _logits(model: Any, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Return the one logit of each sequence, in a batch that is padded on the right."""
    pad, longest = max(0, model.config.get_text_config().pad_token_id or 0), max(map(len, sequences))
    ids = [[*each, *[pad] * (longest - len(each))] for each in sequences]
    mask = [[1] * len(each) + [0] * (longest - len(each)) for each in sequences]
    inputs = (torch.tensor(rows, device=model.device) for rows in (ids, mask))
    found = model(**dict(zip(("input_ids", "attention_mask"), inputs, strict=True))).logits[:, 0]
    values: list[float] = found.double().tolist()
    return values
