"""What MLX multiplies matrices with on a CPU: OpenBLAS where the system has it, 20 times faster than its own.

Every process of the tests imports this before MLX, since the two differ in the last places. torch comes before it, or it would
take its own products from there.
"""

from __future__ import annotations

import ctypes

import torch  # noqa: F401

try:
    ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
except OSError:
    NAME = "MLX's own products"
else:
    NAME = "OpenBLAS for MLX"
