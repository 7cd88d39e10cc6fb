"""Rejected answers drawn from the reference itself, once, into a file that can be read.

DIL's derivation takes the rejected side for draws from pi_ref. Written answers of some other origin are not; these are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from lite_dil.backends import Answer, Backend
from lite_dil.config import TrainConfig
from lite_dil.data import CHOSEN, REJECTED
from lite_dil.errors import UserError
from lite_dil.examples import Encoder, Example
from lite_dil.fitting import Fitting
from lite_dil.models import cache_dir
from lite_dil.progress import Display
from lite_dil.reference import reference_key
from lite_dil.schedule import Schedule, row_tokens
from lite_dil.signals import StopSignal

# Generation keeps keys and values and no activations, so that it can take more tokens at once than a step of training.
ROWS = 8
_VERSION = "1"


@dataclass(frozen=True)
class Draw:
    """One answer that is wanted: the draw number `sample` for the prompt of `example`.

    `room` is how many tokens the answer may have. `key` names all that decides it.
    """

    example: Example
    sample: int
    room: int
    seed: int
    key: str


def add_samples(
    examples: Sequence[Example],
    count: int,
    backend: Backend,
    encoder: Encoder,
    path: Path,
    reference: str,
    config: TrainConfig,
    display: Display,
) -> list[Example] | None:
    """Add `count` answers drawn from the reference to each example, as rejected ones behind the answers that it has.

    An answer is exactly what was drawn: temperature 1, nothing cut off, its own end token last, or cut at `sample_max_tokens`,
    or at `max_length` as a chosen answer would be. It may happen to be one of the example's other answers.

    Args:
        examples: fitted into `config.max_length` tokens.
        path: a JSON Lines file, one line a draw, to which those that are not in it yet are added. The token ids in it are
            what is trained on; a line whose text is not that of its ids is ignored.
        reference: what `reference_digest` returned; draws from another reference are not taken for this one's.

    Returns:
        The examples in the same order, or None where Ctrl-C ended it early; what was drawn up to then is in the file.
    """
    ends = end_ids(examples, encoder)
    wanted = draws(examples, count, ends, reference, config)
    file = SampleFile(path, wanted, ends, encoder.tokenizer)
    # Whole batches, also where some of their lines are there: a run that goes on then computes what one in a go would have.
    batches = [batch for batch in plan(wanted, config) if any(draw.key not in file.known for draw in batch)]
    keys = {draw.key for draw in wanted}
    found = len(keys & file.known.keys())
    display.say(f"rejected answers from the reference: {found} of {len(keys)} are in {path}, {len(keys) - found} to draw")
    if file.ignored:
        display.say(f"{path}: {file.ignored} lines ignored, which were edited or damaged")
    fitting: Fitting[list[Draw]] = Fitting("a batch of answers", _tokens, _halves, display.say)

    def generate(part: list[Draw]) -> list[Answer]:
        prompts, seeds = [draw.example.prompt for draw in part], [draw.seed for draw in part]
        return backend.generate(prompts, max(draw.room for draw in part), ends, seeds)

    with StopSignal("stopping after these answers; what was drawn is kept") as stop, display.bar(len(batches), 0) as bar:
        for number, batch in enumerate(batches, 1):
            if stop.asked:
                return None
            with backend.adapter_off():
                answers = list(chain.from_iterable(fitting.run(generate, batch)))
            for draw, (ids, end) in zip(batch, answers, strict=True):
                file.add(draw, (*ids, *(() if end is None else (end,)))[: draw.room])
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


def reference_digest(config: TrainConfig, model: str, identity: str) -> str:
    """Return what names the reference that is drawn from; arguments as in `lite_dil.reference.open_cache`."""
    return _digest(sorted(reference_key(config, model, identity).items()))


def sample_path(config: TrainConfig, reference: str) -> Path:
    """Return the file of the draws: as asked for, or one in the cache folder for this data and this reference."""
    if config.sample_file:
        return Path(config.sample_file)
    return cache_dir() / "sampled" / f"{Path(config.data).stem}-{reference[:12]}.jsonl"


def needed(config: TrainConfig, examples: Sequence[Example]) -> list[Example]:
    """Return those that a run with `--max-steps` comes to, in the order of the data; drawing takes longer than training."""
    schedule = Schedule(config, examples)
    count = schedule.steps * schedule.examples_per_step
    if config.max_steps is None or count >= len(examples):
        return list(examples)
    return [examples[i] for i in sorted(schedule.order(0)[:count].tolist())]  # a longer run needs these and more


def end_ids(examples: Sequence[Example], encoder: Encoder) -> list[int]:
    """Return the tokens that end an answer: EOS, and the end-of-turn tokens that the examples' own answers end in.

    A chat template's end-of-turn token need not be the tokenizer's EOS, and a model may have learned both.
    """
    control = set(encoder.tokenizer.convert_tokens_to_ids(sorted(encoder.control)))
    last = {response[-1] for example in examples for response in example.responses}
    return sorted({encoder.tokenizer.eos_token_id} | (last & control))  # one that was cut ends in some other token


def draws(examples: Sequence[Example], count: int, ends: Sequence[int], reference: str, config: TrainConfig) -> list[Draw]:
    """Return what is to be drawn, `count` a example, in their order; a prompt that comes twice has draws of its own twice."""
    longest = config.sample_max_tokens or config.max_length
    wanted: list[Draw] = []
    seen: Counter[tuple[int, ...]] = Counter()
    for example in examples:
        for sample in range(seen[example.prompt], seen[example.prompt] + count):
            # The seed is the prompt's and the number's alone: not of its neighbours in a batch, nor of where a run stopped.
            seed = int(_digest(config.seed, example.prompt, sample)[:16], 16)
            key = _digest(_VERSION, reference, config.seed, config.max_length, longest, tuple(ends), example.prompt, sample)
            wanted.append(Draw(example, sample, min(longest, config.max_length - len(example.prompt)), seed, key))
        seen[example.prompt] += count
    return wanted


def plan(wanted: Sequence[Draw], config: TrainConfig) -> list[list[Draw]]:
    """Group draws with prompts of similar length, the longest first, by the tokens that a batch may come to."""
    batches: list[list[Draw]] = []
    for draw in sorted(wanted, key=lambda draw: len(draw.example.prompt), reverse=True):
        # Padded to the longest prompt, which is the first, and going on until the shortest one's room is used up.
        if batches and (len(batches[-1]) + 1) * (len(batches[-1][0].example.prompt) + draw.room) <= ROWS * row_tokens(config):
            batches[-1].append(draw)
        else:
            batches.append([draw])
    return batches


def _tokens(batch: list[Draw]) -> int:
    return len(batch) * max(len(draw.example.prompt) + draw.room for draw in batch)


def _halves(batch: list[Draw]) -> list[list[Draw]]:
    middle = (len(batch) + 1) // 2
    return [batch[:middle], batch[middle:]] if middle < len(batch) else []


class SampleFile:
    """The answers that were drawn, in one append-only file of JSON Lines: preference data of plain text, and the ids.

    `read_rows` reads it too, but for an answer that ended at once, whose text is empty.
    A last line that was cut off is removed. Other lines that cannot be used are left where they are and counted in `ignored`.

    Args:
        wanted: the draws that are looked for.
        ends: the end tokens, which the text leaves out.
    """

    def __init__(self, path: Path, wanted: Sequence[Draw], ends: Sequence[int], tokenizer: Any) -> None:
        self.path, self.ends, self.tokenizer = path, set(ends), tokenizer
        self.known: dict[str, tuple[int, ...]] = {}
        self.ignored = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:  # a run was killed while it wrote
                os.truncate(path, len(whole))
        except OSError as error:
            raise UserError(f"{path}: cannot be used for the answers that are drawn ({error})") from None
        by_key = {draw.key: draw for draw in wanted}
        for line in whole.split(b"\n")[:-1]:
            try:
                row = json.loads(line)
                ids, draw = tuple(row["rejected_ids"]), by_key.get(row["key"])  # None is of a longer run, or other settings
                # Ids that belong to another text were edited by someone who should hear that they are what counts, or damaged.
                believed = draw is None or (
                    row["rejected"] == self._text(draw.example.prompt, ids) and 0 < len(ids) <= draw.room
                )
            except (ValueError, KeyError, TypeError, OverflowError):  # not JSON, no key, or ids that are no ids
                draw, believed = None, False
            if not believed:
                self.ignored += 1
            elif draw:
                self.known.setdefault(draw.key, ids)

    def add(self, draw: Draw, ids: tuple[int, ...]) -> None:
        """Remember an answer, unless it is known. It is on disk when this returns."""
        if draw.key in self.known:
            return
        line = json.dumps(self._row(draw, ids), ensure_ascii=False) + "\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(line.encode())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error})") from None
        self.known[draw.key] = ids

    def _row(self, draw: Draw, ids: tuple[int, ...]) -> dict[str, Any]:
        example = draw.example
        chosen = next((r for r, sign in zip(example.responses, example.signs, strict=True) if sign == CHOSEN), None)
        return {
            "prompt": self._decode(example.prompt),
            **({} if chosen is None else {"chosen": self._text(example.prompt, chosen)}),
            "rejected": self._text(example.prompt, ids),
            "rejected_ids": list(ids),
            "sample": draw.sample,
            "key": draw.key,
        }

    def _text(self, prompt: tuple[int, ...], ids: tuple[int, ...]) -> str:
        """Return the text of an answer as its prompt's continuation: by itself, SentencePiece would drop its first space."""
        content = ids[:-1] if ids and ids[-1] in self.ends else ids
        start, whole = self._decode(prompt), self._decode(prompt + content)
        return whole[len(start) :] if whole.startswith(start) else self._decode(content)

    def _decode(self, ids: tuple[int, ...]) -> str:
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
