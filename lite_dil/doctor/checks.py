"""Checks that a backend computes the right numbers here: a tiny model, computed in all ways with the same weights."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lite_dil.backends import registry
from lite_dil.backends.probes import tolerance
from lite_dil.backends.protocol import Backend
from lite_dil.backends.types import StepResult
from lite_dil.base.files import make_folder
from lite_dil.base.signs import CHOSEN, REJECTED
from lite_dil.batching.batch import Batch
from lite_dil.config.train_config import ResolvedConfig, TrainConfig
from lite_dil.data.encoder import Example
from lite_dil.doctor import tiny_model
from lite_dil.objectives.criterion import Criterion
from lite_dil.training.step import micro_batches

NEAR = 2.0  # two ways of rounding to 16 bits differ from float32 equally, up to chance
RELATIVE = 1e-3  # of gradients in float32
RATE, STEPS, _TRIES = 1e-2, 3, 20
_TOKENS = 12


class Finding(NamedTuple):
    """The result of a check: whether the number is right (None if nothing was computed), and the figure or the reason."""

    ok: bool | None
    text: str


class Measured(NamedTuple):
    """Log-probs of all response tokens, (tokens,), and each pair's gradient norm, (pairs,)."""

    logps: np.ndarray
    gradients: np.ndarray


class Subject:
    """The tiny model on one backend.

    Args:
        name: "cuda", "cpu" or "mlx".
        folder: an empty folder to work in.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.model = tiny_model.make(folder / "model")
        self._measured: dict[str, Measured] = {}

    @property
    def sharing(self) -> str:
        """The layout that computes a prompt once."""
        return "prefix" if self.name == "mlx" else "packed"

    @cached_property
    def dtype(self) -> str:
        """The type that --dtype auto means here."""
        return registry.auto_dtype(self.name)

    @cached_property
    def pairs(self) -> list[Example]:
        """Pairs of random tokens with unequal lengths."""
        draw = np.random.default_rng(1)
        rows = [
            [tuple(map(int, draw.integers(2, tiny_model.VOCABULARY, n))) for n in draw.integers(2, 40, 3)] for _ in range(4)
        ]
        return [Example(prompt, (one, other), (CHOSEN, REJECTED)) for prompt, one, other in rows]

    def config(self, **changes: Any) -> ResolvedConfig:
        """Return options: float32, the plain layout and no checkpointing, with `changes`."""
        options = {"model": self.model, "backend": self.name, "dtype": "float32", "layout": "plain", "optim": "adamw"}
        return TrainConfig(**{**options, "gradient_checkpointing": "off", "lora_r": 8, **changes}).resolved()

    def load(self, **changes: Any) -> Backend:
        """Load the model with these options, after freeing the previous one's memory."""
        gc.collect()
        registry.free(self.name)
        config = self.config(**changes)
        return registry.load(self.name, config, config.model, config, config)

    def step(self, backend: Backend, examples: list[Example], rate: float) -> StepResult:
        """Take a step of lsif with all examples in one pass."""
        criterion = Criterion(self.config(), examples)
        return backend.step(micro_batches([Batch.of(examples)], criterion), criterion, rate)

    @cached_property
    def adapter(self) -> str:
        """A folder with a trained adapter, after three steps in float32 and the plain layout."""
        folder = self.folder / "adapter"
        backend = self.load()
        for _ in range(STEPS):
            self.step(backend, self.pairs, RATE)
        make_folder(folder)
        backend.save_adapter(folder)
        return str(folder)

    def measured(self, **changes: Any) -> Measured:
        """Return log-probs and gradients with the trained adapter under these options, computed once."""
        key = repr(sorted(changes.items()))
        if key not in self._measured:
            self._measured[key] = self.measure(self.load_trained(**changes))
        return self._measured[key]

    def load_trained(self, **changes: Any) -> Backend:
        """Load the model with the trained adapter and these options."""
        return self.load(init_adapter=self.adapter, reference="base", **changes)

    def measure(self, backend: Backend) -> Measured:
        """Return log-probs and gradients of a loaded model."""
        logps = backend.token_logps(Batch.of(self.pairs))
        return Measured(logps, np.array([self.step(backend, [pair], 0.0).grad_norm for pair in self.pairs]))


def fresh(subject: Subject) -> Finding:
    """Expect an untrained model to equal its reference, and to learn."""
    backend = subject.load(dtype=subject.dtype, layout="auto")
    taken: list[StepResult] = []
    for _ in range(_TRIES):
        result = subject.step(backend, subject.pairs, RATE)
        taken += [] if result.skipped else [result]  # float16 may have to lower its loss scale first
        if len(taken) == STEPS:
            break
    else:
        return Finding(False, f"gradients overflow: {len(taken)} of {_TRIES} steps were taken")
    far = float(np.abs(taken[0].policy - taken[0].reference).max())
    text = f"log-ratio {far:g} at first; loss {taken[0].loss:.3f} to {taken[-1].loss:.3f} in {len(taken)} steps"
    return Finding(far == 0 and taken[-1].loss < taken[0].loss, text)


