"""An exported reward model as transformers loads it: its class, and the scores that it computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from lite_dil.backends.types import Sequences
from lite_dil.base.errors import UserError

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
    pad = model.config.get_text_config().pad_token_id
    found: list[float] = []
    model.eval()
    with torch.no_grad():
        for start in range(0, len(sequences), _TOGETHER):
            some = [[*prompt, *response] for prompt, response in sequences[start : start + _TOGETHER]]
            found += model(**_padded(some, pad)).logits[:, 0].double().tolist()
    return np.array(found)


def _padded(sequences: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, sequences))
    ids = [[*each, *[pad] * (longest - len(each))] for each in sequences]
    mask = [[1] * len(each) + [0] * (longest - len(each)) for each in sequences]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
