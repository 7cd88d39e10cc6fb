"""The training loop: one for every backend and every objective."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.backends import registry
from lite_dil.backends.protocol import Backend
from lite_dil.backends.types import StepResult, never
from lite_dil.base.errors import OutOfMemory, TrainingDiverged, UserError
from lite_dil.base.memory import peak_rss_mb
from lite_dil.base.signals import StopSignal
from lite_dil.base.signs import CHOSEN
from lite_dil.batching.batch import Batch, by_batch
from lite_dil.batching.schedule import PRECOMPUTE_ROWS, Schedule, plan, row_tokens
from lite_dil.cli.progress import Bar, Display
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.data.dataset import DataSet, describe, load, remarks
from lite_dil.data.encoder import Encoder, Example, fingerprint
from lite_dil.data.mismatched import mismatched
from lite_dil.data.overlap import overlap
from lite_dil.data.reader import Problem
from lite_dil.generation.policy import AdapterSource
from lite_dil.generation.reference_samples import add_samples, needed, reference_digest, sample_path
from lite_dil.models.find import load_tokenizer, resolve_model
from lite_dil.models.fingerprint import reference_key
from lite_dil.objectives.accepts import check_data
from lite_dil.objectives.criterion import Criterion
from lite_dil.objectives.loss import TOKENS
from lite_dil.objectives.losses import log_ratio
from lite_dil.objectives.table import OBJECTIVES
from lite_dil.planning.auto import fitted
from lite_dil.planning.fit import Heaviest, memory_line
from lite_dil.reports import trackers
from lite_dil.reports.card import write_card
from lite_dil.reports.findings import SAMPLES
from lite_dil.reports.run_report import REPORT, Watcher, facts_of
from lite_dil.reports.samples import Intake, Prompt, Samples
from lite_dil.runs.folder import Progress, RunFolder, read_progress
from lite_dil.training.metrics import Means, answer_metrics, with_margin
from lite_dil.training.passes import Passes, Taken, take_step
from lite_dil.training.reference import cache_folder, open_cache

# What the window counts; everything else in it is a mean.
_SUMS = ("examples", "tokens", "seconds", "steps", "skipped", "reference_passes")

# It may take minutes on a large model: kernels are compiled.
FIRST = "the first step takes longest"

# float16's loss scale halves with each skipped step: after this many it is not the scale that is wrong.
MAX_SKIPPED = 25


@dataclass(frozen=True)
class Trained:
    """What a run leaves in memory: `stopped` says that Ctrl-C ended it early, after saving."""

    backend: Backend
    encoder: Encoder
    folder: RunFolder
    stopped: bool


def train(config: ResolvedConfig, display: Display, resume: Path | None = None, fixed: Set[str] | None = None) -> Trained:
    """Train an adapter as `config` says, from the start or from the checkpoint `resume`.

    `fixed` are the options that --auto leaves alone; None stands for all that are not at their default.

    Raises:
        UserError: something that the user can mend, before anything was changed.
        TrainingDiverged: loss or gradient became non-finite; the checkpoints up to then are good.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("training runs in one process; start it without torchrun or accelerate launch")
    trackers.check(config)
    config = replace(config, backend=registry.resolve(config.backend))
    folder = RunFolder(resume.parent.parent) if resume else RunFolder.new(config.output_dir, config.loss)
    model = resolve_model(config.model, display.say)
    encoder = Encoder(load_tokenizer(model))
    data = _read(encoder, config, display)
    examples, held_out = data.examples, data.held_out
    progress = _progress(examples, config, resume)
    if config.auto:
        config, chosen = fitted(config, examples, fixed)
        display.say(chosen)
    registry.import_library(config.backend)
    before = peak_rss_mb()
    backend = registry.load(config.backend, config, model, config, config)
    display.say(f"{config.model} on {backend.description}")
    if backend.layout_reason:
        display.say(backend.layout_reason)
    if config.sample_rejected:
        drawn = _draw_rejected(examples, held_out, config.sample_rejected, backend, encoder, model, config, display)
        if drawn is None:
            return Trained(backend, encoder, folder, stopped=True)
        examples, held_out = drawn
    others = mismatched(examples, config.loss, config.max_length) if OBJECTIVES[config.loss].baseline else []
    schedule = Schedule(config, examples, backend.layout, others)
    cache = open_cache(config, config, model, backend.identity)
    if cache.damaged:
        display.say(f"{cache.path}: {cache.damaged} damaged records, which will be computed again")
    passes = Passes(backend, config.logp_reduction, cache, display.say)
    logged: list[dict[str, Any]] = []
    if resume:
        backend.load_state(resume)
        logged = folder.rewind(progress.step)
        finished = progress.step >= schedule.steps
        where = f"step {progress.step} of {schedule.steps} in {folder.path}"
        display.say(f"the run is finished: {where}" if finished else f"going on after {where}")
    else:
        _check_start(passes, schedule, config, display)

    if config.precompute_reference and not precompute(passes, (examples, others, held_out), config, display):
        display.say(f"stopped; the reference cache keeps what was computed: {cache.path}")
        return Trained(backend, encoder, folder, stopped=True)
    if not resume:
        folder.create(replace(config, dtype=backend.dtype_name).as_dict())
        for name in (trackers.IDS, SAMPLES):  # of a run that was killed before it saved, perhaps of another model
            (folder.path / name).unlink(missing_ok=True)
        if data.skipped:
            folder.list_skipped(data.skipped)
        display.say(f"writing to {folder.path}")

    criterion = Criterion(config, examples)
    evaluator = Evaluator(passes, held_out, config)
    skipped_in_a_row = 0
    heaviest = Heaviest(backend.layout)
    samples = Samples(data.prompts, bool(held_out), folder.path / SAMPLES, backend, encoder, config, display.say)
    watcher = Watcher(folder, config, facts_of(config, backend, schedule.steps, data.facts), samples, logged, display.say)

    def save() -> Path:
        def write(path: Path) -> None:
            backend.save_adapter(path / "adapter")
            backend.save_state(path)

        return folder.save_checkpoint(progress, write, config.save_total_limit)

    @contextmanager  # so that the loop needs no try around it
    def kept_where_memory_ends() -> Iterator[None]:
        try:
            yield
        except OutOfMemory as error:
            if not progress.step:
                raise
            saved = f"Step {progress.step} is saved: {save()}; --resume {folder.path} goes on from it"
            raise UserError(f"{error}. {saved}") from None

    def memory() -> str:
        taken = replace(config, dtype=backend.dtype_name, layout=backend.layout)
        peak = backend.peak_memory_mb() * 2**20
        return memory_line(taken, model, heaviest.load, peak, before * 2**20) if heaviest.load else ""

    def due(step: int) -> bool:
        return bool(held_out) and (step == schedule.steps or _every(config.eval_steps, step))

    left_out = False  # of the evaluation and the sample answers, because of Ctrl-C

    def evaluate(step: int, stop: StopSignal, bar: Bar) -> None:
        nonlocal left_out
        with bar.doing("" if stop.asked else "evaluating", last=step == schedule.steps):
            found = evaluator.run(lambda: stop.asked)
        if found:
            watcher.log({"step": step, "epoch": schedule.epoch(step), **found})
            bar.evaluation(found)
        left_out = left_out or not found

    def look(step: int, stop: StopSignal, bar: Bar) -> None:
        nonlocal left_out
        answers = samples.prompts and not stop.asked
        with bar.doing("answering the sample prompts of the report" if answers else "", last=step == schedule.steps):
            watcher.look(step, lambda: stop.asked)
        left_out = left_out or (stop.asked and bool(samples.prompts))

    with folder.going_on(), watcher:
        with kept_where_memory_ends(), StopSignal() as stop, display.bar(schedule.steps, progress.step, FIRST) as bar:
            if resume:  # what the run was stopped, or killed, before
                if progress.step == schedule.steps:
                    folder.save_adapter(backend.save_adapter)
                if due(progress.step) and not any(line["step"] == progress.step and "eval_loss" in line for line in logged):
                    evaluate(progress.step, stop, bar)
                if progress.step == schedule.steps:
                    look(progress.step, stop, bar)
            while progress.step < schedule.steps and not stop.asked:
                step, started = progress.step + 1, time.perf_counter()
                taken = take_step(passes, schedule, step, criterion, display.say, bool(config.lora_dropout))
                heaviest.add(taken.batches)
                skipped_in_a_row = skipped_in_a_row + 1 if taken.result.skipped else 0
                if not _is_finite(taken.result) or skipped_in_a_row == MAX_SKIPPED:
                    # The weights are still those of the step before, which had a finite loss.
                    kept = save() if progress.step else folder.latest()
                    raise TrainingDiverged(_diverged(step, taken, examples, config, kept))
                _count_step(progress, taken, time.perf_counter() - started, config)
                last = step == schedule.steps
                line = None
                if step % config.logging_steps == 0 or last:
                    line = _line(progress, schedule, backend)
                    watcher.log(line)
                    progress.window.clear()
                bar.update(step, line)
                # Saved first: what follows may take long, and a resumed run makes up for it.
                if saves := last or _every(config.save_steps, step):
                    save()
                if last:
                    folder.save_adapter(backend.save_adapter)
                if due(step):
                    evaluate(step, stop, bar)
                if due(step) or (saves and not held_out):
                    look(step, stop, bar)

            if progress.step < schedule.steps:
                checkpoint = folder.latest()
                if checkpoint is None or read_progress(checkpoint).step < progress.step:
                    save()
                watcher.finish(stopped=True, memory=memory())
                again = f"saved; go on with --resume {folder.path}"
                display.say(f"stopped after step {progress.step} of {schedule.steps}, {again}")
                return Trained(backend, encoder, folder, stopped=True)
        source = AdapterSource(folder.adapter, folder, config)
        write_card(folder.adapter, source, "adapter", None, "")  # fit to be uploaded as it is
        if text := memory():
            display.say(text)
        watcher.finish(stopped=False, memory=text)
    display.say(f"adapter in {folder.adapter}, report in {folder.path / REPORT}")
    if left_out:
        display.say(f"the training is finished; what was left out of its evaluation and report: --resume {folder.path}")
    return Trained(backend, encoder, folder, stopped=left_out)


