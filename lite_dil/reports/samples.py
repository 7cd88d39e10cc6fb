"""Samples for the report: lengths of the data, and answers to a few prompts before and after training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.backends.protocol import Backend
from lite_dil.backends.types import Generated, never
from lite_dil.base.checked import with_digest, without_digest
from lite_dil.base.disk import DiskFailed, failing
from lite_dil.base.display import Tell, TimeLeft, unheard
from lite_dil.base.errors import OutOfMemory
from lite_dil.base.files import replace_file
from lite_dil.base.halving import Halving, halves
from lite_dil.base.hashing import digest
from lite_dil.base.observer import Event, Observer
from lite_dil.base.signs import CHOSEN, REJECTED
from lite_dil.base.streams import named
from lite_dil.base.strict_json import parse_json
from lite_dil.base.text import count
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.data.dataset import DataSet
from lite_dil.data.encoder import Encoder
from lite_dil.data.inspect.findings import source_facts
from lite_dil.data.inspect.survey import lengths
from lite_dil.data.messages import Message
from lite_dil.data.store import ExampleStore

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt to answer: its token ids, its text or messages for people, and its number of tokens before cutting."""

    ids: tuple[int, ...]
    shown: str | list[Message]
    place: str
    tokens: int


def data_facts(use: str, source: str, data: DataSet, tokens: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the report's facts about a data set.

    Args:
        use: "training" or "held out".
        tokens: the lengths of its prompts and responses; see `lengths_of`.
    """
    return {
        "use": use,
        "source": source,
        "examples": len(data.examples),
        "form": data.form,
        "chat": data.chat,
        "answers": {"chosen": data.answers[CHOSEN], "rejected": data.answers[REJECTED]},
        "sources": [source_facts(part) for part in data.sources],
        "prompts_cut": data.prompts_cut,
        "answers_cut": data.responses_cut,
        "tokens": {name: lengths(values) for name, values in tokens.items() if len(values)},
    }


def lengths_of(values: np.ndarray, signs: np.ndarray) -> dict[str, np.ndarray]:
    """Return the lengths `values` of prompts, whose sign is 0, and of chosen and rejected responses."""
    return {name: values[signs == sign] for name, sign in (("prompt", 0), ("chosen", CHOSEN), ("rejected", REJECTED))}


def sample_prompts(store: ExampleStore, count: int, config: ResolvedConfig) -> list[SamplePrompt]:
    """Return `count` prompts to answer: the first to be held out if a part of the data is, else random ones.

    Those that leave no room for `MAX_NEW_TOKENS` are taken only if there are no others.
    """
    found: dict[tuple[int, ...], SamplePrompt] = {}
    if not config.eval_data and config.eval_fraction != 0:
        order = store.names[:, 0] / 2.0**64  # as `lite_dil.data.held_out.taken` takes them
    else:
        order = named("reports/prompts", config.seed).random(len(store))
    prompts = store.first[:-1]
    rows = np.flatnonzero(store.lengths[prompts, 0] + MAX_NEW_TOKENS <= config.max_length)
    rows = rows if len(rows) else np.arange(len(store))
    for row in rows[np.argsort(order[rows], kind="stable")].tolist():
        if len(found) == count:
            break
        example, tokens = store[row], int(store.lengths[prompts[row], 1])
        found.setdefault(example.prompt, SamplePrompt(example.prompt, store.shown(row), example.place, tokens))
    return list(found.values())


@dataclass
class Sample:
    """A prompt and its answers: ``before`` with the adapter off, ``after`` by the policy after ``step`` steps.

    ``prompt`` is the whole prompt; of its ``prompt_tokens`` tokens the model saw ``prompt_seen``, since ``--max-length`` cut
    the rest. ``before_tokens`` and ``after_tokens`` count an answer's tokens without its end token; ``*_cut`` says that it had
    not ended. ``key`` identifies prompt and limit.
    """

    key: str
    prompt: str | list[Message]
    place: str
    held_out: bool
    before: str
    before_tokens: int
    before_cut: bool
    after: str = ""
    after_tokens: int = 0
    after_cut: bool = False
    step: int = 0
    prompt_tokens: int = 0
    prompt_seen: int = 0


class SampleAnswers(Observer):
    """Generates greedy answers to a few prompts into a file: once with the adapter off, and the policy's latest.

    Args:
        prompts: the prompts to answer.
        held_out: whether they are from the held-out data.
        path: report_samples.jsonl; existing answers with the adapter off are not generated again.
        max_length: tokens of prompt and answer together that the model supports.
        every: steps between answers; None answers only at the end.
        doing: shows a text while its block runs, and what is told in it.
    """

    writes = True

    def __init__(
        self,
        prompts: Sequence[SamplePrompt],
        held_out: bool,
        path: Path,
        backend: Backend,
        encoder: Encoder,
        max_length: int,
        say: Callable[[str], None],
        every: int | None = None,
        doing: Callable[[str], AbstractContextManager[Tell]] = lambda text: nullcontext(unheard),
    ) -> None:
        self.prompts, self.held_out, self.path, self.backend, self.encoder = prompts, held_out, path, backend, encoder
        self.every, self._doing = every, doing
        # One limit for all, so that a halved batch gives the same answers.
        longest = max((len(prompt.ids) for prompt in prompts), default=0)
        self.room = max(1, min(MAX_NEW_TOKENS, max_length - longest))
        self.say = say
        self._halving: Halving[Sequence[SamplePrompt]] = Halving("a batch of sample answers", self._tokens, halves, say)

    def started(self, event: Event) -> None:
        """Answer in a run whose steps were all taken before; only the last answers are shown."""
        if event.last:
            self.after_step(event)

    def after_step(self, event: Event) -> None:
        """Answer if due; a full disk does not end the training."""
        if not event.due(self.every) or not self.prompts:
            return
        text = "" if event.stop() else f"answering {count(len(self.prompts), 'sample prompt')} of the report"
        try:
            with self._doing(text) as tell, failing(self.path):
                self.refresh(event.step, event.stop, tell)
        except DiskFailed as error:
            self.say(f"{error}. The run continues without these sample answers")
        self.left_out = self.left_out or (event.stop() and bool(self.prompts))

    def refresh(self, step: int, stop: Callable[[], bool] = never, tell: Tell = unheard) -> None:
        """Answer with the policy after `step` steps and write the file, unless `stop`, called between tokens, ends it.

        A prompt too long for memory ends all answering. `tell` is called with the time left.
        """
        if not self.prompts or stop():
            return
        known = {sample.key: sample for sample in read_samples(self.path, self.say)}
        samples = [known.get(self._key(prompt)) for prompt in self.prompts]
        missing = [p for p, sample in zip(self.prompts, samples, strict=True) if sample is None]
        rows = [missing, self.prompts] if self.backend.batched else [[p] for p in (*missing, *self.prompts)]
        left = TimeLeft(tell, self.room * sum(map(bool, rows)), "at most")
        try:
            if missing:
                with self.backend.adapter_off():
                    made = iter(self._answers(missing, stop, left))
                samples = [sample or self._first(p, next(made)) for p, sample in zip(self.prompts, samples, strict=True)]
            after = [] if stop() else self._answers(self.prompts, stop, left)
        except OutOfMemory as error:
            self.say(f"no sample answers from here on: {error}")
            self.prompts = []
            return
        if stop():  # the answers are incomplete
            return
        found = [sample for sample in samples if sample]
        for sample, prompt, answer in zip(found, self.prompts, after, strict=True):
            sample.after, sample.after_tokens, sample.after_cut = self._shown(prompt, answer)
            sample.prompt_tokens, sample.prompt_seen, sample.step = prompt.tokens, len(prompt.ids), step
        write_samples(self.path, found)

    def _answers(self, prompts: Sequence[SamplePrompt], stop: Callable[[], bool], left: TimeLeft) -> list[Generated]:
        ends = self.encoder.end_ids()

        def between_tokens() -> bool:
            left.add()
            return stop()

        def generate(part: Sequence[SamplePrompt]) -> list[Generated]:
            whole = len(part) == len(prompts)  # of the parts that memory holds the time is not known
            return self.backend.generate([p.ids for p in part], self.room, ends, stop=between_tokens if whole else stop)

        return [answer for part in self._halving.run(generate, prompts) for answer in part]

    def _first(self, prompt: SamplePrompt, answer: Generated) -> Sample:
        return Sample(self._key(prompt), prompt.shown, prompt.place, self.held_out, *self._shown(prompt, answer))

    def _shown(self, prompt: SamplePrompt, answer: Generated) -> tuple[str, int, bool]:
        return self.encoder.tokenizer.decode(answer.ids).strip(), len(answer.ids), answer.end is None

    def _key(self, prompt: SamplePrompt) -> str:
        return digest(prompt.ids, self.room)

    def _tokens(self, part: Sequence[SamplePrompt]) -> int:
        return len(part) * (max(len(p.ids) for p in part) + self.room)


def read_samples(path: Path, say: Callable[[str], None] = unheard) -> list[Sample]:
    """Read report_samples.jsonl; empty if there is no such file. `say` is told of damaged lines, which are left out."""
    if not path.exists():
        return []
    samples, bad = [], 0
    for text in path.read_bytes().splitlines():
        try:
            samples.append(Sample(**without_digest(parse_json(text))))
        except (ValueError, TypeError):
            bad += 1
    if bad or not samples:
        say(f"{path} is damaged; the others of its sample answers are used" if samples else f"{path} is damaged")
    return samples


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write report_samples.jsonl, completely or not at all."""
    replace_file(path, "".join(json.dumps(with_digest(asdict(sample))) + "\n" for sample in samples))
