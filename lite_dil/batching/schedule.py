"""The examples and the learning rate of each step: pure functions of the step number, which is all that resuming needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lite_dil.base.streams import epoch_order
from lite_dil.batching.batch import Batch
from lite_dil.batching.learning_rate import learning_rate
from lite_dil.batching.options import ResolvedSchedule, ScheduleOptions
from lite_dil.data.encoder import Example


def examples_per_step(options: ScheduleOptions) -> int:
    """Return the number of examples of an optimiser step, over all its passes."""
    return options.batch_size * options.gradient_accumulation_steps


def steps_of(options: ScheduleOptions, examples: int, repeats: int = 1) -> tuple[int, int]:
    """Return the number of steps of an epoch over `examples` examples, including a short last one, and of the whole run.

    Args:
        repeats: steps on the same examples, one after the other.
    """
    per_epoch = math.ceil(examples / examples_per_step(options)) * repeats
    return per_epoch, options.max_steps or math.ceil(options.epochs * per_epoch)


def examples_taken(options: ScheduleOptions, examples: int) -> float:
    """Return how many examples the whole run takes of an epoch of `examples`, those of later epochs again."""
    return options.max_steps * examples_per_step(options) if options.max_steps else options.epochs * examples


class Limits(NamedTuple):
    """The largest allowed pass; tokens are those that its layout computes, padding included."""

    examples: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.examples} examples or {self.tokens} tokens"


class Schedule:
    """The plan of a run over `examples`: each epoch has a new order, drawn from the seed; a short last batch is used too.

    Args:
        others: for each example one that accompanies it in every step (kto's rows for z0), or empty.
        repeats: steps on the same examples, one after the other.
    """

    def __init__(
        self,
        options: ResolvedSchedule,
        examples: Sequence[Example],
        layout: str = "plain",
        others: Sequence[Example] = (),
        repeats: int = 1,
    ) -> None:
        self.options, self.examples, self.layout, self._others = options, examples, layout, others
        self.limits = Limits(options.batch_size, row_tokens(options))
        self.examples_per_step = examples_per_step(options)
        self.repeats = repeats
        self.steps_per_epoch, self.steps = steps_of(options, len(examples), repeats)
        self._shuffled = lru_cache(1)(self._draw)

    def batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of step 1, 2, ...; the layout decides the split, but not the step's examples."""
        return self._planned(self.examples, step)

    def others(self, step: int) -> list[Batch]:
        """Return batches of the examples in `others` that accompany the step's examples."""
        return self._planned(self._others, step) if self._others else []

    def halve(self, batches: Sequence[Batch]) -> bool:
        """Plan passes of at most half of the largest of `batches` from now on; return False if that is a single example."""
        tokens, examples = max((batch_tokens(batch, self.layout), batch.examples) for batch in batches)
        if examples == 1:
            return False
        self.limits = Limits(min(self.limits.examples, math.ceil(examples / 2)), min(self.limits.tokens, tokens // 2))
        return True

    def picked(self, step: int) -> list[int]:
        """Return the indices of the examples of step 1, 2, ..."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        start = position // self.repeats * self.examples_per_step
        found: list[int] = self.order(epoch)[start : start + self.examples_per_step].tolist()
        return found

    def first(self, step: int) -> int:
        """Return the first of the steps on the same examples as `step`."""
        return step - (step - 1) % self.repeats

    def _planned(self, examples: Sequence[Example], step: int) -> list[Batch]:
        return plan([examples[i] for i in self.picked(step)], self.layout, *self.limits)

    def order(self, epoch: int) -> np.ndarray:
        """Return the examples' indices in the order of epoch 0, 1, ..."""
        return self._shuffled(epoch)

    def epoch(self, step: int) -> float:
        """Return how many epochs are done after `step`."""
        return step / self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Return the rate of step 1, 2, ..."""
        return learning_rate(self.options, self.steps, step)

    def _draw(self, epoch: int) -> np.ndarray:
        return epoch_order(self.options.seed, epoch).permutation(len(self.examples))


class LargestPass:
    """Remembers the largest pass of a training: the one with the most tokens and, among equals, the longest responses.

    Attributes:
        batch: the largest pass, or None before the first step.
    """

    def __init__(self, layout: str) -> None:
        self.layout = layout
        self.batch: Batch | None = None
        self._size = (0, 0)

    def add(self, batches: Sequence[Batch]) -> None:
        """Take the passes of a step into account."""
        for batch in batches:
            size = (batch_tokens(batch, self.layout), sum(map(len, batch.responses)))
            if size > self._size:
                self.batch, self._size = batch, size


# A pass without gradients keeps almost nothing, so it can take more tokens than a training pass.
PRECOMPUTE_ROWS = 4
OPEN_ROWS = 8  # unfilled rows that first-fit considers, so that planning a whole data set is fast


def row_tokens(options: ScheduleOptions) -> int:
    """Return the maximum tokens of a pass: the option, or enough for the longest pair under --max-length in any layout."""
    return options.row_tokens or 2 * options.max_length


def plan(examples: Sequence[Example], layout: str, count: int, tokens: int) -> list[Batch]:
    """Group examples into batches of at most `count` examples and `tokens` tokens with padding; a longer one gets its own.

    First-fit from the longest example to the shortest, which pads little and fills rows well.
    """
    rows: list[list[Example]] = []
    for example in sorted(examples, key=lambda e: len(e.prompt) + max(map(len, e.responses)), reverse=True):
        for row in rows[-OPEN_ROWS:]:
            if len(row) < count and computed_tokens([*row, example], layout) <= tokens:
                row.append(example)
                break
        else:
            rows.append([example])
    return [Batch.of(row) for row in rows]


def plan_responses(
    examples: Sequence[Example], layout: str, count: int, tokens: int
) -> list[tuple[Batch, list[tuple[int, int]]]]:
    """Return `plan` of examples whose responses need not share a pass, with what each response of a batch is.

    An example of more than `tokens` tokens is split into parts of fewer responses, each with the prompt; only a single
    response gets a pass above the limit.

    Returns:
        Batches, each with the (example, response) numbers of its responses in order.
    """
    parts, numbers = list[Example](), dict[str, list[tuple[int, int]]]()
    for at, example in enumerate(examples):
        for some in _split(example, range(len(example.responses)), layout, tokens) if example.responses else ():
            responses, signs = example.responses[some.start : some.stop], example.signs[some.start : some.stop]
            parts.append(Example(example.prompt, responses, signs, f"{at} {some[0]}"))
            numbers[parts[-1].place] = [(at, i) for i in some]
    batches = plan(parts, layout, count, tokens)
    return [(batch, [number for place in batch.places for number in numbers[place]]) for batch in batches]


def _split(example: Example, some: range, layout: str, tokens: int) -> list[range]:
    """Return the numbers of some of an example's responses, halved until a pass of `tokens` tokens holds each part."""
    lengths = [len(example.responses[i]) for i in some]
    if len(some) == 1 or layout_tokens([len(example.prompt)], [lengths], layout) <= tokens:
        return [some]
    middle = math.ceil(len(some) / 2)
    return _split(example, some[:middle], layout, tokens) + _split(example, some[middle:], layout, tokens)


def batch_tokens(batch: Batch, layout: str) -> int:
    """Return `computed_tokens` of a batch's examples."""
    return layout_tokens([len(prompt) for prompt in batch.prompts], batch.answer_lengths, layout)


def computed_tokens(examples: Sequence[Example], layout: str) -> int:
    """Return how many tokens a layout computes for these examples in one pass, padding included."""
    lengths = [list(map(len, example.responses)) for example in examples]
    return layout_tokens([len(example.prompt) for example in examples], lengths, layout)


def layout_tokens(prompts: Sequence[int], responses: Sequence[Sequence[int]], layout: str) -> int:
    """Return how many tokens a layout computes for prompts of these lengths, each with responses of these lengths."""
    count = sum(map(len, responses))
    if layout == "packed":
        return sum(prompts) + sum(map(sum, responses))
    if layout == "prefix":
        return len(prompts) * max(prompts) + count * max(map(max, responses))
    return count * max(prompt + max(lengths) for prompt, lengths in zip(prompts, responses, strict=True))