def _progress(examples: Sequence[Example], config: ResolvedConfig, resume: Path | None) -> Progress:
    """Return where the run stands: at its start, or where the checkpoint `resume` was saved, if that is of the same data."""
    digest = fingerprint(examples)
    if resume is None:
        return Progress(fingerprint=digest)
    saved = read_progress(resume)
    if saved.fingerprint != digest:
        raise UserError(f"--resume {resume}: {config.data} is not the data that this run was trained on; start a new run")
    return saved


def _draw_rejected(
    examples: Sequence[Example],
    held_out: Sequence[Example],
    count: int,
    backend: Backend,
    encoder: Encoder,
    model: str,
    config: ResolvedConfig,
    display: Display,
) -> tuple[Sequence[Example], Sequence[Example]] | None:
    """Return the examples that the run comes to, and the held-out ones, with rejected answers; None where Ctrl-C ended it."""
    key = reference_key(config, cache_folder(config), model, backend.identity)
    reference, used = reference_digest(key), needed(config, examples)
    path = sample_path(config, reference)
    drawn = add_samples([*used, *held_out], count, backend, encoder, path, reference, config, display)
    if drawn is None:
        display.say(f"stopped; the same command goes on with what was drawn: {path}")
        return None
    return drawn[: len(used)], drawn[len(used) :]


