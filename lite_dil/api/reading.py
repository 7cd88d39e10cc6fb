"""Data for training: files, folders and hub ids, or a program's own rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError
from lite_dil.config.options import build
from lite_dil.data.dataset import reader_of
from lite_dil.data.reader import Row
from lite_dil.data.rows import DATA, Rows
from lite_dil.data.sources import split_sources


@dataclass(frozen=True)
class Data:
    """Data and how its rows are read; iterating over it yields the rows, checked, as training reads them.

    Attributes:
        source: the name of a file, a folder or a data set on the hub, or several with weights; or rows.
        options: those of reading that are not at their defaults, by name.
    """

    source: str | Rows
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The data's name in options and messages."""
        return DATA if isinstance(self.source, Rows) else self.source

    @property
    def rows(self) -> Rows | None:
        """A program's own rows, if any."""
        return self.source if isinstance(self.source, Rows) else None

    def __iter__(self) -> Iterator[Row]:
        """Yield the usable rows. Raises UserError at the end if there are others, as training does before it starts."""
        config = build(self.options, {})
        for name in [DATA] if isinstance(self.source, Rows) else [name for name, _ in split_sources(self.source)]:
            reader, kept = reader_of(name, "train", config, self.rows), 0
            for row in reader:
                kept += 1
                yield row
            reader.check(kept, config.skip_bad_rows)


def read(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    data_format: str = "auto",
    columns: Mapping[str, str] | str | None = None,
    chat: bool = False,
    max_rows: int | None = None,
    skip_bad_rows: bool = False,
) -> Data:
    """Return data for `lite_dil.train`: pairs, labelled responses or demonstrations. It is read only when needed.

    Args:
        source: a file (JSON Lines, JSON, CSV, TSV, Parquet, Arrow; packed or not), a folder of them, a hub id as
            ``owner/name[/config][:split]``, several as ``a.jsonl,b.jsonl=0.5``, or an iterable of dicts, which is read once.
        data_format: the format of the rows; "auto" detects it from the first 100.
        columns: the column of a field, if they differ in name: ``{"chosen": "good"}``.
        chat: whether plain-text prompts become the user's messages.
        max_rows: the most rows to read from a source.
        skip_bad_rows: skip unusable rows, and list them in the run's skipped_rows.jsonl, instead of stopping.

    Raises:
        UserError: an option is unknown. Errors in rows are raised when the rows are read, one line per row.
    """
    if isinstance(columns, Mapping):
        columns = ",".join(f"{name}={column}" for name, column in columns.items())
    options = {"data_format": data_format, "columns": columns, "chat": chat, "max_rows": max_rows}
    options["skip_bad_rows"] = skip_bad_rows
    options = {name: value for name, value in options.items() if value not in (None, False, "auto")}
    build(options, {})
    if isinstance(source, (str, Path)):
        return Data(str(source), options)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise UserError(f"dil.read: {type(source).__name__} is neither a name of data nor an iterable of rows")
    return Data(Rows(source), options)


def as_data(data: Any, eval_data: Any, where: str) -> tuple[Data, Data | None]:
    """Return `Data` for what `read` returned or accepts; held-out data may be None.

    Raises UserError, in the name of the function `where`, if the two are read differently: a run has one set of options.
    """
    rows, eval_rows = (given if given is None or isinstance(given, Data) else read(given) for given in (data, eval_data))
    if rows is None:
        raise UserError(f"{where}: there is no data")
    if isinstance(eval_data, Data) and eval_data.options != rows.options:
        raise UserError(f"{where}: data and eval_data must be read alike; give dil.read the same options for both")
    return rows, eval_rows
