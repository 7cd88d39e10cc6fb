"""Draw rejected responses from the reference, once, into a readable file.

DIL's derivation assumes that rejected responses are drawn from pi_ref. Those of a data set rarely are; these are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lite_dil.backends.protocol import Backend
from lite_dil.base.checked import mark_of, with_mark
from lite_dil.base.display import Display
from lite_dil.base.hashing import digest
from lite_dil.base.jsonl import JSONLines
from lite_dil.base.signals import StopSignal
from lite_dil.base.signs import CHOSEN, REJECTED
from lite_dil.base.strict_json import parse_json
from lite_dil.batching.options import DrawOptions, ResolvedSchedule
from lite_dil.batching.schedule import Schedule, row_tokens
from lite_dil.data.encoder import Encoder, Example, continuation_text
from lite_dil.data.options import SampleOptions
from lite_dil.generation.batch_generator import ROWS, BatchGenerator, batched
from lite_dil.models.find import cache_dir

_VERSION = "1"


@dataclass(frozen=True)
class Draw:
    """One response to draw: number `sample` for the prompt of `example`.

    `room` is its maximum number of tokens. `key` is a hash of everything that decides it.
    """

    example: Example
    sample: int
    room: int
    seed: int
    key: str

    @property
    def prompt(self) -> tuple[int, ...]:
        """The example's prompt."""
        return self.example.prompt


def add_samples(
    examples: Sequence[Example],
    count: int,
    backend: Backend,
    encoder: Encoder,
    path: Path,
    reference: str,
    options: DrawOptions,
    display: Display,
) -> list[Example] | None:
    """Append to each example `count` rejected responses drawn from the reference.

    A response is used exactly as drawn: temperature 1, no truncated distribution, ending in its own end token unless it was
    cut at `sample_max_tokens`, or at `max_length` like a chosen response. It may equal another response of the example.

    Args:
        examples: already cut to `options.max_length` tokens.
        path: a JSON Lines file, one line per draw, to which missing draws are added. Its token ids are trained on; a line
            whose text does not match its ids is ignored.
        reference: the result of `reference_digest`; draws from another reference are not used.

    Returns:
        The examples in the same order, or None if Ctrl-C ended it early; the draws so far are in the file.
    """
    ends = encoder.end_ids()
    wanted = draws(examples, count, ends, reference, options)
    file = SampleFile(path, wanted, ends, encoder.tokenizer)
    # Whole batches, even if some of their lines exist: an interrupted run then computes the same as an uninterrupted one.
    batches = [
        batch for batch in batched(wanted, ROWS * row_tokens(options)) if any(draw.key not in file.known for draw in batch)
    ]
    keys = {draw.key for draw in wanted}
    found = len(keys & file.known.keys())
    if file.file.torn:
        display.say(file.file.torn)
    display.say(f"rejected responses from the reference: {found} of {len(keys)} are in {path}, {len(keys) - found} to draw")
    if file.ignored:
        display.say(f"{path}: ignored {file.ignored} edited or damaged lines")
    generator = BatchGenerator(backend, ends, display.say)
    signal = StopSignal("stopping after these responses; what was drawn is kept", tell=display.stopping)
    with signal as stop, display.bar(len(batches), 0) as bar:
        for number, batch in enumerate(batches, 1):
            if stop.asked:
                return None
            with backend.adapter_off():
                answers = generator.draw(batch)
            for draw, answer in zip(batch, answers, strict=True):
                file.add(draw, answer.whole)
            bar.update(number, None)

    drawn = [file.known[draw.key] for draw in wanted]
    return [
        replace(
            example,
            responses=(*example.responses, *drawn[i * count : (i + 1) * count]),
            signs=(*example.signs, *[REJECTED] * count),
        )
        for i, example in enumerate(examples)
    ]


def reference_digest(key: dict[str, str]) -> str:
    """Return a hash of the reference to draw from; `key` is the result of `reference_key`."""
    return digest(sorted(key.items()))