def _every(steps: int | None, step: int) -> bool:
    return bool(steps) and step % (steps or 1) == 0


def _is_finite(result: StepResult) -> bool:
    return math.isfinite(result.loss) and math.isfinite(result.grad_norm)


class Evaluator:
    """Evaluates the policy on held-out data; the reference's log-probs come from the cache once they are known."""

    def __init__(self, passes: Passes, examples: Sequence[Example], config: ResolvedConfig) -> None:
        self.passes, self.config = passes, config
        self.criterion = Criterion(config, examples)
        others = mismatched(examples, config.loss, config.max_length) if examples and OBJECTIVES[config.loss].baseline else []
        self.batches, self.others = (
            plan(part, passes.backend.layout, config.batch_size, row_tokens(config)) for part in (examples, others)
        )

    def run(self, stop: Callable[[], bool] = never) -> dict[str, float]:
        """Return the metrics with an ``eval_`` before their names; none where `stop`, asked between passes, ended it."""
        means = Means()
        baseline = self.passes.baseline(self.others, stop)
        for batch in self.batches:
            if stop():
                return {}
            reference = self.passes.reference(batch)
            tokens = self.criterion.reads == TOKENS
            policy = self.passes.token_logps(batch) if tokens else self.passes.sequence_logps(batch)
            with np.errstate(over="ignore"):  # an overflow shows as a loss that is not finite
                loss = float(self.criterion(policy, reference, self.criterion.inputs(batch, baseline)))
            means.add("loss", loss / batch.examples, batch.examples)
            answer_metrics(means, batch.sums(policy) if tokens else policy, reference, batch, self.config)
        if self.others:
            means.add("kl", baseline)
        return {f"eval_{name}": value for name, value in with_margin(means.means()).items()}


