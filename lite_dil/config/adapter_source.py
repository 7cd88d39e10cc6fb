"""Find an adapter by name, and how to load its model: by default as in the run that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lite_dil.backends import limits, registry
from lite_dil.base.errors import UserError
from lite_dil.config.options import build
from lite_dil.config.resume import run_options
from lite_dil.config.train_config import flag
from lite_dil.generation.policy import AdapterSource
from lite_dil.models.adapter_config import read_config
from lite_dil.models.find import folder_of, resolve_model
from lite_dil.models.fingerprint import base_of
from lite_dil.models.options import MODEL_FIELDS
from lite_dil.runs.folder import RunFolder, adapter_of, checkpoint_of, recorded_with, trained_options
from lite_dil.runs.options_file import OPTIONS_FILE
from lite_dil.runs.progress import read_progress
from lite_dil.training.options import ReferenceOptions
from lite_dil.training.reference_cache import cache_folder


def find(adapter: str | None, given: dict[str, Any], strength: float = 1.0) -> AdapterSource:
    """Return the adapter and model that the options name, reading only small files.

    Args:
        adapter: a run's folder, one of its checkpoints, or an adapter's folder; None for the bare model.
        given: options by field name, as text or values; only `MODEL_FIELDS` are used.

    Raises:
        UserError: there is no adapter, or nothing says which model it belongs to.
    """
    limits.check_strength(strength)
    given = {name: value for name, value in given.items() if name in MODEL_FIELDS}
    if adapter is None:
        if strength != 1:
            raise UserError(f"--strength {strength:g} needs an adapter; give --adapter too")
        return AdapterSource(None, None, build(given, {}))
    folder, run = _locate(Path(adapter))
    saved = _options(folder, run, given)
    base: dict[str, Any] = {}
    if "backend" not in given and "backend" in saved:
        base["backend"] = _usable(saved["backend"])
    same = given.get("backend", base.get("backend")) == saved.get("backend")
    # Another backend may have another 16-bit type, and no quantised head.
    always = ("model", "load_in_4bit", "chat_template_kwargs")
    names = [name for name in MODEL_FIELDS if name in saved and (same or name in always)]
    base |= {name: saved[name] for name in names if name != "backend"}
    if "model" not in base:
        base["model"] = given.get("model") or _own_model(folder)
    return AdapterSource(folder, run, build(given, base), strength)


def _options(adapter: Path, run: RunFolder | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the run that an adapter is of; none if no run and no seal has them.

    Raises UserError if the adapter is damaged, or if config.yaml has other options of the model than it was trained with.
    """
    recorded = recorded_with(adapter)
    recorded.pop("trust_remote_code", None)  # no file grants it
    if run is None:
        return recorded
    written = run_options(run.path / OPTIONS_FILE, recorded, str(adapter))
    for name in MODEL_FIELDS:
        if name in recorded and name not in given and name in written and written[name] != recorded[name]:
            if name == "model" and _same_base(run, written[name]):  # the model moved
                continue
            raise UserError(
                f"{run.path / OPTIONS_FILE}: {name} is {written[name]}, but the adapter was trained with {recorded[name]}; "
                f"restore the file, or give {flag(name)}"
            )
    return recorded | written


def _same_base(run: RunFolder, model: str) -> bool:
    """Return whether a run's newest checkpoint records the weights of `model`; it reads them all."""
    checkpoint = run.latest()
    noted = read_progress(checkpoint).base if checkpoint else {}
    if not noted:
        return False
    folder = folder_of(resolve_model(model))
    return bool(base_of(str(folder), cache_folder(ReferenceOptions()))["weights"] == noted["weights"])


def _locate(path: Path) -> tuple[Path, RunFolder | None]:
    """Return the adapter's folder, and the run that it lies in."""
    for folder in (path, path / "adapter", adapter_of(path)):
        if (folder / "adapter_config.json").is_file():
            return folder, _run_of(folder.absolute())
    run = RunFolder(path)
    if run.adapter.is_dir():
        raise UserError(
            f"--adapter {path}: {run.adapter / 'adapter_config.json'} is missing; restore it, give one of the run's "
            f"checkpoints, or remove {run.adapter} and --resume the run, which writes it again"
        )
    if latest := run.latest():  # the run is still going on, or was stopped
        return adapter_of(latest), run
    raise UserError(
        f"--adapter {path}: no adapter there; give a run's folder, one of its checkpoints, or a folder that holds "
        "adapter_config.json"
    )


def _run_of(adapter: Path) -> RunFolder | None:
    """Return the run that an adapter's folder belongs to; a config.yaml elsewhere above it is another program's."""
    checkpoint = checkpoint_of(adapter)
    above = checkpoint.parent.parent if checkpoint else adapter.parent
    if not checkpoint and adapter.name != "adapter":
        return None
    run = RunFolder(above)
    lost = run.metrics.exists() and bool(trained_options(adapter))  # the adapter has them too
    return run if (above / OPTIONS_FILE).is_file() or lost else None


def _usable(backend: str) -> str:
    """Return the run's own backend if this machine has it, else auto."""
    try:
        return registry.resolve(backend)
    except UserError:
        return "auto"


def _own_model(adapter: Path) -> str:
    """Return the model that an adapter's own config names."""
    if not (model := read_config(adapter).model):
        raise UserError(f"--adapter {adapter}: its adapter_config.json names no model; give --model")
    return model
