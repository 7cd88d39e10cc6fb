"""What fits into memory, by estimate: how long, how many at once, and what to change if a run does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lite_dil.backends import registry
from lite_dil.backends.limits import checkpointing
from lite_dil.base.errors import UserError, first_line
from lite_dil.base.memory import GIB, Memory
from lite_dil.batching.schedule import row_tokens
from lite_dil.config.train_config import ResolvedConfig, flag
from lite_dil.models.find import model_folder
from lite_dil.models.listing import ListedModel
from lite_dil.models.shape import read_shape
from lite_dil.planning.estimate import AnyModel, Estimate, Load
from lite_dil.planning.known import read_model
from lite_dil.planning.peak import estimate

LENGTHS = 64  # lengths are multiples of this


@dataclass(frozen=True)
class Model:
    """A model and its backend: what an estimate needs besides the options and the load."""

    shape: AnyModel
    backend: str
    dtype: str

    def estimate(self, config: ResolvedConfig, load: Load) -> Estimate:
        """Return the memory of a step whose largest pass is `load`."""
        # A step of several passes accumulates gradients, whether --row-tokens or the user splits it.
        if len(load.prompts) < config.batch_size * config.gradient_accumulation_steps:
            config = replace(config, gradient_accumulation_steps=max(2, config.gradient_accumulation_steps))
        return estimate(config, self.shape, self.backend, self.dtype, load)

    def total(self, config: ResolvedConfig, load: Load) -> int:
        """Return its total bytes."""
        return self.estimate(config, load).total

    def fits(self, config: ResolvedConfig, load: Load, memory: Memory) -> bool:
        """Return whether such a step fits, on the GPU and in the computer's memory."""
        found = self.estimate(config, load)
        return memory.holds(found.total, found.host)

    def mode(self, config: ResolvedConfig) -> str:
        """Return what --gradient-checkpointing resolves to: "off", "selective" or "full"."""
        return checkpointing(config, self.shape.parameters)

    def can_offload(self, config: ResolvedConfig) -> tuple[str, ...]:
        """Return the --offload-... options that this backend and model support."""
        if self.backend != "cuda":
            return ()
        table = not self.shape.tied or config.head_bits is not None
        return ("offload_activations", "offload_embeddings") if table else ("offload_activations",)


def planned_dtype(config: ResolvedConfig, backend: str, here: bool = True) -> str:
    """Return the compute dtype, as far as it is known; a Mac other than this machine has bfloat16."""
    if config.dtype != "auto":
        return config.dtype
    return registry.auto_dtype(backend, here)


def several(load: Load, count: int) -> Load:
    """Return a pass of `count` examples like `load`."""
    return Load(load.prompts * count, load.responses * count)


