"""A data set ready for training: read, checked, tokenised and cut row by row, with its tokens in a file, not in memory."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from lite_dil.base.display import unheard
from lite_dil.base.errors import UserError
from lite_dil.base.signs import CHOSEN
from lite_dil.base.streams import row_draws
from lite_dil.base.text import count
from lite_dil.data.encoder import Encoder, Example, truncate
from lite_dil.data.files import RowError
from lite_dil.data.formats import FORMATS, kind_of_prompts
from lite_dil.data.options import DataOptions
from lite_dil.data.reader import MARGIN, Problem, Reader, Row, check_kept, parse_columns
from lite_dil.data.rows import DATA, Rows
from lite_dil.data.sources import split_sources
from lite_dil.data.store import ExampleStore, StoreWriter
from lite_dil.data.token_cache import TokenCache

_TOGETHER = 1000  # rows that are tokenised at once


class Picked(Sequence[Example]):
    """Examples of a store in another order; some may be left out or repeated."""

    def __init__(self, examples: Sequence[Example], order: np.ndarray) -> None:
        self.examples, self.order = examples, order

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self.examples[i] for i in self.order[index]]
        return self.examples[self.order[index]]


@dataclass
class Source:
    """What was read from one source.

    Attributes:
        weight: how often an epoch takes each of its rows.
        kept: how many rows are usable.
        format: the name of its format, in `lite_dil.data.formats.FORMATS`.
        problems: the rows that were left out, and why.
        unread: its columns of which nothing was read.
        notes: changes to rows that their owner should know about, and to how many rows.
        form, chat: the kind of its rows, as of `DataSet`, if any are usable.
    """

    name: str
    weight: float
    kept: int
    format: str
    problems: list[Problem]
    notes: Counter[str]
    unread: list[str]
    form: str
    chat: bool

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Source:
        """Return the source whose fields JSON held."""
        problems, notes = [Problem(*each) for each in fields["problems"]], Counter(fields["notes"])
        return cls(**fields | {"problems": problems, "notes": notes})


@dataclass
class DataSet:
    """A data set as one epoch uses it.

    Attributes:
        form: "pairs", "unpaired" or "demonstrations".
        chat: whether prompts are chat messages.
        responses: how many of each sign were read.
        prompts_cut, responses_cut: in how many examples `max_length` cut the prompt, and a response.
        prompts_halved: of how many examples it left less than half of the prompt.
        cuts_none: the smallest `max_length` that would cut none.
        store: every example once, in the order of the data.
        read: every usable row, with its lengths, also those that the objective leaves out.
        names: (examples, 2) uint64, for each example a hash of its prompt, and of its prompt with its responses in any order,
            before cutting.
    """

    examples: Sequence[Example]
    form: str
    chat: bool
    answers: Counter[int]
    sources: list[Source]
    prompts_cut: int
    responses_cut: int
    prompts_halved: int
    cuts_none: int
    store: Sequence[Example]
    names: np.ndarray
    read: ExampleStore

    @property
    def problems(self) -> list[Problem]:
        """The rows left out, of all sources."""
        return [problem for source in self.sources for problem in source.problems]


def reader_of(name: str, split: str, options: DataOptions, rows: Rows | None = None, margins: bool = False) -> Reader:
    """Return the reader for one source, or for a program's rows, with the settings of `options`."""
    columns, limit = parse_columns(options.columns), options.max_rows
    if MARGIN in columns and not margins:
        raise UserError(
            f"--columns {MARGIN}={columns[MARGIN]}: only lite-dil reward with --reward-loss bt reads it; leave it out"
        )
    return Reader(
        name, split, format=options.data_format, columns=columns, limit=limit, chat=options.chat, rows=rows, margins=margins
    )