PRECOMPUTE_EXAMPLES = 8192  # that are in memory at once; the longest of them go together


def precompute(passes: Passes, parts: Sequence[Sequence[Example]], config: ResolvedConfig, display: Display) -> bool:
    """Fill the cache with the reference's log-probs of all examples; return False where Ctrl-C ended it early."""

    def missing() -> Iterator[Example]:
        return (e for e in itertools.chain(*parts) if passes.cache.lookup(Batch.of([e])) is None)

    total, count = sum(map(len, parts)), sum(1 for _ in missing())
    display.say(f"reference: {total - count} of {total} pairs are cached, {count} to compute")
    left, done = missing(), 0
    with StopSignal("stopping after this batch; what was computed is kept") as stop, display.bar(count, 0) as bar:
        while some := list(itertools.islice(left, PRECOMPUTE_EXAMPLES)):
            for batch in plan(some, passes.backend.layout, len(some), PRECOMPUTE_ROWS * row_tokens(config)):
                if stop.asked:
                    return False
                passes.reference(batch)
                bar.update(done := done + batch.examples, None)
    return True


@dataclass(frozen=True)
class _Data:
    """What was read: examples, the rows that were left out, and for the report the prompts to answer and what the data is."""

    examples: Sequence[Example]
    held_out: Sequence[Example]
    skipped: list[Problem]
    prompts: list[Prompt]
    facts: list[dict[str, Any]]


def _read(encoder: Encoder, config: ResolvedConfig, display: Display) -> _Data:
    """Read the training data, and the held-out data where there is any."""
    data, intake = _load(config.data, "train", encoder, config, display)
    facts = [intake.facts("training", config.data, data)]
    if not config.eval_data:
        return _Data(data.examples, [], data.problems, intake.prompts, facts)
    held_out, seen = _load(config.eval_data, "test", encoder, config, display)
    shared = overlap(data, held_out)
    if shared.warning:
        display.say(f"warning: {shared.warning}")
    facts.append(seen.facts("held out", config.eval_data, held_out) | {"in_training": shared._asdict()})
    return _Data(data.examples, held_out.examples, data.problems + held_out.problems, seen.prompts, facts)


def _load(source: str, split: str, encoder: Encoder, config: ResolvedConfig, display: Display) -> tuple[DataSet, Intake]:
    """Read a data set and say what it is."""
    intake = Intake(config.report_samples, config)
    data = load(source, split, encoder, config, watch=intake.add, good_only=OBJECTIVES[config.loss].data == "chosen")
    check_data(config.loss, data.form, set(data.answers), source, config.sample_rejected is not None)
    number, good = len(data.examples), data.answers[CHOSEN]
    kinds = {
        "pairs": "pairs",
        "demonstrations": "demonstrations",
        "unpaired": f"answers, {good} good and {data.answers[-CHOSEN]} bad",
    }
    if data.form == "unpaired" and OBJECTIVES[config.loss].data == "chosen":
        kinds["unpaired"] = f"good answers, and {data.answers[-CHOSEN]} bad ones that {config.loss} leaves out"
    text = f"{'training' if split == 'train' else 'held-out'} data {source}: {number} {kinds[data.form]}, {describe(data)}"
    if data.prompts_cut or data.responses_cut:
        text += f"; --max-length {config.max_length} cut {data.prompts_cut} prompts and the answers of {data.responses_cut}"
    display.say(text)
    for line in remarks(data):
        display.say(line)
    return data, intake


