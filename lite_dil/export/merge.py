"""Merge a LoRA adapter into a checkpoint: a new Hugging Face folder, written tensor by tensor from the old one's files.

Everything that the adapter does not touch, such as names, biases and tied embeddings, stays as it is in the files, and memory
holds one tensor at a time. Weights that training had in 4 or 8 bits come dequantised from the backend.
"""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lite_dil.backends.types import DenseWeight
from lite_dil.base import files
from lite_dil.base.checked import read_object
from lite_dil.base.errors import UserError
from lite_dil.data.arguments import with_arguments
from lite_dil.models import tensors
from lite_dil.models.adapters import Adapter
from lite_dil.models.model_config import read_config
from lite_dil.models.spelling import rope_config
from lite_dil.models.tensors import CODES, FLOATS, Planned, Stored, core_name, encode

SHARD_BYTES = 5 * 10**9
# Files of a model besides its weights and config.json.
_BESIDE = (
    *("generation_config.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "LICENSE*", "LICENCE*", "NOTICE*"),
)


Dense = Mapping[str, DenseWeight]  # by layer name


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder: its config.json and the place of each tensor.

    Attributes:
        renamed: the names in the model of tensors that have another name in the files.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]
    renamed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, name: str) -> Checkpoint:
        """Read the headers of a folder's files; `name` is the user's name for the model.

        Raises:
            UserError: safetensors files are missing.
        """
        config = read_config(folder / "config.json", f"--model {name}")
        index = folder / "model.safetensors.index.json"
        if (folder / "model.safetensors").is_file():  # in the loaders' order, so as not to take a second copy
            files = ["model.safetensors"]
        elif index.is_file():
            files = _files(index, name)
        else:
            files = sorted(path.name for path in folder.glob("model*.safetensors"))
        if not files:
            raise UserError(
                f"--model {name}: no model*.safetensors in {folder}; weights in other files (.bin) cannot be merged. Load it "
                "in transformers, save it with save_pretrained, which writes safetensors, and give that folder as --model"
            )
        found: dict[str, Stored] = {}
        for file in files:
            found |= tensors.read(folder / file)
        return cls(folder, config, found)

    @property
    def packed(self) -> bool:
        """Whether the weights in its files are quantised."""
        return bool(self.config.get("quantization_config") or self.config.get("quantization"))

    @property
    def code(self) -> str:
        """Its floating-point type: the config's, else the type of most weights."""
        text = self.config.get("text_config") or {}
        for name in (source.get(key) for source in (self.config, text) for key in ("dtype", "torch_dtype")):
            if name in CODES:
                return CODES[name]
        return Counter(stored.code for stored in self.tensors.values() if stored.floating).most_common(1)[0][0]

    @property
    def dtype(self) -> str:
        """That type's name."""
        return FLOATS[self.code]

    @property
    def tied(self) -> bool:
        """Whether its output head is its embedding table."""
        tied = (self.config.get("text_config") or self.config).get("tie_word_embeddings")
        # Without the key the model class decides; files without a head mean that it is.
        return not any(core_name(key) == "lm_head.weight" for key in self.tensors) if tied is None else bool(tied)


def lacks(checkpoint: Checkpoint, adapter: Adapter) -> bool:
    """Return whether a layer of the adapter is not in the files under its own name."""
    return not {core_name(f"{layer}.weight") for layer in adapter.weights} <= set(map(core_name, checkpoint.tensors))


