"""Options that decide which data is read."""

from __future__ import annotations

from dataclasses import dataclass

from lite_dil.base.option import READ, WRITTEN, option
from lite_dil.data.formats import FORMATS
from lite_dil.data.sources import EMBEDDED
from lite_dil.models.options import ModelOptions, Seeded
from lite_dil.objectives.options import ResolvedObjective


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long a prompt and its response may be."""

    max_length: int = option(
        "data",
        1024,
        "longest prompt plus response, in tokens; the prompt is cut first, from the left; a response keeps at least a token",
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions(Lengths, Seeded):
    """Which data is read, and how."""

    data: str = option(
        "data",
        EMBEDDED,
        "pairs, labelled responses or demonstrations: a file (JSON Lines, JSON, CSV, TSV, Parquet, Arrow; .gz, .zst), a "
        "folder of them, or a hub id owner/name[/config][:split]; several as a.jsonl,b.jsonl=0.5, which takes half of b's "
        f"rows per epoch; {EMBEDDED} is the set of pairs in this package. lite-dil data FILE shows what is trained on",
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
        "data", "auto", "the format of the rows; auto detects it from the first 100", choices=("auto", *FORMATS)
    )
    columns: str | None = option(
        "data",
        None,
        "columns whose names differ from the format's fields, such as chosen=good,rejected=bad",
        metavar="FIELD=COLUMN,...",
    )
    chat: bool = option(
        "data",
        False,
        "lay plain-text prompts out as the user's messages, with the model's chat template, instead of continuing them",
    )
    max_rows: int | None = option(
        "data",
        None,
        "read at most this many rows of each source, from its start; from a hub id only these are downloaded",
    )
    skip_bad_rows: bool = option(
        "data",
        False,
        "leave out unusable rows, count them and list them in skipped_rows.jsonl, instead of stopping",
    )


@dataclass(frozen=True, kw_only=True)
class SampleOptions(DataOptions):
    """Data options, with those of --sample-rejected."""

    sample_rejected: int | None = option(
        "data",
        None,
        "for demonstrations: draw this many rejected responses per prompt from the model with its adapter off, as the DIL "
        "family assumes; done once, into a file that later runs read",
    )
    sample_max_tokens: int | None = option(
        "data", None, "maximum tokens of a --sample-rejected response; a longer one is cut there (default: 256)"
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
    """Options that decide which rows are read, and what the loss does with them."""
