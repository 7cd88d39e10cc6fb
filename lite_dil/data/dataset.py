"""A data set ready for training: read, checked, tokenised and cut row by row, with its tokens in a file, not in memory."""

from __future__ import annotations

import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, overload

import numpy as np

from lite_dil.base.disk import writing
from lite_dil.base.errors import UserError
from lite_dil.base.files import scratch_file
from lite_dil.base.hashing import tokens_digest
from lite_dil.base.signs import CHOSEN
from lite_dil.base.streams import row_draws
from lite_dil.base.text import count
from lite_dil.data.encoder import Encoder, Example, truncate
from lite_dil.data.files import RowError
from lite_dil.data.formats import FORMATS
from lite_dil.data.options import DataOptions
from lite_dil.data.reader import Problem, Reader, Row, parse_columns
from lite_dil.data.rows import DATA, Rows
from lite_dil.data.sources import split_sources
from lite_dil.models.find import cache_dir


class ExampleStore(Sequence[Example]):
    """Examples in a temporary file, 4 bytes per token; indexing reads an example back.

    Memory holds about 40 bytes per example, so a data set may be larger than memory.
    """

    def __init__(self) -> None:
        self._what = f"the data's tokens in {cache_dir()}"
        with writing(self._what, "LITE_DIL_CACHE"):
            self._file = scratch_file(cache_dir())
        weakref.finalize(self, _close, self._file)
        self._tokens: np.ndarray | None = None
        self._starts = array("q", [0])
        self._sources: dict[str, int] = {}
        self._names: list[str] = []  # the sources' names, by number
        # For each example: its source, its row's number there, and its number of responses.
        self._rows = array("q")

    def append(self, example: Example) -> None:
        """Add an example at the end; all must be added before the first is read."""
        source, _, number = example.place.rpartition(" ")
        lengths = [len(example.prompt), *map(len, example.responses)]
        record = [*lengths, *example.signs, *example.prompt]
        for response in example.responses:
            record += response
        with writing(self._what, "LITE_DIL_CACHE"):
            self._file.write(np.array(record, np.int32).tobytes())
        self._starts.append(self._starts[-1] + len(record))
        if source not in self._sources:
            self._sources[source] = len(self._names)
            self._names.append(source)
        place = self._sources[source]
        self._rows.extend((place, int(number or 0), len(example.responses)))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        if self._tokens is None:
            with writing(self._what, "LITE_DIL_CACHE"):
                self._file.flush()
            self._tokens = np.memmap(self._file, np.int32, "r")
        source, number, count = self._rows[3 * index : 3 * index + 3]
        record = self._tokens[self._starts[index] : self._starts[index + 1]].tolist()
        lengths, signs, at = record[: count + 1], record[count + 1 : 2 * count + 1], 2 * count + 1
        parts = []
        for length in lengths:
            parts.append(tuple(record[at : at + length]))
            at += length
        place = f"{self._names[source]} {number}"
        return Example(parts[0], tuple(parts[1:]), tuple(signs), place)


def _close(file: IO[bytes]) -> None:
    with suppress(OSError):  # unwritten tokens on a full disk, which was reported before
        file.close()


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
    """

    name: str
    weight: float
    kept: int
    format: str
    problems: list[Problem]
    notes: Counter[str]
    unread: list[str]


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

    @property
    def problems(self) -> list[Problem]:
        """The rows left out, of all sources."""
        return [problem for source in self.sources for problem in source.problems]


def reader_of(name: str, split: str, options: DataOptions, rows: Rows | None = None) -> Reader:
    """Return the reader for one source, or for a program's rows, with the settings of `options`."""
    columns = parse_columns(options.columns)
    return Reader(
        name, split, format=options.data_format, columns=columns, limit=options.max_rows, chat=options.chat, rows=rows
    )