def _check_start(passes: Passes, schedule: Schedule, config: ResolvedConfig, display: Display) -> None:
    """The log-ratio of a policy that is its own reference must be exactly 0, or every figure after it is wrong."""
    if config.init_adapter and config.reference == "base":
        return
    backend, batch = passes.backend, schedule.batches(1)[0]

    def both(batch: Batch) -> np.ndarray:  # of the same pass: one that was split may differ in its last bits
        with backend.adapter_off():
            reference = backend.sequence_logps(batch)
        return np.stack([reference, backend.sequence_logps(batch)], -1)

    with display.status("checking that the untrained model is its own reference"):
        reference, policy = passes.run(both, batch).T
    passes.remember(batch, reference)
    worst = float(np.abs(policy - reference).max())
    if worst != 0:
        raise UserError(
            f"{config.model}: with the adapter on, the untrained model differs from its reference by {worst:.3g} nats, where "
            "it must be exactly 0; the model's forward pass is not deterministic, or its adapter cannot be switched off"
        )


def _count_step(progress: Progress, taken: Taken, seconds: float, config: ResolvedConfig) -> None:
    """Add a step to the run's progress and to the window of its next line."""
    batches, result = taken.batches, taken.result
    number, tokens = sum(batch.examples for batch in batches), sum(batch.tokens for batch in batches)
    progress.step, progress.num_tokens = progress.step + 1, progress.num_tokens + tokens
    means = Means(progress.window)
    means.add("loss", result.loss, number)
    means.add("grad_norm", result.grad_norm, number)
    parts = (by_batch(values, batches) for values in (taken.policy, taken.reference))
    for batch, policy, reference in zip(batches, *parts, strict=True):
        answer_metrics(means, policy, reference, batch, config)
    if OBJECTIVES[config.loss].baseline:
        means.add("kl", taken.baseline, number)
    for name, value in zip(_SUMS, (number, tokens, seconds, 1, int(result.skipped), taken.reference_passes), strict=True):
        means.add(name, value)


def _line(progress: Progress, schedule: Schedule, backend: Backend) -> dict[str, Any]:
    window = Means(progress.window)
    figures = {name: value for name, value in window.means().items() if name not in _SUMS}
    examples, tokens, seconds, steps, skipped, passes = map(window.total, _SUMS)
    return {
        "step": progress.step,
        "epoch": schedule.epoch(progress.step),
        **with_margin(figures),
        "learning_rate": schedule.learning_rate(progress.step),
        "num_tokens": progress.num_tokens,
        "tokens_per_second": tokens / seconds,
        "examples_per_second": examples / seconds,
        "seconds_per_step": seconds / steps,
        "peak_memory_mb": backend.peak_memory_mb(),
        "skipped_steps": skipped,
        "reference_passes": passes,
    }


def _diverged(step: int, taken: Taken, examples: Sequence[Example], config: ResolvedConfig, kept: Path | None) -> str:
    """Say where it went wrong: at the example whose log-ratio is not finite, or else the farthest from 0."""
    worst, batches, result = (-1.0, "", ""), taken.batches, taken.result
    reduction = config.logp_reduction
    parts = (by_batch(values, batches) for values in (taken.policy, taken.reference))
    for batch, policy, reference in zip(batches, *parts, strict=True):
        f = log_ratio(policy, reference, batch.lengths, reduction)
        for number, place in enumerate(batch.places):
            here = batch.prompt_of == number
            size = float(np.abs(f[here]).max()) if np.isfinite(f[here]).all() else math.inf
            if size > worst[0]:
                sides = {CHOSEN: "chosen", -CHOSEN: "rejected"}
                ratios = ", ".join(
                    f"{value:.3g} {sides[sign]}" for value, sign in zip(f[here], batch.signs[here], strict=True)
                )
                worst = (size, place, ratios)
    index = next(i for i, example in enumerate(examples) if example.place == worst[1])
    advice = ["a lower --learning-rate"]
    if reduction == "sum" and OBJECTIVES[config.loss].reduction == "mean":
        advice.append("--logp-reduction mean")
    if "log_ratio_cap" in OBJECTIVES[config.loss].options and config.log_ratio_cap is None:
        advice.append("--log-ratio-cap 3, or --loss rulsif, which is bounded")
    return (
        f"step {step}: loss {result.loss:g}, gradient norm {result.grad_norm:g}. Farthest off is example {index + 1} of the "
        f"data ({worst[1]}), with log-ratio {worst[2]} ({reduction} over its tokens, in nats). The weights were left as they "
        f"were before the step. What helps: {'; '.join(advice)}. "
        + (f"The last good checkpoint is {kept}" if kept else "No checkpoint had been saved: this was the first step")
    )
