"""What each family's process starts from: the libraries imported, and nothing computed."""

import contextlib

from lite_dil.base.start import start

start()

import peft  # noqa: E402, F401
import transformers.modeling_utils  # noqa: E402

import lite_dil.backends.torch.backend  # noqa: E402
import lite_dil.recipes.preference  # noqa: E402

transformers.logging.set_verbosity_error()
with contextlib.suppress(ImportError):
    import lite_dil.backends.mlx.backend  # noqa: F401
