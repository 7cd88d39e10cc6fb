"""Training on the card: two steps, each with a reference pass; save; load into a new model; one more step."""

from __future__ import annotations

import gc
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rehearse_cuda.cases import Case
from rehearse_cuda.checkpoints import tiny, write_tokenizer
from rehearse_cuda.failed import require
from rehearse_cuda.stepping import RATE, Stepper, held, loaded, resolved

import lite_dil as dil
from lite_dil.backends.types import POLICY, Head
from lite_dil.cli.main import main
from lite_dil.config.train_config import ResolvedConfig

SECOND = "second"
LEFT = 4096  # bytes that may stay on the card: a generator's state, a constant


class HeadLoss:
    """The mean of a head's outputs: a loss that reads scores and no reference."""

    reads, reference, token_inputs = "scores", "nothing", ()

    def __call__(self, policy: Any, reference: Any, inputs: dict[str, Any]) -> Any:
        return policy.mean()


def run(case: Case, folder: Path) -> tuple[str, dict[str, Any]]:
    """Run one training; return what was seen."""
    options = dict(case.settings)
    model = tiny(folder / "model")
    if options.pop("command", False):
        return _command(model, folder)
    if options.pop("close", False):
        return _closed(model, folder)
    passes, head, initial = options.pop("passes", 1), options.pop("head", False), options.pop("init_adapter", False)
    if initial:
        options["init_adapter"] = str(_adapter(model, folder / "initial"))
    config = resolved(model, options)
    backend, stepper = _loaded(config, head), Stepper(config, passes)
    require(backend.layout == config.layout, f"{backend.layout} layout instead of {config.layout}: {backend.layout_reason}")
    _take(stepper, backend, head)
    before = held()
    work = stepper.counted(backend) if not head else None
    _take(stepper, backend, head)
    require(held() == before, f"{held()} bytes are held after another step, {before} before it")
    _save(backend, folder, head)
    del backend
    gc.collect()
    again = _loaded(config, head)
    again.load_state(folder / "state")
    _take(stepper, again, head)
    if work is None:
        return f"{_of(again)}; the policy's adapter and one with a head", {"held": before}
    after = stepper.counted(again)
    figures = {"work": work.counts, "held": before, "peak": torch.cuda.max_memory_allocated()}
    require(after == work, f"a step after loading did {after}; before saving {work}", figures)
    return f"{_of(again)}; {work.counts['launch'] + work.counts['product']} launches a step", figures


def _of(backend: Any) -> str:
    """Return the backend's description without the card's name."""
    return backend.description.partition("), ")[2]


def _loaded(config: ResolvedConfig, head: bool) -> Any:
    backend = loaded(config)
    if head:
        backend.add_adapter(SECOND, 4, 8.0, head=Head(1))
    if config.dtype == "float16":
        require(backend.adapters[POLICY].scaler.is_enabled(), "fp16 without a loss scale")
    return backend


def _take(stepper: Stepper, backend: Any, head: bool) -> None:
    """Take a step of the policy, and one of the second adapter if there is one."""
    result = stepper.step(backend)
    require(result.reference is not None and not result.skipped, "the step had no reference, or was skipped")
    if head:
        loss = HeadLoss()
        backend.step([one._replace(inputs={}) for one in stepper.passes], loss, RATE, SECOND)


def _save(backend: Any, folder: Path, head: bool) -> None:
    for name in ("state", "adapter"):
        (folder / name).mkdir(exist_ok=True)
    backend.save_state(folder / "state")
    backend.save_adapter(folder / "adapter", SECOND if head else POLICY)
    require((folder / "adapter" / "adapter_model.safetensors").exists(), "no adapter was written")


def _adapter(model: Path, folder: Path) -> Path:
    """Write an adapter to start from."""
    folder.mkdir(exist_ok=True)
    loaded(resolved(model, {"layout": "plain"})).save_adapter(folder)
    gc.collect()
    return folder


def _command(model: Path, folder: Path) -> tuple[str, dict[str, Any]]:
    """Train by the command on the embedded data with held-out figures, and resume from its first checkpoint."""
    write_tokenizer(model)
    out = folder / "out"
    flags = ["--model", str(model), "--backend", "cuda", "--max-rows", "8", "--max-steps", "3", "--save-steps", "1"]
    flags += ["--max-length", "256", "--report-samples", "0", "--reference-cache", str(folder / "cache"), "--4bit"]
    with redirect_stdout(StringIO()) as said:
        code = main(["train", *flags, "--output-dir", str(out)])
    print(said.getvalue())  # for the log
    require(code == 0, "the command failed")
    require("compiling FlexAttention" in said.getvalue(), "no word of the compilation that the start waits for")
    for step in (2, 3):
        shutil.rmtree(out / "checkpoints" / f"step-{step}")
    require(main(["train", "--resume", str(out / "checkpoints" / "step-1")]) == 0, "resuming from a checkpoint failed")
    require((out / "adapter" / "adapter_model.safetensors").exists(), "no adapter was written")
    return f"3 steps, 2 of them again from a checkpoint; {torch.cuda.get_device_name()}", {}


def _closed(model: Path, folder: Path) -> tuple[str, dict[str, Any]]:
    """Load, train and close in one process, twice, by the API; closing gives everything back."""
    write_tokenizer(model)
    pairs = [{"prompt": f"{number} + 1?", "chosen": f"{number + 1}.", "rejected": "I do not know."} for number in range(4)]
    before, found = held(), []
    for time in (1, 2):
        with dil.load(str(model), backend="cuda", bits=4, max_length=128) as policy:
            dil.train(
                policy, pairs, max_steps=2, report_samples=0, reference_cache="off", output_dir=str(folder / f"run-{time}")
            )
            used = torch.cuda.memory_allocated()
        torch._C._cuda_clearCublasWorkspaces()  # torch's own, for later products
        found.append(held())
    require(found[0] == found[1], f"{found[1]} bytes are held after the second training, {found[0]} after the first")
    left = found[0][0] - before[0]
    figures = {"trained": used, "left": left, "pinned": found[0][1] - before[1]}
    require(left <= LEFT < used, f"{left:,} bytes are left of {used:,}", figures)
    require(figures["pinned"] == 0, f"{figures['pinned']:,} bytes of pinned memory are left", figures)
    return f"{used:,} bytes in use after training, {left:,} after closing", figures
