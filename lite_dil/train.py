"""The training loop: one for every backend and every objective."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from lite_dil import backends
from lite_dil.batch import Batch
from lite_dil.config import TrainConfig
from lite_dil.data import read_preferences
from lite_dil.errors import TrainingDiverged, UserError
from lite_dil.examples import Encoder, Example, encode_all, fingerprint
from lite_dil.metrics import pair_losses, pair_metrics
from lite_dil.models import load_tokenizer, resolve_model
from lite_dil.progress import Display
from lite_dil.reference import ReferenceCache, open_cache
from lite_dil.run import Progress, RunFolder, read_progress
from lite_dil.schedule import Schedule, plan, row_tokens

# Weights of a logged mean: these are sums over the window, everything else is a mean over its pairs.
_SUMS = ("pairs", "tokens", "seconds", "steps", "skipped", "reference_passes")

# float16's loss scale halves with each skipped step: after this many it is not the scale that is wrong.
MAX_SKIPPED = 25


@dataclass(frozen=True)
class Trained:
    """What a run leaves in memory: `stopped` says that Ctrl-C ended it early, after saving."""

    backend: backends.Backend
    encoder: Encoder
    folder: RunFolder
    evaluation: dict[str, float] | None
    stopped: bool


def train(config: TrainConfig, display: Display, resume: Path | None = None) -> Trained:
    """Train an adapter as `config` says, from the start or from the checkpoint `resume`.

    Raises:
        UserError: something that the user can mend, before anything was changed.
        TrainingDiverged: loss or gradient became non-finite; the checkpoints up to then are good.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("training runs in one process; start it without torchrun or accelerate launch")
    config = replace(config, backend=backends.resolve(config.backend))
    folder = RunFolder(resume.parent.parent) if resume else RunFolder.new(config)
    model = resolve_model(config.model, display.say)
    encoder = Encoder(load_tokenizer(model))
    examples = _load_examples(config.data, "train", encoder, config, display)
    held_out = _load_examples(config.eval_data, "test", encoder, config, display) if config.eval_data else []
    progress = Progress(fingerprint=fingerprint(examples))
    if resume:
        saved = read_progress(resume)
        if saved.fingerprint != progress.fingerprint:
            raise UserError(f"--resume {resume}: {config.data} is not the data that this run was trained on; start a new run")
        progress = saved
    backend = backends.load(config.backend, config, model)
    display.say(f"{config.model} on {backend.description}")
    if backend.layout_reason:
        display.say(backend.layout_reason)
    schedule = Schedule(config, examples, backend.layout)
    cache = open_cache(config, model, backend.identity)
    if cache.damaged:
        display.say(f"{cache.path}: {cache.damaged} damaged records, which will be computed again")
    if resume:
        backend.load_state(resume)
        folder.rewind(progress.step)
        finished = progress.step >= schedule.steps
        where = f"step {progress.step} of {schedule.steps} in {folder.path}"
        display.say(f"the run is finished: {where}" if finished else f"going on after {where}")
    else:
        _check_start(backend, schedule, config, cache)

    if config.precompute_reference and not precompute(backend, [*examples, *held_out], config, cache, display):
        display.say(f"stopped; the reference cache keeps what was computed: {cache.path}")
        return Trained(backend, encoder, folder, None, stopped=True)
    if not resume:
        folder.create(replace(config, dtype=backend.dtype_name))
        display.say(f"writing to {folder.path}")

    losses = pair_losses(config)
    evaluator = Evaluator(backend, held_out, config, cache)
    evaluation, skipped_in_a_row = None, 0

    def save() -> Path:
        def write(path: Path) -> None:
            backend.save_adapter(path / "adapter")
            backend.save_state(path)

        return folder.save_checkpoint(progress, write, config.save_total_limit)

    with StopSignal() as stop, display.bar(schedule.steps, progress.step) as bar:
        while progress.step < schedule.steps and not stop.asked:
            step, started = progress.step + 1, time.perf_counter()
            batches = schedule.batches(step)
            known = [cache.lookup(batch) for batch in batches]
            result = backend.step(batches, losses, rate := schedule.learning_rate(step), known)
            computed = _remember(cache, batches, known, result.reference)
            metrics = _step_metrics(result, batches, config)
            skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
            if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)) or skipped_in_a_row == MAX_SKIPPED:
                raise TrainingDiverged(_diverged(step, metrics, folder))
            tokens = sum(batch.tokens for batch in batches)
            progress.step, progress.num_tokens = step, progress.num_tokens + tokens
            pairs = sum(batch.pairs for batch in batches)
            seconds = time.perf_counter() - started
            _accumulate(progress.window, metrics, (pairs, tokens, seconds, 1, int(result.skipped), computed))
            last = step == schedule.steps
            if step % config.logging_steps == 0 or last:
                line = _line(progress, schedule, rate, backend)
                folder.log(line)
                bar.update(step, line)
                progress.window.clear()
            else:
                bar.update(step, None)
            if held_out and (last or (config.eval_steps and step % config.eval_steps == 0)):
                evaluation = evaluator.run()
                folder.log({"step": step, "epoch": schedule.epoch(step), **evaluation})
                bar.evaluation(evaluation)
            if last or (config.save_steps and step % config.save_steps == 0):
                save()

    if progress.step < schedule.steps:
        checkpoint = folder.latest()
        if checkpoint is None or read_progress(checkpoint).step < progress.step:
            save()
        display.say(f"stopped after step {progress.step} of {schedule.steps}, saved; go on with --resume {folder.path}")
        return Trained(backend, encoder, folder, evaluation, stopped=True)
    if held_out and evaluation is None:  # a finished run, resumed
        evaluation = evaluator.run()
    folder.save_adapter(backend.save_adapter)
    display.say(f"adapter in {folder.adapter}")
    return Trained(backend, encoder, folder, evaluation, stopped=False)