def plan(checkpoint: Checkpoint, adapter: Adapter, dense: Dense, dtype: str | None, name: str) -> list[Planned]:
    """Return the tensors of the merged model, in the order of the checkpoint's.

    Args:
        adapter: the adapter, with the scale to merge it by.
        dense: weights to use instead of the checkpoint's.
        dtype: "float32", "float16" or "bfloat16" for all floating-point tensors; None keeps each tensor's type.
        name: the user's name for the model.

    Raises:
        UserError: a layer of the adapter, or of `dense`, is not in the files, or has another shape there.
    """
    code = CODES[dtype] if dtype else None
    planned, left = [], set(adapter.weights) | set(dense)
    ours = {core_name(layer): layer for layer in left}
    if len(ours) != len(left):
        raise UserError(f"--model {name}: its layer names are ambiguous; cannot be merged")
    for key, stored in checkpoint.tensors.items():
        named = checkpoint.renamed.get(key, key)
        layer, _, leaf = named.rpartition(".")
        own = ours.get(core_name(layer)) or ours.get(core_name(key.rpartition(".")[0]))
        if checkpoint.packed and not (leaf == "weight" and own) and _packing(named, dense, ours):
            continue
        if checkpoint.tied and core_name(layer) == "lm_head":
            continue  # loaders use the embedding table
        if own is None or leaf != "weight":
            if checkpoint.packed and not stored.floating:
                raise UserError(f"--model {name}: {key} is quantised in a way that lite-dil does not know; cannot be merged")
            planned.append(_unchanged(key, stored, code))
            continue
        left.discard(own)
        weight = dense.get(own) or DenseWeight(stored.shape, stored.float32)
        planned.append(
            _merged(key, stored, adapter, weight, own, code or (stored.code if stored.floating else checkpoint.code))
        )
    if left:
        raise UserError(
            f"--model {name}: its files have no weight of {min(left)}, so the adapter cannot be merged into them; "
            "--format adapter still works"
        )
    return planned


def _packing(key: str, dense: Dense, ours: dict[str, str]) -> bool:
    """Return whether a tensor of a quantised checkpoint describes how a weight is packed."""
    layer, _, leaf = key.rpartition(".")
    if leaf in ("scales", "biases") and ours.get(core_name(layer)) in dense:  # MLX
        return True
    owner, weight, _ = key.partition(".weight.")  # bitsandbytes
    return bool(weight) and ours.get(core_name(owner)) in dense


def _unchanged(key: str, stored: Stored, code: str | None) -> Planned:
    code = code if code and stored.floating else stored.code
    return Planned(key, code, stored.shape, functools.partial(stored.pieces, code))


def _merged(key: str, stored: Stored, adapter: Adapter, weight: DenseWeight, layer: str, code: str) -> Planned:
    pair = adapter.weights.get(layer)
    if pair and (pair[1].shape[0], pair[0].shape[1]) != weight.shape:
        rows, columns = pair[1].shape[0], pair[0].shape[1]
        raise UserError(f"{stored.path.name}: {key} is {weight.shape}, its adapter is for {rows, columns}; cannot be merged")

    def pieces() -> Iterator[np.ndarray]:
        values = weight.make()
        if pair:
            values += np.float32(adapter.scale) * (pair[1] @ pair[0])
        return encode(values, code)

    return Planned(key, code, weight.shape, pieces)


