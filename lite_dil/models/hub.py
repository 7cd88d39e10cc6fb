"""Check once whether the Hugging Face hub answers: its libraries would retry for a minute before giving up."""

from __future__ import annotations

import os
from functools import cache

from lite_dil.base.errors import first_line

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