class Evaluator:
    """Evaluates the policy on held-out pairs; the reference's log-probs come from the cache once they are known."""

    def __init__(
        self, backend: backends.Backend, examples: Sequence[Example], config: TrainConfig, cache: ReferenceCache
    ) -> None:
        self.backend, self.config, self.cache = backend, config, cache
        self.batches = plan(examples, backend.layout, config.batch_size, row_tokens(config))

    def run(self) -> dict[str, float]:
        """Return the metrics with an ``eval_`` before their names."""
        reference = [_reference(self.backend, batch, self.cache) for batch in self.batches]
        policy = [self.backend.sequence_logps(batch) for batch in self.batches]
        arrays = _joined(policy, reference, self.batches)
        metrics = {"loss": float(pair_losses(self.config)(*arrays).mean()), **pair_metrics(*arrays, self.config)}
        return {f"eval_{name}": value for name, value in metrics.items()}


# Without gradients a pass keeps next to nothing, so that it can take more tokens than one of training.
PRECOMPUTE_ROWS = 4


def precompute(
    backend: backends.Backend, examples: Sequence[Example], config: TrainConfig, cache: ReferenceCache, display: Display
) -> bool:
    """Fill the cache with the reference's log-probs of all examples; return False where Ctrl-C ended it early."""
    missing = [example for example in examples if cache.lookup(Batch.of([example])) is None]
    batches = plan(missing, backend.layout, len(missing), PRECOMPUTE_ROWS * row_tokens(config))
    display.say(f"reference: {len(examples) - len(missing)} of {len(examples)} pairs are cached, {len(missing)} to compute")
    with StopSignal("stopping after this batch; what was computed is kept") as stop, display.bar(len(batches), 0) as bar:
        for number, batch in enumerate(batches, 1):
            if stop.asked:
                return False
            _reference(backend, batch, cache)
            bar.update(number, None)
    return True


def _reference(backend: backends.Backend, batch: Batch, cache: ReferenceCache) -> np.ndarray:
    """Return the reference's summed log-probs, (responses,), from the cache or computed and remembered."""
    known = cache.lookup(batch)
    if known is None:
        with backend.adapter_off():
            known = backend.sequence_logps(batch)
        cache.add(batch, known)
    return known


def _remember(
    cache: ReferenceCache, batches: Sequence[Batch], known: Sequence[np.ndarray | None], reference: np.ndarray
) -> int:
    """Add to the cache what a step computed on its way; return how many of its passes did."""
    starts = np.cumsum([0, *(len(batch.responses) for batch in batches)])
    computed = 0
    for batch, values, start in zip(batches, known, starts, strict=False):
        if values is None:
            cache.add(batch, reference[start : start + len(batch.responses)])
            computed += 1
    return computed


