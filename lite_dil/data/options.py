"""Options that decide what is read."""

from __future__ import annotations

from dataclasses import dataclass

from lite_dil.base.option import READ, WRITTEN, option
from lite_dil.data.formats import FORMATS
from lite_dil.data.sources import EMBEDDED
from lite_dil.models.options import ModelOptions, Seeded
from lite_dil.objectives.options import ResolvedObjective


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long a prompt and its answer may be."""

    max_length: int = option(
        "data",
        1024,
        "longest prompt plus answer, in tokens; the prompt is cut from the left first, and an answer is never cut to nothing",
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions(Lengths, Seeded):
    """What is read, and how."""

    data: str = option(
        "data",
        EMBEDDED,
        "pairs, labelled answers or demonstrations: a file (JSON Lines, JSON, CSV, TSV, Parquet, Arrow; .gz, .zst), a folder "
        "of them, or a hub id owner/name[/config][:split]; several as a.jsonl,b.jsonl=0.5, which takes half of b's rows an "
        f"epoch; {EMBEDDED} is the set of pairs inside this package. lite-dil data FILE shows what is trained on",
        metavar="FILE_OR_HUB_ID",
        kind=READ,
    )
    eval_data: str | None = option(
        "data",
        None,
        f"held-out data in the same form (default: --eval-fraction of --data, or the test split with --data {EMBEDDED})",
        metavar="FILE_OR_HUB_ID",
        kind=READ,
    )
    eval_fraction: float | None = option(
        "data",
        None,
        "share of --data that is held out, by prompt, where there is no --eval-data; 0 for none (default: 0.05, at most 200 "
        "rows, and none of fewer than 200)",
    )
    data_format: str = option(
        "data", "auto", "the format of the rows; auto tells it from the first 100", choices=("auto", *FORMATS)
    )
    columns: str | None = option(
        "data",
        None,
        "columns with other names than the format's fields, as chosen=good,rejected=bad",
        metavar="FIELD=COLUMN,...",
    )
    max_rows: int | None = option(
        "data",
        None,
        "read this many rows of a source at most, from its start; of a hub id no more is downloaded than they need",
    )
    skip_bad_rows: bool = option(
        "data",
        False,
        "leave out the rows that cannot be used, count them and list them in skipped_rows.jsonl, instead of stopping",
    )


@dataclass(frozen=True, kw_only=True)
class SampleOptions(DataOptions):
    """Data, and the rejected answers that --sample-rejected draws for it."""

    sample_rejected: int | None = option(
        "data",
        None,
        "for data of good answers alone: draw this many rejected answers a prompt from the model with its adapter off, which "
        "is what the DIL family assumes of them, once, into a file that later runs read",
    )
    sample_max_tokens: int | None = option(
        "data", None, "tokens of an answer of --sample-rejected at most; a longer one is cut there (default: 256)"
    )
    sample_file: str | None = option(
        "data",
        None,
        "the file of --sample-rejected, JSON Lines (default: in the user's cache folder, by model and data)",
        metavar="FILE",
        kind=WRITTEN,
    )


@dataclass(frozen=True, kw_only=True)
class InspectOptions(ResolvedObjective, SampleOptions, ModelOptions, Lengths, Seeded):
    """What decides which rows are read, and what the loss makes of them."""
