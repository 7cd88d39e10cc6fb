"""Check that an exported model equals the trained one, by the log-probs of the same tokens under both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.backends.limits import MAX_STRENGTH
from lite_dil.backends.protocol import Backend
from lite_dil.backends.types import Sequences
from lite_dil.base.errors import UserError, first_line
from lite_dil.batching.batch import Batch
from lite_dil.config.resume import trained_with
from lite_dil.config.train_config import TrainConfig
from lite_dil.data.dataset import load, reader_of
from lite_dil.data.encoder import Encoder, Example, truncate
from lite_dil.data.files import RowError
from lite_dil.data.held_out import split
from lite_dil.data.options import DataOptions
from lite_dil.data.sources import EMBEDDED, split_sources
from lite_dil.generation.policy import AdapterSource

# How far from 1 the exported share of the adapter's effect may be, beyond chance. Rounding loses some: 0.06 in bfloat16 and
# 8 bits, 0.33 in 4 bits, measured as above.
SHARE, SHARE_4BIT = 0.25, 0.45
CHANCE = 3.0  # standard errors


# Allowed mean |difference| of log-probs by rounding, in nats per token. Measured on the embedded 135M model with the demo's
# adapter: 0.037 if only the trained side computes in bfloat16, 0.07 (0.08 for NF4) if the merged weights are rounded to it as
# well, 0.09 in 8 bits, 0.86 in 4, which hurts so small a model most. In float32 tiny models differ by 1e-6 to 1e-4.
TOLERANCES = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.15, "8-bit": 0.25, "4-bit": 1.5}


def tolerance(*rounded: str) -> float:
    """Return the allowed mean difference if a side was computed or written in these types."""
    return max(TOLERANCES[name] for name in rounded)


@dataclass(frozen=True)
class Check:
    """Figures of a comparison, in nats per token.

    Attributes:
        rows, tokens: how many held-out rows, and response tokens in them, were compared.
        data: where the rows are from.
        mean, max: mean and maximum of |exported - trained| log-prob over the tokens.
        tolerance: the allowed `mean`.
        effect: mean of |trained - bare model|, the adapter's effect on these tokens.
        share: the share of that effect in the exported model, (exported - bare) over (trained - bare); see `Trained.compare`.
            It is 1 for the trained model, 0 if the adapter was lost, 2 if it was merged twice.
        share_error: standard error of `share`.
        ends: after how many of the responses, of those that have their end token, the exported model gives it more than half
            of the probability, and of how many; it is said, and decides nothing.
        faults: in what a program that runs the files differs from training besides; see `lite_dil.export.runtime`.
    """

    rows: int
    tokens: int
    data: str
    mean: float
    max: float
    tolerance: float
    effect: float
    share: float
    share_error: float
    ends: tuple[int, int] = (0, 0)
    faults: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the exported model is the trained one, as far as these tokens show."""
        whole = not self._telling or abs(self.share - 1) <= self._allowed
        return bool(self.mean <= self.tolerance and whole and not self.faults)  # false for NaN

    @property
    def conclusive(self) -> bool:
        """Whether a lost adapter would have been seen. A barely trained one may have less effect than rounding."""
        return bool(self._telling and self._allowed < 1)

    @property
    def _telling(self) -> bool:
        """Whether `share` says something: below the first limit, 8-bit rounding moved it to 2, beyond its standard error.

        By the second, the exported model is so near the trained one that at least three quarters of the effect are there.
        """
        return self.effect > self.tolerance / 2 or self.mean < self.effect / 4

    @property
    def _allowed(self) -> float:
        """The allowed distance of `share` from 1."""
        return (SHARE_4BIT if self.tolerance >= TOLERANCES["4-bit"] else SHARE) + CHANCE * self.share_error

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for export.json; figures that are not finite become None."""
        figures = asdict(self) | {"ok": self.ok, "conclusive": self.conclusive}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}

    def __str__(self) -> str:
        share = f", of which the share {self.share:.2f} +- {self.share_error:.2f} is there (expected 1)"
        if not self._telling:
            share = ": too small, beside the rounding of these files, to tell whether the adapter is there"
        elif not self.conclusive:
            share += "; these are too few rows to tell whether the adapter is there: compare more (--check-rows)"
        own = f"; after {self.ends[0]} of {self.ends[1]} responses the model itself prefers to end" if self.ends[1] else ""
        return (
            f"{self.tokens} tokens of {self.rows} rows of {self.data}: log-probs differ by {self.mean:.2g} nats per token on "
            f"average (at most {self.tolerance:g} allowed), {self.max:.2g} at worst; the adapter changes them by "
            f"{self.effect:.2g}{share}{own}"
        )


@dataclass(frozen=True)
class Trained:
    """The trained model's figures: log-probs of the response tokens with the adapter and without it, (tokens,).

    `change` is how they change with the adapter's strength, measured at two other strengths.
    """

    examples: list[Example]
    data: str
    policy: np.ndarray
    bare: np.ndarray
    change: np.ndarray
    dtype: str  # in which it computes

    @property
    def sequences(self) -> Sequences:
        """Every response with its prompt, in the order of the figures."""
        return [(example.prompt, response) for example in self.examples for response in example.responses]

    def compare(self, exported: Sequence[np.ndarray], tolerance: float) -> Check:
        """Compare with the exported model's log-probs of `sequences`.

        The share of the effect is not the plain slope of (exported - bare) over (trained - bare). Both differences contain the
        rounding of the trained model's own passes, which pulls that slope towards 1/2 if the adapter's effect is no larger
        than rounding, so a correct export would be refused. `change` correlates with the adapter's effect and was rounded in
        other passes, so it serves as an instrumental variable: share = 1 + cov(change, exported - trained) / cov(change,
            trained -
        bare). The standard error allows unequal noise per token (White, 1980).
        """
        there = np.concatenate(exported).astype(np.float64)
        difference = there - self.policy
        effect = self.policy - self.bare
        x, y, z = (values - values.mean() for values in (effect, difference, self.change))
        common = abs(float(z @ x))
        # Without an effect that varies, the share is 1 and the check is inconclusive.
        slope = float(z @ y) / float(z @ x) if common else 0.0
        error = float(np.linalg.norm(z * (y - slope * x))) / common if common else float("inf")
        return Check(
            rows=len(self.examples),
            tokens=len(there),
            data=self.data,
            mean=float(np.abs(difference).mean()),
            max=float(np.abs(difference).max()),
            tolerance=tolerance,
            effect=float(np.abs(effect).mean()),
            share=1 + slope,
            share_error=error,
        )


def measure(backend: Backend, examples: list[Example], data: str) -> Trained:
    """Compute the figures of a model in memory, row by row.

    Raises:
        UserError: they are not finite.
    """
    strength = backend.strength

    def logps(times: float) -> np.ndarray:
        backend.set_strength(times * strength)
        return np.concatenate([backend.token_logps(Batch.of([example])) for example in examples]).astype(np.float64)

    policy, bare = logps(1), logps(0)
    # At strengths on both sides of the requested one, so that their rounding correlates equally with that of `policy`.
    more, less = (1.5, 0.5) if 1.5 * strength <= MAX_STRENGTH else (0.75, 0.25)
    change = logps(more) - logps(less)
    backend.set_strength(strength)
    if not np.isfinite(policy).all():
        raise UserError(
            "the trained model's own log-probs are not finite, so there is nothing to compare with; its training may "
            "have diverged: export an earlier checkpoint"
        )
    return Trained(examples, data, policy, bare, change, backend.dtype_name)


def held_out(
    source: AdapterSource, encoder: Encoder, rows: int, data: str | None, say: Callable[[str], None]
) -> tuple[list[Example], str]:
    """Return the first `rows` usable rows of `data`, by default of the run's held-out data, and their name.

    Without held-out data they come from the training data and, if that is gone, from the pairs in this package.
    """
    for name, read in _sources(source, data):
        try:
            examples = list(read(encoder, rows))
        except UserError as error:
            if data:
                raise
            say(f"{_short(name)} cannot be read for the check ({first_line(error)})")
            continue
        if examples:
            return examples, _short(name)
    raise UserError("the check found no row that this model's tokenizer can read; give some with --check-data FILE")


def _sources(source: AdapterSource, data: str | None) -> Iterator[tuple[str, Callable[[Encoder, int], Iterable[Example]]]]:
    """Yield possible sources of rows, the best first, with what reads some of them."""
    options = DataOptions()
    if source.run and source.adapter:
        options = TrainConfig(**trained_with(source.adapter, source.run))
    if data:
        yield data, partial(_first, data, "test", options)
        return
    if source.run:
        if options.eval_data:
            yield options.eval_data, partial(_first, options.eval_data, "test", options)
        elif options.eval_fraction != 0:
            yield options.data, partial(_held_out_part, options.data, options)
        if options.data != EMBEDDED:
            yield options.data, partial(_first, options.data, "train", options)
    yield EMBEDDED, partial(_first, EMBEDDED, "test", DataOptions())


def _held_out_part(name: str, options: DataOptions, encoder: Encoder, rows: int) -> Iterable[Example]:
    """Return the first of the rows that the run held out of its training data."""
    _, part = split(load(name, "train", encoder, options, strict=False), options.eval_fraction)
    return part.examples[:rows] if part else []


def _first(name: str, split: str, options: DataOptions, encoder: Encoder, rows: int) -> Iterator[Example]:
    """Return the first rows that can be tokenised, cut as training cuts them."""
    left = rows
    for part, _ in split_sources(name):
        for row in reader_of(part, split, options):
            if not left:
                return
            try:
                example, *_ = truncate(encoder.encode(row), options.max_length)
            except RowError:
                continue
            left -= 1
            yield example


def _short(name: str) -> str:
    """Return a source's name without local folders."""
    return ", ".join(Path(part).name if Path(part).exists() else part for part, _ in split_sources(name))