def shared(subject: Subject) -> Finding:
    """Compare the layout that shares prompts with the plain one in float32."""
    return equal(subject.measured(layout=subject.sharing), subject.measured(), "the plain layout")


def sixteen_bits(subject: Subject) -> Finding:
    """Expect the sharing layout in the compute type to be as close to float32 as the plain one."""
    if subject.dtype == "float32":
        return Finding(None, "this machine computes in float32")
    exact = subject.measured()
    plain = subject.measured(dtype=subject.dtype)
    packed = subject.measured(dtype=subject.dtype, layout=subject.sharing)

    def far(one: Measured) -> tuple[float, float]:
        logps = float(np.sqrt(np.mean((one.logps - exact.logps) ** 2)))
        return logps, float(np.abs(one.gradients / exact.gradients - 1).max())

    (logps, gradients), (limit, most) = far(packed), far(plain)
    ok = bool(logps <= NEAR * limit and gradients <= max(NEAR * most, 0.02))
    return Finding(ok, f"{logps:.1e} nats from float32, gradients {gradients:.1e}; plain layout {limit:.1e} and {most:.1e}")


def checkpointing(subject: Subject) -> Finding:
    """Compare recomputed activations with kept ones."""
    return equal(subject.measured(gradient_checkpointing="full"), subject.measured(), "no checkpointing")


def four_bits(subject: Subject) -> Finding:
    """Compare the 4-bit model with a float32 one whose weights are the dequantised 4 bits."""
    backend = subject.load_trained(load_in_4bit=True)
    made = registry.module(subject.name, "export").dense(backend)
    dense = {f"{name}.weight": weight.make() for name, weight in made.items()}
    packed = subject.measure(backend)
    whole = subject.measured(model=tiny_model.make(subject.folder / "dense", dense))
    original = subject.measured()
    finding = equal(packed, whole, "the weights dequantised")
    moved = float(np.abs(packed.logps - original.logps).max())
    return Finding(finding.ok and moved > 0, finding.text)


def offloads(subject: Subject) -> Finding:
    """Expect offloaded data to come back from the computer's memory unchanged."""
    here = {"dtype": subject.dtype, "gradient_checkpointing": "full", "layout": "auto"}
    kept, offloaded = subject.measured(**here), subject.measured(**here, offload_activations=True, offload_embeddings=True)
    same = all(bool((a == b).all()) for a, b in zip(kept, offloaded, strict=True))
    return Finding(same, f"log-probs and gradients {'bitwise equal' if same else 'differ'}")


def generation(subject: Subject) -> Finding:
    """Compare answers in a batch with streamed ones, and the first token with the log-probs of all tokens."""
    backend = subject.load_trained()
    prompts = [list(pair.prompt) for pair in subject.pairs]
    greedy = [answer.ids for answer in backend.generate(prompts, _TOKENS, [1])]
    streamed = [[token for token in backend.stream(prompt, _TOKENS, [1]) if token != 1] for prompt in prompts]
    drawn = [[a.ids for a in backend.generate(prompts, _TOKENS, [1], seeds=[1, 2, 3, 4])] for _ in range(2)]
    every = np.arange(tiny_model.VOCABULARY)
    answers = [np.array([token]) for token in every]
    batch = Batch([np.array(prompts[0])], answers, np.zeros(len(every), int), np.full(len(every), CHOSEN))
    logps = backend.token_logps(batch)
    total, first = float(np.exp(logps.astype(np.float64)).sum()), int(logps.argmax())
    likeliest = (greedy[0] or [1])[0]
    ok = greedy == streamed and drawn[0] == drawn[1] and first == likeliest and abs(total - 1) < RELATIVE
    said = [
        f"batch and stream {'agree' if greedy == streamed else 'differ'}",
        f"seeds {'repeat' if drawn[0] == drawn[1] else 'do not repeat'}",
        f"the first token is {'' if first == likeliest else 'not '}the most likely one",
        f"probabilities sum to {total:.6f}",
    ]
    return Finding(ok, ", ".join(said))


def equal(one: Measured, other: Measured, what: str) -> Finding:
    """Expect two computations in float32 to give the same numbers, up to rounding."""
    logps, gradients = float(np.abs(one.logps - other.logps).max()), float(np.abs(one.gradients / other.gradients - 1).max())
    ok = bool(logps <= tolerance("float32") and gradients <= RELATIVE)
    text = f"log-probs within {logps:.1e} nats, gradients within {gradients:.1e} of {what}"
    return Finding(ok, text if logps or gradients else f"log-probs and gradients equal those of {what}")


CHECKS: dict[str, Callable[[Subject], Finding]] = {
    "fresh adapter": fresh,
    "shared prompts, float32": shared,
    "shared prompts, 16 bits": sixteen_bits,
    "checkpointing": checkpointing,
    "4 bits": four_bits,
    "offloads": offloads,
    "generation": generation,
}
