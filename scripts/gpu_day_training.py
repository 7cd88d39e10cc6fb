"""scripts/gpu_day.py: the optimiser, float16's loss scale, and going on from a checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
from gpu_day_models import Place, saved_adapter, scratch, worst
from gpu_day_record import Finding, at_most, same

from lite_dil.batching.batch import Batch
from lite_dil.objectives.criterion import Criterion
from lite_dil.training.step import micro_batches

RATE, STEPS = 1e-3, 5


def adamw_8bit(place: Place) -> list[Finding]:
    """Compare five steps of 8-bit AdamW with AdamW by the book in float64, and a card's paged one with the CPU's."""
    book, cpu = by_the_book(), by_bitsandbytes(place, "cpu")
    moved = np.linalg.norm(book - start())
    cost = float(np.linalg.norm(cpu - book) / moved)
    findings = [at_most("the CPU's, from AdamW by the book", cost, 0.02, "of the way gone: 0.0128 on a CPU of today")]
    if place.device == "cuda":
        far = float(np.linalg.norm(by_bitsandbytes(place, "cuda") - cpu) / moved)
        findings.append(at_most("the card's, paged, from the CPU's", far, cost / 4, "a quarter of what 8 bits cost"))
    return findings


def start() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.02, (64, 4096)).astype(np.float32)


def gradient(step: int) -> np.ndarray:
    """Return gradients whose sizes differ by column, as a model's do; a part of each is the same in every step."""
    draw, same_draw = np.random.default_rng(step), np.random.default_rng(99)
    sizes = 10.0 ** np.random.default_rng(1).uniform(-2, -1, 4096)
    return ((draw.normal(0, 1, (64, 4096)) + same_draw.normal(0, 1, (64, 4096))) * sizes).astype(np.float32)


def by_the_book() -> np.ndarray:
    """AdamW without weight decay (Loshchilov and Hutter, 2019), in float64."""
    weight = start().astype(np.float64)
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(1, STEPS + 1):
        g = gradient(step).astype(np.float64)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        weight -= RATE * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return weight


def by_bitsandbytes(place: Place, device: str) -> np.ndarray:
    """Take the steps with the optimiser that training with --4bit has on this device."""
    import torch

    from lite_dil.backends.torch.load import make_optimizer

    weight = torch.nn.Parameter(torch.from_numpy(start()).to(device))
    optimizer = make_optimizer([weight], place.config(optim="paged_adamw_8bit"), True, device)
    for step in range(1, STEPS + 1):
        optimizer.param_groups[0]["lr"] = RATE
        weight.grad = torch.from_numpy(gradient(step)).to(device)
        optimizer.step()
    return weight.detach().cpu().numpy()


def resumed(place: Place) -> list[Finding]:
    """Expect the steps after a checkpoint to be those that were taken without it, dropout and 8-bit state included."""
    options: dict[str, Any] = {"load_in_4bit": True, "dtype": place.dtype, "optim": "auto", "lora_dropout": 0.1, "lora_r": 32}
    return goes_on(place, options)


def goes_on(place: Place, options: dict[str, Any]) -> list[Finding]:
    whole = place.load(**options)
    for _ in range(2):
        place.step(whole, place.pairs(seed=2), RATE)
    with scratch() as folder:
        whole.save_state(folder)
        one = [place.step(whole, place.pairs(seed=3), RATE) for _ in range(2)]
        adapter = saved_adapter(whole)
        del whole
        again = place.load(**options)
        again.load_state(folder)
    two = [place.step(again, place.pairs(seed=3), RATE) for _ in range(2)]
    losses = [abs(a.loss - b.loss) for a, b in zip(one, two, strict=True)]
    far = worst(adapter, saved_adapter(again))
    return [same("losses of two steps after it", max(losses) == 0, max(losses)), same("adapters", far == 0, far)]


class Overflowing:
    """A loss whose gradients are beyond float16."""

    token_inputs: tuple[str, ...] = ()

    def __init__(self, criterion: Criterion) -> None:
        self.criterion, self.reads, self.reference = criterion, criterion.reads, criterion.reference

    def __call__(self, policy: Any, reference: Any, inputs: dict[str, Any]) -> Any:
        """Return the criterion's loss, 1e12 times as large."""
        return 1e12 * self.criterion(policy, reference, inputs)


def overflow(place: Place) -> list[Finding]:
    """Expect a step that overflows float16 to change nothing but the loss scale, and a checkpoint to go on after it."""
    options: dict[str, Any] = {"dtype": "float16", "layout": "packed", "gradient_checkpointing": "full"}
    backend = place.load(**options)
    examples = place.pairs(seed=2)
    taken = [place.step(backend, examples, RATE) for _ in range(12)]  # a first scale may be too large by itself
    before, scale = saved_adapter(backend), backend.adapters["policy"].scaler.get_scale()
    loss = Overflowing(Criterion(place.config(), examples))
    result = backend.step(micro_batches([Batch.of(examples)], loss.criterion), loss, RATE)
    halved = backend.adapters["policy"].scaler.get_scale()
    far = worst(before, saved_adapter(backend))
    findings = [
        Finding(
            "ordinary steps", f"{sum(not one.skipped for one in taken)} of 12 taken", "the last one", not taken[-1].skipped
        ),
        Finding("an overflow", "skipped" if result.skipped else "taken", "skipped", result.skipped),
        Finding("the loss scale after it", f"{halved:g}", f"{scale / 2:g}, half of before", 0 < halved == scale / 2),
        same("adapters before and after it", far == 0, far),
    ]
    with scratch() as folder:
        backend.save_state(folder)
        one, adapter = place.step(backend, examples, RATE), saved_adapter(backend)
        del backend
        again = place.load(**options)
        again.load_state(folder)
    found = again.adapters["policy"].scaler.get_scale()
    findings.append(Finding("the loss scale, resumed", f"{found:g}", f"{scale / 2:g}", found == scale / 2))
    two = place.step(again, examples, RATE)
    far = worst(adapter, saved_adapter(again))
    return [*findings, same("the step after it, resumed", one.loss == two.loss and far == 0, far)]