def load(
    data: str | Rows,
    split: str,
    encoder: Encoder,
    options: DataOptions,
    watch: Callable[[Row, Example, Example], None] | None = None,
    good_only: bool = False,
    strict: bool = True,
    say: Callable[[str], None] = unheard,
    margins: bool = False,
) -> DataSet:
    """Read, check, tokenise and cut all rows of `data`.

    Args:
        data: one or several sources, see `lite_dil.data.sources.split_sources`; or rows.
        split: the split to take if a source names none, "train" or "test".
        watch: called for each usable row with the row, its tokens, and its tokens cut to ``--max-length``.
        good_only: leave unpaired rejected responses out, for objectives that train on chosen ones only.
        strict: raise UserError for unusable rows (unless ``--skip-bad-rows``), and for a source without usable rows.
        say: is told if the tokens that an earlier run kept are damaged, or these cannot be kept.
        margins: read the column 'margin' of pairs.

    Raises:
        UserError: a source cannot be read, or its kind of data differs from the source before it; or as `strict` says.
    """
    cache = None if watch else TokenCache(data, split, encoder, options, margins)
    found = cache.find(say) if cache else None
    if found:
        store, sources = found[0], [Source.of(part) for part in found[1]]
        _check(sources, options, strict)
    else:
        store, sources = _read(_readers(data, split, options, margins), encoder, options, watch, strict)
        if cache:
            store = cache.keep(store, [vars(source) for source in sources], say)
    for source, weight in zip(sources, _weights(data), strict=True):
        source.weight = weight
    return _data_set(store, sources, good_only, options.seed)


def _read(
    readers: list[Reader],
    encoder: Encoder,
    options: DataOptions,
    watch: Callable[[Row, Example, Example], None] | None,
    strict: bool,
) -> tuple[ExampleStore, list[Source]]:
    """Read and tokenise all rows of all sources."""
    writer, sources = StoreWriter(), list[Source]()
    for reader in readers:
        first, rows = len(writer), iter(reader)
        # A row with the number of problems before it, so that those of tokenising it take their place among them.
        while some := [(row, len(reader.problems)) for row in itertools.islice(rows, _TOGETHER)]:
            refused = []
            for (row, before), whole in zip(some, encoder.encode_all([row for row, _ in some], reader.notes), strict=True):
                try:
                    if isinstance(whole, RowError):
                        raise whole
                    example = _cut(whole, options.max_length)
                except RowError as error:
                    refused.append((before, Problem(error.kind, row.place, str(error))))
                    continue
                shown = encoder.spelled(row)
                writer.append(example, whole, None if watch else shown.prompt)
                if watch:
                    watch(shown, whole, example)
            for before, problem in reversed(refused):
                reader.problems.insert(before, problem)
        kept, problems = len(writer) - first, reader.problems
        form, chat = (reader.form, reader.chat) if kept else ("", False)
        sources.append(Source(reader.source, 1, kept, reader.format, problems, reader.notes, reader.unread, form, chat))
        _check(sources, options, strict)
    return writer.store(), sources


def _check(sources: list[Source], options: DataOptions, strict: bool) -> None:
    """Raise UserError for sources that cannot be used, or do not go together."""
    for source in sources if strict else []:
        check_kept(source.name, source.problems, source.notes, source.kept, options.skip_bad_rows)
    used = [source for source in sources if source.kept]
    for source in used:
        if (other := _kind(source)) != (one := _kind(used[0])):
            raise UserError(f"--data: {used[0].name} has {one} and {source.name} {other}; train on one kind at a time")


def _data_set(store: ExampleStore, sources: list[Source], good_only: bool, seed: int) -> DataSet:
    """Describe the examples of a store, and put them in the order of an epoch."""
    good = np.arange(len(store))
    if good_only and len(store):
        good = np.flatnonzero(np.maximum.reduceat(store.signs, store.first[:-1]) == CHOSEN)
    usable: Sequence[Example] = store if len(good) == len(store) else Picked(store, good)
    names, random, order = store.names[good], row_draws(seed), list[np.ndarray]()
    ends = np.searchsorted(good, np.cumsum([0, *(source.kept for source in sources)]))
    for source, first, end in zip(sources, ends[:-1], ends[1:], strict=True):
        order.append(_often(np.arange(first, end), source.weight, random))
    examples = usable
    if any(source.weight != 1 for source in sources):
        taken = np.concatenate(order)
        examples, names = Picked(usable, taken), names[taken]
    signs, numbers = np.unique(store.signs[store.signs != 0], return_counts=True)
    answers = Counter(dict(zip(signs.tolist(), numbers.tolist(), strict=True)))
    used = next((source for source in sources if source.kept), None)
    form, chat = (used.form, used.chat) if used else ("", False)
    return DataSet(examples, form, chat, answers, sources, *_cuts(store, good), usable, names, store)


