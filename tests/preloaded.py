"""What tests/warm.py's server imports before it forks."""

import contextlib
import gc
import os

from lite_dil.base.start import start

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
start()

import blas  # noqa: E402, F401
import rich.live  # noqa: E402
import rich.progress  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401
import undrawn  # noqa: E402

import lite_dil.backends.torch.backend  # noqa: E402
import lite_dil.backends.torch.generate  # noqa: E402
import lite_dil.backends.torch.load  # noqa: E402
import lite_dil.backends.torch.lora  # noqa: E402
import lite_dil.cli.chat  # noqa: E402
import lite_dil.cli.export  # noqa: E402
import lite_dil.cli.generate  # noqa: E402
import lite_dil.cli.label  # noqa: E402
import lite_dil.recipes.preference  # noqa: E402

with contextlib.suppress(ImportError):
    import lite_dil.backends.mlx.backend
    import lite_dil.backends.mlx.load  # noqa: F401

undrawn.undraw()
gc.collect()
gc.freeze()  # the forked processes' collections neither visit nor copy what is here
