"""MLX's log-probs of a model's small twin against transformers'."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from lite_dil.backends.foreign import Misfit, foreign
from lite_dil.backends.mlx.load import check_windows, load, set_dtype, windows
from lite_dil.backends.mlx.lora import linear_layers
from lite_dil.backends.mlx.prefix import applied_windows
from lite_dil.backends.mlx.probing import log_probs
from lite_dil.backends.mlx.repairs import wrap
from lite_dil.backends.twin import twin
from lite_dil.base.errors import UserError, first_line
from lite_dil.models.options import ModelOptions
from lite_dil.models.spelling import hf_layer, text_only
from lite_dil.models.twin import WINDOW, probe, weight_digest

TOLERANCE = 5e-3 if mx.metal.is_available() else 3e-4  # nats: above float32's noise, which products of 19 bits make on an M5


_NUMBER = re.compile(r"\d+")


class Differences(NamedTuple):
    """What MLX computes otherwise than transformers.

    Attributes:
        within, whole: by how much log-probs differ at most, in nats: of the tokens within every attention window, and of all.
        layers: the linear layers that are another layer in transformers' model, or hold its weight in another form, with # for
            numbers.
        uncovered: settings that were not compared.
    """

    within: float
    whole: float
    layers: frozenset[str]
    uncovered: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether nothing differs by more than rounding."""
        return self.whole < TOLERANCE


class TwinCheck(NamedTuple):
    """Layers that must have no adapter, as in `Differences`, and what is to be said."""

    layers: frozenset[str] = frozenset()
    remark: str = ""

    def adaptable(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Return the layers that can have an adapter."""
        return {name: shape for name, shape in shapes.items() if _NUMBER.sub("#", name) not in self.layers}


def check_twin(model: Any, folder: Path, name: str, config: dict[str, Any], max_length: int, code: bool) -> TwinCheck:
    """Compare a model's twin with transformers.

    Args:
        model, config: as loaded, with wrapped layers, for the windows of a model that is not compared.
        code: whether the model's own code may run.

    Raises:
        UserError: mlx-lm computes something else than transformers.
    """
    try:
        found = compare(folder, name, code)
        mx.clear_cache()  # what the copy has freed would serve the adapters, and larger buffers than they need count whole
    except Misfit as error:
        check_windows(config, applied_windows(model), max_length, name)
        advice = "before a long run, compare its first figures with another --backend's"
        return TwinCheck(remark=f"{name} was not compared with transformers: {error}; {advice}")
    if not found.right:
        if not found.within < TOLERANCE or not any(windows(config)):
            raise UserError(
                f"--model {name}: mlx-lm computes this model differently from transformers, by up to {found.whole:.2g} nats "
                "per token on a small copy of it with random weights; take another --backend, or a later mlx-lm"
            )
        check_windows(config, None, max_length, name)
    remarks = []
    if found.layers:
        named = ", ".join(sorted({layer.rpartition(".")[2] for layer in found.layers}))
        remarks.append(f"no adapter on some layers named {named}: mlx-lm holds other weights there than transformers")
    if found.uncovered:
        named = ", ".join(found.uncovered[:6]) + (", ..." if len(found.uncovered) > 6 else "")
        other = "without torch, only another model of its family was compared with transformers"
        remarks.append(f"{other}; it differs in {named}")
    return TwinCheck(found.layers, "; ".join(remarks))


def compare(folder: Path, name: str, code: bool = False) -> Differences:
    """Compare a model's twin with transformers.

    Raises:
        Misfit: transformers' figures are unknown, or mlx-lm cannot load the twin, with the reason.
    """
    with twin(folder, code) as one:
        try:
            small, settings, _ = load(one.folder, name, ModelOptions(dtype="float32", trust_remote_code=code))
        except UserError as error:  # of the model itself it was not
            raise Misfit(f"its small copy cannot be loaded ({first_line(error)})") from None
        set_dtype(small, "float32", pre_quantised=False)
        layers = _unlike(small, text_only(settings), one.figures.layers)
        wrap(small, settings, "off")
        small.eval()
        ids = mx.array(probe()[None])
        found = log_probs(foreign(small, ids)[0, :-1].astype(mx.float32), ids[0, 1:])
    off = np.abs(found - one.figures.logps)
    return Differences(float(off[: WINDOW - 1].max()), float(off.max()), layers, one.uncovered)


def _unlike(model: Any, alone: bool, theirs: Mapping[str, str]) -> frozenset[str]:
    """Return the linear layers none of which is a layer of transformers' model by its name and weight, with # for numbers."""
    modules = dict(model.named_modules())
    paths = {hf_layer(path, alone): path for path in linear_layers(model)}
    same = {name for name, path in paths.items() if theirs.get(name) == weight_digest(np.array(modules[path].weight))}
    return frozenset(_NUMBER.sub("#", name) for name in paths) - {_NUMBER.sub("#", name) for name in same}