def write(
    folder: Path,
    planned: list[Planned],
    checkpoint: Checkpoint,
    dtype: str | None,
    ends: Sequence[int],
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the planned tensors and the model's other files into `folder`.

    Args:
        ends: the tokens that end a response.
        arguments: those of the chat template in training, which the written template then has of itself.
    """
    for pattern in _BESIDE:
        for path in checkpoint.folder.glob(pattern):
            if path.is_file():
                to = folder / path.relative_to(checkpoint.folder)
                files.make_folder(to.parent)
                files.copy(path, to)
    if arguments:
        _set_arguments(folder, arguments)
    config = _config(checkpoint, dtype)
    _write_ends(folder / "generation_config.json", config, ends)
    _write_json(folder / "config.json", config)
    shards = _shards(planned)
    if len(shards) == 1:
        tensors.write(folder / "model.safetensors", shards[0], "pt")
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors.write(folder / file, shard, "pt")
        where |= {tensor.name: file for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in planned)}, "weight_map": where}
    _write_json(folder / "model.safetensors.index.json", index)


def _files(index: Path, name: str) -> list[str]:
    """Return the names of the files that an index names."""
    files = read_object(index, f"--model {name}: {index.name}").get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"--model {name}: {index.name} has no weight_map with the names of files")
    return sorted(set(files.values()))


def _set_arguments(folder: Path, arguments: Mapping[str, Any]) -> None:
    """Set the chat template's arguments in its text: programs that run the model give none, or their own."""
    for file in [folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*.jinja")]:
        if file.is_file():
            files.write(file, with_arguments(file.read_text(encoding="utf-8"), arguments))
    file = folder / "tokenizer_config.json"
    settings = read_object(file) if file.is_file() else {}
    template = settings.get("chat_template")
    if template:
        if isinstance(template, list):
            made: Any = [each | {"template": with_arguments(each["template"], arguments)} for each in template]
        else:
            made = with_arguments(template, arguments)
        _write_json(file, settings | {"chat_template": made})


def _write_ends(file: Path, config: dict[str, Any], ends: Sequence[int]) -> None:
    """Add `ends` to the end tokens in the model's generation_config.json and in `config`.

    A base's own end another than that of the chat template it is trained on: without the latter no runtime stops.
    """
    own: dict[str, Any] = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    settings = defaults_of(file.parent) or own
    known = end_tokens(settings)
    if missing := [token for token in ends if token not in known]:
        found = [*known, *missing]
        settings["eos_token_id"] = found if len(found) > 1 else found[0]
        config["eos_token_id"] = settings["eos_token_id"]
        _write_json(file, settings)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    files.write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def defaults_of(folder: Path) -> dict[str, Any]:
    """Return a folder's generation_config.json, or nothing. Raises UserError if it is damaged, or its end tokens are none."""
    if not (file := folder / "generation_config.json").is_file():
        return {}
    settings = read_object(file)
    ids = settings.get("eos_token_id")
    if not all(type(token) is int for token in (ids if isinstance(ids, list) else [] if ids is None else [ids])):
        raise UserError(f"{file}: eos_token_id is {repr(ids)[:80]}; expected a token's number, or a list of them")
    return settings


def end_tokens(settings: Mapping[str, Any]) -> list[int]:
    """Return the end tokens that the content of a generation_config.json or config.json names."""
    ids = settings.get("eos_token_id")
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _shards(planned: list[Planned]) -> list[list[Planned]]:
    """Divide tensors into files of at most SHARD_BYTES, or of one tensor."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _config(checkpoint: Checkpoint, dtype: str | None) -> dict[str, Any]:
    """Return the merged model's config.json: not quantised, and with the rope in every reader's spelling."""
    config = {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "quantization", "_name_or_path")}
    if dtype or checkpoint.packed:
        parts = [config, config["text_config"]] if "text_config" in config else [config]
        for part in parts:
            part |= {key: dtype or checkpoint.dtype for key in ("dtype", "torch_dtype") if key in part}
    return config | _rope_spelling(config)


def _rope_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """Return what to add to a config.json for mlx-lm, transformers 4 and programs modelled on it.

    They read rope_theta, and use 10000 if it is missing. Where each type of layers has its own rope, transformers may read
    another from it, or fail, as for Gemma 4, of which mlx-lm reads rope_parameters itself: then nothing is added.
    """
    from huggingface_hub.errors import StrictDataclassError

    text = config.get("text_config") or config
    nested = any(isinstance(rope, dict) for rope in (text.get("rope_parameters") or {}).values())
    try:
        added = {key: value for key, value in rope_config(config).items() if value is not None}
        return added if not nested or _ropes(config | added) == _ropes(config) else {}
    except (KeyError, ValueError, TypeError, AttributeError, StrictDataclassError, UserError):
        if not nested:
            raise
        return {}


def _ropes(config: dict[str, Any]) -> Any:
    """Return the ropes that transformers reads from a config.json."""
    from transformers import CONFIG_MAPPING

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`rope_scaling` is deprecated", FutureWarning)  # whether it is understood
        read = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    return read.get_text_config().rope_parameters
