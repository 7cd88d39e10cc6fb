"""The identity of a reference: hashes of weights and configs, remembered with each file's size and time."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from lite_dil.base.checked import with_digest, without_digest
from lite_dil.base.disk import writing
from lite_dil.base.errors import UserError
from lite_dil.base.files import make_folder, replace_file
from lite_dil.base.hashing import blake2, blake2_and_sha256, file_pieces
from lite_dil.base.strict_json import parse_json
from lite_dil.models.find import model_folder
from lite_dil.models.model_config import read_config
from lite_dil.models.options import AdapterOptions

_VERSION = "1"
_NOT_COMPUTED = ("transformers_version", "_name_or_path")  # notes of the program that saved the model


def reference_key(options: AdapterOptions, memo: Path, model: str, identity: str) -> dict[str, str]:
    """Return what the reference's log-probs depend on besides the tokens, by name.

    Args:
        memo: the folder in which hashes of large files are remembered.
        model: the folder or hub id of the base.
        identity: the backend's part: library, compute dtype and quantisation.
    """
    key = {"version": _VERSION, "computed": identity, "weights": fingerprint(model_folder(model), memo)}
    if options.reference == "initial-adapter":
        key["adapter"] = fingerprint(Path(options.init_adapter or ""), memo)
    return key


def base_of(model: str, memo: Path | None) -> dict[str, Any]:
    """Return what identifies a base model: a hash of its weights, and the fields of its config.json that may be computed with.

    Args:
        model: its folder or hub id.
        memo: the folder in which hashes of large files are remembered; None remembers none.
    """
    folder = model_folder(model)
    weights = _hash(folder, memo, ("*.safetensors", "*.bin", "*.gguf"), portable=True)
    config = read_config(folder / "config.json", f"--model {model}")
    return {"weights": weights, "config": {name: config[name] for name in config if name not in _NOT_COMPUTED}}


def fingerprint(folder: Path, memo: Path | None) -> str:
    """Return a hash of a model's or an adapter's weights and options."""
    return _hash(folder, memo, ("*.safetensors", "*.bin", "*.gguf", "*config.json"), portable=False)


def _hash(folder: Path, memo: Path | None, patterns: tuple[str, ...], portable: bool) -> str:
    """Return a hash of a folder's files by name and content; if `portable` the same for a copy in the hub's cache.

    Reading 16 GB takes a while, so `memo` remembers a file's hash with its size, times and number; a file in the hub's own
    cache is named by its hash.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    remembered: dict[str, Any] = {}
    if memo:
        with suppress(OSError, ValueError, TypeError):
            remembered = dict(parse_json((memo / "files.json").read_text(encoding="utf-8")))
    names = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if not any(path.suffix != ".json" for path in names):
        raise UserError(f"{folder}: no weights there (*.safetensors, *.bin or *.gguf) to tell this model from others by")
    values, changed, hub = list[str](), False, Path(HF_HUB_CACHE).resolve()
    for path in names:
        real = path.resolve()
        stat = real.stat()
        seen = [str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]  # mtime can be set, ctime not
        if len(real.name) == 64 and real.parent.name == "blobs" and real.is_relative_to(hub):
            value = real.name
        elif isinstance(note := remembered.get(str(real)), dict) and (both := _hashes(note, seen)):
            value = both[portable]
        else:
            both = list(blake2_and_sha256(file_pieces(real)))
            value = both[portable]
            remembered[str(real)], changed = with_digest({"seen": seen, "hashes": both}), True
        values.append(f"{path.name} {value}\n")
    if memo and changed:
        with writing(memo, "--reference-cache"):
            make_folder(memo)
        replace_file(memo / "files.json", json.dumps(remembered))
    return blake2(map(str.encode, values)).hex()


def _hashes(note: dict[str, Any], seen: list[Any]) -> list[str]:
    """Return the two hashes of a note of that file; none if the note is damaged or of another state of the file."""
    try:
        content = without_digest(note)
    except ValueError:
        return []
    return list(content["hashes"]) if note.keys() == {"seen", "hashes", "digest"} and content["seen"] == seen else []
