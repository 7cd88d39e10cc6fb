"""Memory of the models that reward a policy's own answers: their weights, and the passes in which they score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lite_dil.base.checked import read_object
from lite_dil.base.errors import UserError
from lite_dil.batching.schedule import examples_per_step
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.models.header import read_header
from lite_dil.planning.estimate import FLOAT32
from lite_dil.rewards.classifier import PASS_TOKENS
from lite_dil.rewards.spec import HF, IMPLICIT, REWARD_RUN, Part, joined, parse
from lite_dil.runs.folder import RunFolder, adapter_of

_CONFIG, _WHOLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ADAPTERS, _HEAD = ("adapter_model.safetensors", "adapters.safetensors"), "head.safetensors"  # PEFT's or mlx-lm's, and a head


def reward_bytes(config: ResolvedConfig, e: int) -> int:
    """Return the bytes of the adapters and heads, in float32, and of the classifiers, `e` for a number, that reward.

    Those of `uncounted` take more. Raises UserError if a file cannot be read.
    """
    return sum(_numbers(_files(part)) * (e if part.kind == HF else FLOAT32) for part in _parts(config))


def rewarding_bytes(config: ResolvedConfig, e: int) -> int:
    """Return what the largest pass of a classifier makes besides its weights, `e` bytes for a number; 0 without one.

    Measured on Llama, Qwen 2, Mistral and Gemma 2 as transformers computes them on a CPU, in batches with padding.
    """
    return max((shape.pass_bytes(config, e) for part in _parts(config) if (shape := _Classifier.of(part))), default=0)


def uncounted(config: ResolvedConfig) -> list[str]:
    """Return the reward models of which something is not counted, as the user named them, and what."""
    missing = [f"{part.kind}:{part.value} (its files are not here)" for part in _parts(config) if not _files(part)]
    here = [part for part in _parts(config) if part.kind == HF and _files(part)]
    return missing + [f"hf:{part.value} (its passes, of a kind not known here)" for part in here if not _Classifier.of(part)]


class _Classifier(NamedTuple):
    """A classifier's sizes: widths of the model, its MLP, and all its queries and keys; `scores` are held whole if `eager`."""

    hidden: int
    intermediate: int
    heads: int
    queries: int
    keys: int
    eager: bool

    @classmethod
    def of(cls, part: Part) -> _Classifier | None:
        """Return them for hf:MODEL; None for other rewards, and where its config.json is not here or does not say them."""
        folder = _model_folder(part.value) if part.kind == HF else None
        if folder is None or not (folder / _CONFIG).is_file():
            return None
        config = read_object(folder / _CONFIG)
        text: dict[str, Any] = {**config, **(config.get("text_config") or {})}
        names = ("hidden_size", "intermediate_size", "num_attention_heads")
        found = [number for name in names if type(number := text.get(name)) is int and number > 0]
        if len(found) < len(names):
            return None
        hidden, intermediate, heads = found
        each = text.get("head_dim") or hidden // heads
        keys = (text.get("num_key_value_heads") or heads) * each
        return cls(hidden, intermediate, heads, heads * each, keys, bool(text.get("attn_logit_softcapping")))

    def pass_bytes(self, config: ResolvedConfig, e: int) -> int:
        """Return what a pass over answers makes, each with its prompt as long as --max-length allows."""
        assert config.samples  # resolved
        length = config.max_length
        tokens = length * min(examples_per_step(config) * config.samples, max(1, PASS_TOKENS // length))
        mlp = (4 * self.hidden + 3 * self.intermediate) * e
        # Keys and values are repeated for every query head, and the mask is made one of numbers.
        attention = (3 * self.hidden + 5 * self.queries + self.keys) * e + length * e
        if self.eager:
            attention += self.heads * length * (e + FLOAT32 + (FLOAT32 if e != FLOAT32 else 0))
        return tokens * (max(mlp, attention) + length)


def _parts(config: ResolvedConfig) -> list[Part]:
    if not config.online:
        return []
    found = parse(joined(config.reward, config.eval_reward))
    return [part for part in found if part.kind in (REWARD_RUN, IMPLICIT, HF)]


def _files(part: Part) -> list[Path]:
    """Return the files of weights of a run's adapter, an adapter, or a model; none if one of them is not here."""
    if part.kind == HF:
        folder = _model_folder(part.value)
        found = [] if folder is None else [folder / name for name in _model_files(folder)]
    else:
        folder = _adapter_folder(Path(part.value))
        own = [folder / name for name in _ADAPTERS if (folder / name).is_file()][:1]
        found = own + [folder / _HEAD] * (bool(own) and (folder / _HEAD).is_file())
    return found if all(path.is_file() for path in found) else []


def _model_files(folder: Path) -> Sequence[str]:
    """Return the names of the files that hold each weight once: those of the index, or the one file without an index."""
    if not (folder / _INDEX).is_file():
        return [_WHOLE]
    names = read_object(folder / _INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{folder / _INDEX}: weight_map is not a list of files by the names of weights; download it again")
    return sorted(set(names.values()))


def _model_folder(model: str) -> Path | None:
    """Return a folder, or that of a hub id in the hub's cache here; None if there is none."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, _CONFIG)
    except HFValidationError:  # a path
        return None
    return Path(found).parent if isinstance(found, str) else None


def _adapter_folder(path: Path) -> Path:
    """Return the folder with an adapter's weights: itself, a run's final one, a checkpoint's, or that of a run's newest."""
    latest = RunFolder(path).latest()
    places = [path, path / "adapter", adapter_of(path), *([adapter_of(latest)] if latest else [])]
    return next((place for place in places if any((place / name).is_file() for name in _ADAPTERS)), path)


def _numbers(files: Sequence[Path]) -> int:
    return sum(math.prod(place.shape) for path in files for place in read_header(path).values())