def load(
    data: str | Rows,
    split: str,
    encoder: Encoder,
    options: DataOptions,
    watch: Callable[[Row, Example, Example], None] | None = None,
    good_only: bool = False,
    strict: bool = True,
) -> DataSet:
    """Read, check, tokenise and cut all rows of `data`.

    Args:
        data: one or several sources, see `lite_dil.data.sources.split_sources`; or rows.
        split: the split to take if a source names none, "train" or "test".
        watch: called for each usable row with the row, its tokens, and its tokens cut to ``--max-length``.
        good_only: leave unpaired rejected responses out, for objectives that train on chosen ones only.
        strict: raise UserError for unusable rows (unless ``--skip-bad-rows``), and for a source without usable rows.

    Raises:
        UserError: a source cannot be read, or its kind of data differs from the source before it; or as `strict` says.
    """
    store, answers, names = ExampleStore(), Counter[int](), bytearray()
    sources: list[Source] = []
    form, chat, cuts = "", False, _Cuts()
    order: list[np.ndarray] = []
    random = row_draws(options.seed)
    for weight, reader in _readers(data, split, options):
        first, rows, name = len(store), 0, reader.source
        for row in reader:
            try:
                whole = encoder.encode(row, reader.notes)
                example = _cut(whole, options.max_length)
            except RowError as error:
                reader.problems.append(Problem(error.kind, row.place, str(error)))
                continue
            rows += 1
            if watch:
                watch(row, whole, example)
            answers.update(row.signs)
            if good_only and CHOSEN not in row.signs:
                continue
            store.append(example)
            names += tokens_digest(whole.prompt)[:8] + tokens_digest(whole.prompt, whole.responses)[:8]
            cuts.add(whole, example)
        if strict:
            reader.check(rows, options.skip_bad_rows)
        if rows:
            if form and (reader.form, reader.chat) != (form, chat):
                one, other = _kind(form, chat), _kind(reader.form, reader.chat)
                raise UserError(f"--data: {sources[0].name} has {one} and {name} {other}; train on one kind at a time")
            form, chat = reader.form, reader.chat
        sources.append(Source(name, weight, rows, reader.format, reader.problems, reader.notes, reader.unread))
        order.append(_often(np.arange(first, len(store)), weight, random))
    named = np.frombuffer(names, np.uint64).reshape(-1, 2)
    examples: Sequence[Example] = store
    if any(source.weight != 1 for source in sources):
        taken = np.concatenate(order)
        examples, named = Picked(store, taken), named[taken]
    cut = (cuts.prompts, cuts.responses, cuts.halved, cuts.none_at)
    return DataSet(examples, form, chat, answers, sources, *cut, store, named)


@dataclass
class _Cuts:
    """Counts what ``--max-length`` cuts, for the fields of `DataSet`."""

    prompts: int = 0
    responses: int = 0
    halved: int = 0
    none_at: int = 0

    def add(self, whole: Example, cut: Example) -> None:
        """Add an example, before and after cutting."""
        self.prompts += len(cut.prompt) < len(whole.prompt)
        self.responses += any(map(_shorter, cut.responses, whole.responses))
        self.halved += 2 * len(cut.prompt) < len(whole.prompt)
        self.none_at = max(self.none_at, _needed(whole))


def _shorter(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(one) < len(other)


def _needed(example: Example) -> int:
    """Return the smallest ``--max-length`` that cuts nothing of an example."""
    return len(example.prompt) + max(map(len, example.responses))


def _cut(whole: Example, max_length: int) -> Example:
    """Cut an example. Raises RowError if a pair's responses differ only in what is cut off: nothing is learned from it."""
    cut, *_ = truncate(whole, max_length)
    if len(cut.signs) < 2 or cut.responses[0] != cut.responses[1]:
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


def _readers(data: str | Rows, split: str, options: DataOptions) -> list[tuple[float, Reader]]:
    """Return the readers of all sources, each with how often an epoch takes its rows."""
    if isinstance(data, Rows):
        return [(1.0, reader_of(DATA, split, options, data))]
    return [(weight, reader_of(name, split, options)) for name, weight in split_sources(data)]


def _kind(form: str, chat: bool) -> str:
    return f"{form} of {'chat messages' if chat else 'plain text'}"


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
    return f"{'chat messages' if data.chat else 'plain text, no chat template'}, read as {titles}"


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