class StopSignal:
    """Turns the first Ctrl-C or termination signal into a request to stop after the step; a second Ctrl-C stops at once."""

    def __init__(self, text: str = "stopping after this step, and saving") -> None:
        self.asked, self.text = False, text

    def __enter__(self) -> StopSignal:
        self._before = {}
        for name in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[name] = signal.signal(name, self._ask)
            except ValueError:  # not in the main thread, where Python allows no handlers
                break
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{self.text}; Ctrl-C again stops at once\n".encode())


def _load_examples(source: str, split: str, encoder: Encoder, config: TrainConfig, display: Display) -> list[Example]:
    rows = read_preferences(source, split)
    examples, cut = encode_all(rows, encoder, config.max_length)
    text = f"{'training' if split == 'train' else 'held-out'} data {source}: {len(examples)} pairs"
    if not rows[0].chat:
        text += " of plain text (no chat template)"
    if cut.prompts or cut.responses:
        text += f"; --max-length {config.max_length} cut {cut.prompts} prompts and {cut.responses} answers"
    display.say(text)
    return examples


def _check_start(backend: backends.Backend, schedule: Schedule, config: TrainConfig, cache: ReferenceCache) -> None:
    """The log-ratio of a policy that is its own reference must be exactly 0, or every figure after it is wrong."""
    if config.init_adapter and config.reference == "base":
        return
    batch = schedule.batches(1)[0]
    with backend.adapter_off():
        reference = backend.sequence_logps(batch)
    cache.add(batch, reference)
    worst = float(np.abs(backend.sequence_logps(batch) - reference).max())
    if worst != 0:
        raise UserError(
            f"{config.model}: with the adapter on, the untrained model differs from its reference by {worst:.3g} nats, where "
            "it must be exactly 0; the model's forward pass is not deterministic, or its adapter cannot be switched off"
        )


def _joined(
    policy: Sequence[np.ndarray], reference: Sequence[np.ndarray], batches: Sequence[Batch]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Join batches into the five arrays that `pair_losses` and `pair_metrics` take."""
    starts = np.cumsum([0, *(len(batch.responses) for batch in batches)])
    return (
        np.concatenate(policy),
        np.concatenate(reference),
        np.concatenate([batch.lengths for batch in batches]),
        np.concatenate([batch.chosen + start for batch, start in zip(batches, starts, strict=False)]),
        np.concatenate([batch.rejected + start for batch, start in zip(batches, starts, strict=False)]),
    )


def _step_metrics(result: backends.StepResult, batches: Sequence[Batch], config: TrainConfig) -> dict[str, float]:
    arrays = _joined([result.policy], [result.reference], batches)
    return {"loss": result.loss, "grad_norm": result.grad_norm, **pair_metrics(*arrays, config)}


def _accumulate(window: dict[str, float], metrics: dict[str, float], sums: tuple[float, ...]) -> None:
    """Add a step to the window: its means weighted by its pairs, and the `_SUMS`."""
    for name, value in {**{n: mean * sums[0] for n, mean in metrics.items()}, **dict(zip(_SUMS, sums, strict=True))}.items():
        window[name] = window.get(name, 0) + value


def _line(progress: Progress, schedule: Schedule, rate: float, backend: backends.Backend) -> dict[str, Any]:
    window = progress.window
    return {
        "step": progress.step,
        "epoch": schedule.epoch(progress.step),
        **{name: value / window["pairs"] for name, value in window.items() if name not in _SUMS},
        "learning_rate": rate,
        "num_tokens": progress.num_tokens,
        "tokens_per_second": window["tokens"] / window["seconds"],
        "pairs_per_second": window["pairs"] / window["seconds"],
        "seconds_per_step": window["seconds"] / window["steps"],
        "peak_memory_mb": backend.peak_memory_mb(),
        "skipped_steps": window["skipped"],
        "reference_passes": window["reference_passes"],
    }


def _diverged(step: int, metrics: dict[str, float], folder: RunFolder) -> str:
    checkpoint = folder.latest()
    return (
        f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, log-ratio "
        f"{metrics['log_ratio/chosen']:.3g} chosen, {metrics['log_ratio/rejected']:.3g} rejected. The weights were left as "
        f"they were. A lower --learning-rate helps, and --logp-reduction mean; "
        + (f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been saved (--save-steps)")
    )