def _cuts(store: ExampleStore, good: np.ndarray) -> tuple[int, int, int, int]:
    """Return what ``--max-length`` cuts of the examples `good`, for the fields of `DataSet`."""
    if not len(good):
        return 0, 0, 0, 0
    cut, whole = store.lengths.T
    prompts, responses = store.first[:-1], store.signs != 0
    shorter = np.logical_or.reduceat((cut < whole) & responses, prompts)
    needed = whole[prompts] + np.maximum.reduceat(np.where(responses, whole, 0), prompts)
    halved = 2 * cut[prompts] < whole[prompts]
    counted = [int(found[good].sum()) for found in (cut[prompts] < whole[prompts], shorter, halved)]
    return counted[0], counted[1], counted[2], int(needed[good].max())


def _needed(example: Example) -> int:
    """Return the smallest ``--max-length`` that cuts nothing of an example."""
    return len(example.prompt) + max(map(len, example.responses))


def _cut(whole: Example, max_length: int) -> Example:
    """Cut an example. Raises RowError if a pair's responses differ only in what is cut off: nothing is learned from it."""
    cut, *_ = truncate(whole, max_length)
    if len(cut.signs) < 2 or cut.responses[0] != cut.responses[1] or whole.responses[0] == whole.responses[1]:
        return cut
    same = len(cut.responses[0])
    while whole.responses[0][same : same + 1] == whole.responses[1][same : same + 1]:
        same += 1
    raise RowError(
        "identical responses",
        f"'chosen' and 'rejected' are the same as far as --max-length {max_length} keeps them, and differ from token "
        f"{same + 1} on; --max-length {_needed(whole)} cuts nothing of this row, and {same + 2} just tells them apart",
    )


def halved(data: DataSet, max_length: int) -> str:
    """Return a warning about prompts of which ``--max-length`` leaves less than half; empty if there are none."""
    if not data.prompts_halved:
        return ""
    lost, rows = data.prompts_halved, len(data.store)
    return (
        f"{count(lost, 'prompt')} ({lost / rows:.1%} of the rows) of which --max-length {max_length} leaves less than half, "
        "because the responses need the room: they are learned without their questions; "
        f"--max-length {data.cuts_none} cuts none"
    )


def _readers(data: str | Rows, split: str, options: DataOptions, margins: bool) -> list[Reader]:
    """Return the readers of all sources."""
    if isinstance(data, Rows):
        return [reader_of(DATA, split, options, data, margins)]
    return [reader_of(name, split, options, margins=margins) for name, _ in split_sources(data)]


def _weights(data: str | Rows) -> list[float]:
    return [1.0] if isinstance(data, Rows) else [weight for _, weight in split_sources(data)]


def _kind(source: Source) -> str:
    return f"{source.form} of {kind_of_prompts(source.chat, [source.format])}"


def epoch_rows(rows: int, weight: float) -> tuple[int, int]:
    """Return how many times an epoch takes all rows of a source, and how many rows it takes once more.

    Every named source gives at least one row to every epoch.
    """
    whole = int(weight)
    return whole, min(rows, max(int(whole == 0), round((weight - whole) * rows)))


def _often(rows: np.ndarray, weight: float, random: np.random.Generator) -> np.ndarray:
    """Return the rows, each as often as an epoch takes it; a fraction is a random sample."""
    whole, rest = epoch_rows(len(rows), weight)
    return np.concatenate([np.tile(rows, whole), np.sort(random.permutation(rows)[:rest])])


def describe(data: DataSet) -> str:
    """Return a line that says how the rows were read."""
    formats = dict.fromkeys(source.format for source in data.sources)
    titles = "; ".join(f"{FORMATS[name].title} ({name})" for name in formats)
    kind = kind_of_prompts(data.chat, formats)
    return f"{kind}{', no chat template' if kind == 'plain text' else ''}, read as {titles}"


def remarks(data: DataSet) -> list[str]:
    """Return what the owner of the data should know: rows left out, and changes to others."""
    lines = []
    for source in data.sources:
        if source.weight != 1:
            lines.append(f"{source.name}: each of its {source.kept} rows {source.weight:g} times an epoch")
        lines += [f"{source.name}: {count} rows: {note}" for note, count in source.notes.items()]
        if source.problems:
            kinds = Counter(problem.kind for problem in source.problems).most_common()
            first = {problem.kind: problem.place for problem in reversed(source.problems)}
            counts = "; ".join(f"{count} {kind} (first: {first[kind]})" for kind, count in kinds)
            lines.append(
                f"{source.name}: {len(source.problems)} of {source.kept + len(source.problems)} rows left out: {counts}"
            )
    return lines
