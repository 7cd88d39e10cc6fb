"""Tokens of a tokenizer that the model's embedding table lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError
from lite_dil.models.hub import fetch_config
from lite_dil.models.model_config import read_config


def table_rows(tokenizer: Any) -> int | None:
    """Return the rows of the embedding table of the tokenizer's own model; None where config.json does not say it."""
    name = tokenizer.name_or_path
    try:
        file = Path(name) / "config.json" if Path(name).is_dir() else fetch_config(name) if name.count("/") == 1 else None
        config = read_config(file, f"--model {name}") if file else {}
    except UserError:  # loading the model will say so
        return None
    text = config.get("text_config")
    rows = (text if isinstance(text, dict) else config).get("vocab_size", config.get("vocab_size"))
    return rows if isinstance(rows, int) else None


def beyond_table(tokenizer: Any) -> dict[int, str]:
    """Return the token ids beyond the embedding table of the tokenizer's own model, each with a message for the user.

    Some models have such tokens and never use them (Gemma 3 1B has one for images). Where config.json has no `vocab_size`,
    nothing is known to be beyond.
    """
    name, rows = tokenizer.name_or_path, table_rows(tokenizer)
    if rows is None or len(tokenizer) <= rows:
        return {}
    return {
        number: f"--model {name}: its tokenizer has token {number} ({token!r}), and its embedding table only {rows} rows "
        "(vocab_size in config.json); use the tokenizer that belongs to the model, or enlarge the table "
        "(resize_token_embeddings)"
        for token, number in tokenizer.get_vocab().items()
        if number >= rows
    }
