"""The identity of a reference: hashes of weights and configs, remembered with each file's size and time."""

from __future__ import annotations

import json
from pathlib import Path

from lite_dil.base.disk import writing
from lite_dil.base.errors import UserError
from lite_dil.base.files import make_folder, replace_file
from lite_dil.base.hashing import blake2, file_pieces
from lite_dil.models.find import model_folder
from lite_dil.models.options import AdapterOptions

_VERSION = "1"


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


def fingerprint(folder: Path, memo: Path) -> str:
    """Return a hash of a model's or an adapter's weights and options.

    Reading 16 GB takes a while, so `memo` remembers a file's hash with its size and modification time; a file in the hub's
    cache is named by its hash.
    """
    notes = memo / "files.json"
    try:
        remembered = json.loads(notes.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        remembered = {}
    names = sorted({path for end in ("*.safetensors", "*.bin", "*.gguf", "*config.json") for path in folder.glob(end)})
    if not any(path.suffix != ".json" for path in names):
        raise UserError(
            f"{folder}: no weights there to identify the reference cache's entries by; --reference-cache off needs none"
        )
    values, changed = list[str](), False
    for path in names:
        real = path.resolve()
        stat = real.stat()
        seen = [stat.st_size, stat.st_mtime_ns]
        if len(real.name) == 64 and real.parent.name == "blobs":
            value = real.name
        elif (note := remembered.get(str(real))) and note[:2] == seen:
            value = note[2]
        else:
            value = blake2(file_pieces(real)).hex()
            remembered[str(real)], changed = [*seen, value], True
        values.append(f"{path.name} {value}\n")
    if changed:
        with writing(memo, "--reference-cache"):
            make_folder(memo)
        replace_file(notes, json.dumps(remembered))
    return blake2(map(str.encode, values)).hex()
