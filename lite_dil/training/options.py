"""Options for the reference's log-probs."""

from __future__ import annotations

from dataclasses import dataclass

from lite_dil.base.option import FREE, WRITTEN, option


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """Where the reference's log-probs are stored, and when they are computed."""

    reference_cache: str | None = option(
        "engine",
        None,
        "folder that stores the reference's log-probs, so that further epochs, runs or losses on the same data and model "
        "do not compute them again; off keeps them for this run only (default: in the user's cache folder)",
        metavar="DIR|off",
        kind=WRITTEN,
    )
    precompute_reference: bool = option(
        "engine", False, "fill the reference cache before training, in large batches; Ctrl-C keeps what was done", kind=FREE
    )
