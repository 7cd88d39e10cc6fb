"""Whether the Hugging Face hub answers, asked once: its libraries alone would try for a minute before they gave up."""

from __future__ import annotations

import os
from functools import cache

from lite_dil.base.errors import first_line

_SECONDS = 10.0  # to wait for an answer


@cache
def offline() -> str:
    """Return why the hub cannot be reached, or an empty string.

    Where it cannot, its libraries take what is in their caches from then on, and do not ask it.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)  # whatever it answers
    except (HTTPError, OSError) as error:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are not imported yet
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} does not answer: {first_line(error)}"
    return ""
