"""What keeps the terminal to this program: the libraries below it say nothing of their own."""

from __future__ import annotations

import logging
import os


def environment() -> None:
    """Switch off what libraries read from the environment when they are imported, and their notices."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are warnings; what came of them is an error here
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # PEFT imports bitsandbytes, which warns on a CPU of a kernel that only inference would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def bars() -> None:
    """Leave out the bars of transformers. It is imported here, so what must come before it has been."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading weights, and, without being asked, of downloads
    from huggingface_hub.utils import enable_progress_bars

    enable_progress_bars()