def most(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Return the largest number in low .. high that fits, or low - 1; if a number fits, so do all smaller ones."""
    low -= 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def longest(config: ResolvedConfig, model: Model, memory: Memory, answers: int) -> int:
    """Return the largest --max-length, a multiple of 64, with which one example of `answers` responses fits; 0 for none."""
    # Not beyond the model's context length.
    limit = (model.shape.max_positions or 2**20) // LENGTHS

    def fits(number: int) -> bool:
        tried = replace(config, max_length=number * LENGTHS)
        return model.fits(tried, Load.worst(replace(tried, batch_size=1), answers), memory)

    return most(fits, 1, limit) * LENGTHS


def most_examples(config: ResolvedConfig, model: Model, memory: Memory, answers: int, limit: int = 1000) -> int:
    """Return how many examples of --max-length fit into one pass, at most `limit`."""
    one = Load.worst(replace(config, batch_size=1), answers)
    return most(lambda count: model.fits(config, several(one, count), memory), 1, limit)


@dataclass(frozen=True)
class Remedy:
    """Changes that make a run fit.

    Attributes:
        changes: options, the least harmful first.
        config: the config with them.
        estimate: the memory of the largest pass with them.
        memory: the memory to fit into.
    """

    changes: dict[str, Any]
    config: ResolvedConfig
    estimate: Estimate
    memory: Memory

    @property
    def fits(self) -> bool:
        """Whether they suffice; if not, nothing here does."""
        return self.memory.holds(self.estimate.total, self.estimate.host)

    def flags(self) -> str:
        """Return the changes as flags."""
        values = {**self.changes}
        if "row_tokens" in values:
            values["row_tokens"] = row_tokens(self.config)
        return " ".join(map(_flag, values, values.values()))

    def advice(self) -> str:
        """Return a sentence of advice."""
        sizes = f"{gigabytes(self.estimate.total)} GB"
        if math.isfinite(self.memory.host):
            sizes += f", and {gigabytes(self.estimate.host)} GB of the computer's"
        if self.fits:
            return f"What would fit: {self.flags()} ({sizes})"
        larger = "a larger GPU" if self.estimate.total > self.memory.usable else "a computer with more memory"
        still = f"{self.flags()} would still take {sizes}" if self.changes else f"it takes {sizes}"
        return f"No setting makes it fit: {still}. Take a smaller model, or {larger}"


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag(name) if value else f"--no-{flag(name)[2:]}"
    return f"{flag(name)} {value}"


def find_remedy(config: ResolvedConfig, model: Model, memory: Memory, load: Callable[[ResolvedConfig], Load]) -> Remedy:
    """Return the least harmful changes that make a run fit, without unnecessary ones.

    If the computer's memory is limited, it tries with and without each offload into it.

    Args:
        load: the largest pass under a config.
    """

    def tried(changes: dict[str, Any]) -> Estimate:
        changed = replace(config, **changes)
        return model.estimate(changed, load(changed))

    def fits(changes: dict[str, Any]) -> bool:
        found = tried(changes)
        return memory.holds(found.total, found.host)

    def without(avoided: tuple[str, ...]) -> dict[str, Any]:
        changes: dict[str, Any] = {name: False for name in avoided if getattr(config, name)}
        for step in _harms(config, model):
            if fits(changes):
                break
            if not set(step) & set(avoided):
                changes |= step
        if not fits(changes):
            changes |= {} if config.row_tokens is None else {"row_tokens": None}
            longest = max(0, config.max_length - 1) // LENGTHS
            shorter = most(lambda n: fits(changes | {"max_length": n * LENGTHS}), 1, longest)
            changes["max_length"] = max(1, shorter) * LENGTHS
        for name in reversed(list(changes)):
            fewer = {n: value for n, value in changes.items() if n != name}
            if fits(changes) and _valid(replace(config, **fewer), model) and fits(fewer):
                changes = fewer
        return changes

    def harm(changes: dict[str, Any]) -> tuple[bool, int]:
        return not fits(changes), -replace(config, **changes).max_length

    offloads = ("offload_activations", "offload_embeddings")
    avoided = [(), offloads[:1], offloads[1:], offloads] if math.isfinite(memory.host) else [()]
    changes = min(map(without, avoided), key=harm)
    return Remedy(changes, replace(config, **changes), tried(changes), memory)


def _harms(config: ResolvedConfig, model: Model) -> list[dict[str, Any]]:
    """Return the changes that save memory, from those that cost a little time to those that change the model."""
    mode = model.mode(config)
    steps: list[dict[str, Any]] = []
    if mode == "off" and model.shape.selective:
        steps.append({"gradient_checkpointing": "selective"})
    if mode != "full":
        steps.append({"gradient_checkpointing": "full"})
    if row_tokens(config) > 2 * config.max_length:
        steps.append({"row_tokens": None})  # enough for the longest pair
    for name in ("offload_activations", "offload_embeddings"):
        if name in model.can_offload(config) and not getattr(config, name):
            steps.append({name: True})
    packed = config.load_in_4bit or model.shape.quantization is not None
    if not packed and not model.shape.experts_stored_in:
        steps.append({"load_in_4bit": True})
    if config.head_bits is None:
        tied = model.shape.tied and model.backend == "cuda"
        steps.append({"head_bits": 8} | ({"offload_embeddings": True} if tied else {}))
    return steps


def _valid(config: ResolvedConfig, model: Model) -> bool:
    """Return whether the options are compatible."""
    if config.offload_embeddings and "offload_embeddings" not in model.can_offload(config):
        return False
    return not config.offload_activations or model.mode(config) == "full"


def memory_line(config: ResolvedConfig, model: str, load: Load, peak: float, before: float) -> str:
    """Return a line that compares the estimate with the peak; a failure of the estimate is said in it and never raised.

    Args:
        config: with the layout and the dtype that the run used, not "auto".
        model: the folder or hub id of the loaded model.
        peak: bytes.
        before: bytes that a process on a CPU used before the model was loaded.
    """
    text, what = f"{gigabytes(peak)} GB peak", ""
    if config.backend == "cpu":
        text = f"the whole process took {gigabytes(peak)} GB at its peak, {gigabytes(before)} GB before the model was loaded"
        what = " of tensors"
    try:
        folder = str(model_folder(model))
        shape = read_shape(folder) if config.backend == "mlx" else read_model(folder, config.trust_remote_code)
        shape = replace(shape, exact=True) if isinstance(shape, ListedModel) else shape
        estimated = Model(shape, config.backend, config.dtype).total(config, load)
    except UserError:  # layers or options that the estimate does not know
        return f"memory: {text}"
    except Exception as error:  # a model's own code may raise anything, and hours of training must end well
        return f"memory: {text} (no estimate: {first_line(error)})"
    return f"memory: {gigabytes(estimated)} GB{what} estimated, {text}"


def gigabytes(number: float) -> str:
    """Return bytes in units of 2^30."""
    return f"{number / GIB:.1f}" if abs(number) >= GIB / 20 else f"{number / GIB:.2f}"