def sample_path(options: SampleOptions, reference: str) -> Path:
    """Return the file of the draws: the option, or one in the cache folder for this data and reference."""
    if options.sample_file:
        return Path(options.sample_file)
    return cache_dir() / "sampled" / f"{Path(options.data).stem}-{reference[:12]}.jsonl"


def needed(options: ResolvedSchedule, examples: Sequence[Example]) -> list[Example]:
    """Return the examples that a run with `--max-steps` uses, in data order, since drawing takes longer than training."""
    schedule = Schedule(options, examples)
    count = schedule.steps * schedule.examples_per_step
    if options.max_steps is None or count >= len(examples):
        return list(examples)
    return [examples[i] for i in sorted(schedule.order(0)[:count].tolist())]  # a longer run uses these and more


def draws(examples: Sequence[Example], count: int, ends: Sequence[int], reference: str, options: DrawOptions) -> list[Draw]:
    """Return the draws to make, `count` per example, in order; a repeated prompt gets its own draws each time."""
    longest = options.sample_max_tokens or options.max_length
    wanted: list[Draw] = []
    seen: Counter[tuple[int, ...]] = Counter()
    for example in examples:
        for sample in range(seen[example.prompt], seen[example.prompt] + count):
            # The seed depends only on the prompt and the number, not on the batch or on where a run stopped.
            seed = int(digest(options.seed, example.prompt, sample)[:16], 16)
            key = digest(_VERSION, reference, options.seed, options.max_length, longest, tuple(ends), example.prompt, sample)
            wanted.append(Draw(example, sample, min(longest, options.max_length - len(example.prompt)), seed, key))
        seen[example.prompt] += count
    return wanted


class SampleFile:
    """The drawn responses in an append-only JSON Lines file: plain-text preference data with token ids.

    `read_rows` can read it, except responses with an empty text, which ended immediately. Unusable lines stay in the file and
    are counted in `ignored`.

    Args:
        wanted: the draws to look for.
        ends: the end tokens, which the text leaves out.
    """

    def __init__(self, path: Path, wanted: Sequence[Draw], ends: Sequence[int], tokenizer: Any) -> None:
        self.ends, self.tokenizer = set(ends), tokenizer
        self.known: dict[str, tuple[int, ...]] = {}
        self.ignored = 0
        self.file = JSONLines(path, "the responses that are drawn", alone=True)
        by_key = {draw.key: draw for draw in wanted}
        for line in self.file.lines:
            try:
                row = parse_json(line)
                key, whole = mark_of(row, "key")
                ids, draw = tuple(row["rejected_ids"]), by_key.get(key)  # None: a longer run, or other settings
                # Ids that do not match the text were damaged, or the text was edited; the ids are what is trained on.
                believed = draw is None or (
                    whole and row["rejected"] == self._text(draw.example.prompt, ids) and 0 < len(ids) <= draw.room
                )
            except (ValueError, KeyError, TypeError, OverflowError):  # not JSON, no key, or invalid ids
                draw, believed = None, False
            if not believed:
                self.ignored += 1
            elif draw:
                self.known.setdefault(draw.key, ids)

    def add(self, draw: Draw, ids: tuple[int, ...]) -> None:
        """Save a response unless it is known; it is on disk on return."""
        if draw.key in self.known:
            return
        self.file.add(self._row(draw, ids))
        self.known[draw.key] = ids

    def _row(self, draw: Draw, ids: tuple[int, ...]) -> dict[str, Any]:
        example = draw.example
        chosen = next((r for r, sign in zip(example.responses, example.signs, strict=True) if sign == CHOSEN), None)
        row = {
            "prompt": self._decode(example.prompt),
            **({} if chosen is None else {"chosen": self._text(example.prompt, chosen)}),
            "rejected": self._text(example.prompt, ids),
            "rejected_ids": list(ids),
            "sample": draw.sample,
            "key": draw.key,
        }
        return with_mark(row, "key")

    def _text(self, prompt: tuple[int, ...], ids: tuple[int, ...]) -> str:
        """Return the text of a response."""
        return continuation_text(self.tokenizer, prompt, ids[:-1] if ids and ids[-1] in self.ends else ids)

    def _decode(self, ids: tuple[int, ...]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
