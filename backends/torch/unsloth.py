"""``--unsloth``: load the torch backend's model through unsloth, with its kernels; losses and log-probs stay ours.

unsloth (parts of it AGPL) is used as a library and imported only on request: it rewrites TRL, and patches transformers and
PEFT, so it must be imported before them. Nothing here imports them at the top.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from lite_dil.backends.options import EngineOptions
from lite_dil.base.errors import UserError, first_line, gather
from lite_dil.base.install import install
from lite_dil.models.find import cache_dir
from lite_dil.models.options import ModelOptions

PACKAGES = ("unsloth", "unsloth_zoo")
# What it patches or computes with: other versions of these break it. It also requires versions of much else.
PATCHED = ("accelerate", "bitsandbytes", "datasets", "peft", "torch", "transformers", "triton", "trl", "unsloth_zoo")
# The architectures with unsloth's own forward pass, each tested against the plain path. It would compile others.
KERNELS = ("gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3")


class UnslothFailed(Exception):
    """unsloth raised an error, from its own code or what it calls: its many patches fail with errors of every kind."""


def check(options: ModelOptions, training: EngineOptions, backend: str) -> None:
    """Raise UserError if ``--unsloth`` does not work with the backend or another option."""
    problems = []
    if backend != "cuda":
        problems.append(f"--unsloth is for the cuda backend; this run is on {backend}, leave it out")
    if training.gradient_checkpointing == "selective":
        problems.append("--unsloth has its own gradient checkpointing, full or off, not selective")
    if options.head_bits:
        problems.append("--unsloth keeps the output head in 16 bits; leave out --head-bits")
    if training.offload_activations:
        problems.append("--unsloth offloads activations by itself with full checkpointing; leave out --offload-activations")
    if training.offload_embeddings:
        problems.append("--unsloth does not go with --offload-embeddings")
    if problems:
        raise UserError(gather(problems, "these options cannot be used:") if len(problems) > 1 else problems[0])


def require() -> Any:
    """Import unsloth and return it.

    Raises:
        UserError: it is not installed, other libraries' versions are not those it allows, transformers was imported
            first, or it fails on this machine.
    """
    if "unsloth" in sys.modules:
        return sys.modules["unsloth"]
    if absent := [name for name in PACKAGES if _version(name) is None]:
        raise UserError(f"--unsloth: {' and '.join(absent)} not installed: {install('unsloth')}")
    if mismatches := _mismatches():
        raise UserError(gather(mismatches, f"--unsloth: these versions do not work together: {install('unsloth')}", shown=20))
    if early := [name for name in ("transformers", "peft", "trl") if name in sys.modules]:
        raise UserError(
            f"--unsloth: {' and '.join(early)} already imported, and unsloth patches what is imported after it: "
            "import unsloth first (lite-dil train does)"
        )
    # It writes compiled modules, by default into the current folder, and counts its users by a download.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir() / "unsloth_compiled"))
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    try:
        with _boundary():
            return importlib.import_module("unsloth")
    except UnslothFailed as error:
        raise UserError(f"--unsloth: unsloth cannot be imported ({first_line(error)})") from None


def load(model: str, dtype: Any, device: Any, in_4bit: bool, max_length: int) -> Any:
    """Load a frozen model with unsloth's forward pass; its decoder returns the hidden states after the last norm.

    Args:
        dtype: a torch.dtype.
        device: a torch.device.
        max_length: longest row, in tokens; unsloth truncates longer ones.
    """
    unsloth = require()
    from lite_dil.backends.torch.out_of_memory import ran_out

    check_model(model, max_length)
    try:
        with _boundary():
            base, _ = unsloth.FastLanguageModel.from_pretrained(
                model,
                max_seq_length=max_length,
                dtype=dtype,
                load_in_4bit=in_4bit,
                device_map={"": device},
                use_exact_model_name=True,  # else it uses its own repository of the same name with other weights
                fix_tokenizer=False,
                use_gradient_checkpointing=False,
            )
    except UnslothFailed as error:
        if error.__cause__ is not None and ran_out(error.__cause__):
            raise error.__cause__ from None
        raise UserError(f"--model {model}: cannot be loaded through unsloth ({first_line(error)})") from None
    if base.dtype != dtype or (in_4bit and not getattr(base, "is_loaded_in_4bit", False)):
        asked = f"{dtype}{', 4-bit' if in_4bit else ''}".removeprefix("torch.")
        raise UserError(f"--unsloth: unsloth did not load {model} as {asked} here; give another --dtype, or leave it out")
    base.requires_grad_(False)
    return base


def adapt(base: Any, rank: int, alpha: float, targets: list[str], dropout: float, checkpointing: str, seed: int) -> Any:
    """Add a LoRA adapter named "default" to the base and return the PEFT model; the caller sets its initial weights.

    Args:
        checkpointing: "off", or "full", which is unsloth's own, with activations kept in the computer's memory.
    """
    with _quietly():
        return require().FastLanguageModel.get_peft_model(
            base,
            r=rank,
            lora_alpha=alpha,
            target_modules=targets,
            lora_dropout=dropout,
            bias="none",
            use_gradient_checkpointing="unsloth" if checkpointing == "full" else False,
            random_state=seed,
        )


@contextlib.contextmanager
def generating(model: Any, longest: int) -> Iterator[None]:
    """Use unsloth's forward pass for generation in the block, and the one for training after it.

    Args:
        longest: tokens of the longest prompt.
    """
    if longest > model.max_seq_length:
        raise UserError(f"--unsloth: a prompt has {longest} tokens, more than --max-length {model.max_seq_length}")
    fast = require().FastLanguageModel
    fast.for_inference(model)
    try:
        yield
    finally:
        fast.for_training(model)


def check_model(model: str, max_length: int) -> None:
    """Refuse models that unsloth would compute differently from transformers."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--model {model}: cannot be loaded ({first_line(error)})") from None
    if config.model_type not in KERNELS:
        raise UserError(f"--unsloth has kernels for {', '.join(KERNELS)}, not for {config.model_type}: {model}; leave it out")
    longest = config.max_position_embeddings
    if max_length > longest:  # it would stretch the rotary positions
        raise UserError(f"--max-length {max_length}: with --unsloth at most the model's own maximum, {longest}")
    window = getattr(config, "sliding_window", None)
    # unsloth ignores the window of a decoder that is called without its head.
    if window and getattr(config, "use_sliding_window", True) and window < max_length:
        raise UserError(
            f"--unsloth: {model} has a window of {window} tokens; give --max-length {window} or less, or leave out --unsloth"
        )
    if getattr(config, "quantization_config", None) is None:  # packed weights cannot be put on the device "meta"
        _check_weights(model)


