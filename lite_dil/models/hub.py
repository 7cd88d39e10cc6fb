"""Check once whether the Hugging Face Hub answers, since its libraries retry for a minute; explain what it refuses."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from lite_dil.base.errors import UserError, first_line

# What Python raises where a library takes a value of a stranger's config.json for what it should be.
STRANGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
_SECONDS = 10.0  # to wait for a response


@cache
def offline() -> str:
    """Return why the hub cannot be reached, or an empty string.

    If it cannot, its libraries use their caches from then on and do not try to reach it.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)  # any status will do
    except (HTTPError, OSError) as error:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries not imported yet
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} does not answer: {first_line(error)}"
    return ""


def fetch_config(name: str) -> Path:
    """Return the config.json of a hub id, from the cache or fetched."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"--model {name}: {refusal(name, error)}") from None


def needs_code(error: BaseException) -> str:
    """Return why a model whose own code was not run cannot be loaded, or "" if the error is another one."""
    if "trust_remote_code" not in str(error):
        return ""
    return "it brings Python files of its own; read them, and if you trust them give --trust-remote-code"


def refusal(name: str, error: Exception) -> str:
    """Return why the Hub did not give a file of the model `name`, and what to do, from its library's error."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return f"it is gated: accept its licence at https://huggingface.co/{name} and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or it is private: log in with `hf auth login`"
    if isinstance(error, LocalEntryNotFoundError):
        return "it is not in the local cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set)"
    if isinstance(error, EntryNotFoundError):
        return "it has no config.json on the hub"
    return first_line(error)
