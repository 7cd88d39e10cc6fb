"""What each family's process starts from: the libraries imported, and nothing computed."""

import contextlib
import ctypes

from lite_dil.base.start import start

start()

import peft  # noqa: E402, F401
import transformers.modeling_utils  # noqa: E402

import lite_dil.backends.torch.backend  # noqa: E402
import lite_dil.recipes.preference  # noqa: E402

transformers.logging.set_verbosity_error()
# After torch, which would take its products from there. MLX's own are 20 times slower on a CPU.
with contextlib.suppress(OSError):
    ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
with contextlib.suppress(ImportError):
    import lite_dil.backends.mlx.backend  # noqa: F401