def _check_weights(model: str) -> None:
    """Raise UserError if the model's files lack a weight: unsloth would silently use random numbers.

    On the device "meta", only names are read.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, output_loading_info=True, device_map="meta", trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model {model}: cannot be loaded ({first_line(error)})") from None
    report = loaded[1]
    if absent := sorted(report["missing_keys"]) or sorted(map(str, report["mismatched_keys"])):
        raise UserError(f"--model {model}: its files lack {len(absent)} of the model's weights, the first is {absent[0]}")


def _mismatches() -> list[str]:
    """Return a line for each library that unsloth patches and whose version it does not allow."""
    from packaging.requirements import Requirement

    problems: dict[str, None] = {}
    for package in PACKAGES:
        for text in metadata.requires(package) or ():
            requirement = Requirement(text)
            installed = _version(requirement.name)
            here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if installed is None or not here or requirement.name.replace("-", "_") not in PATCHED:
                continue
            broken = [str(part) for part in requirement.specifier if not part.contains(installed, prereleases=True)]
            if broken:
                wanted = ",".join(sorted(broken))
                problems[f"{requirement.name} {installed}, but {package} {_version(package)} needs {wanted}"] = None
    return list(problems)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def _boundary() -> Iterator[None]:
    """Raise UnslothFailed for errors from the library in the block; a mistake in the call itself is raised as it is."""
    try:
        with _quietly():
            yield
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == __file__:
            raise
        raise UnslothFailed(first_line(error)) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep unsloth's banners and warnings off the terminal; errors are raised as exceptions."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
