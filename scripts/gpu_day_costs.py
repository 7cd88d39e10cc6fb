"""scripts/gpu_day.py: the seconds that its checks take on an H200, by arithmetic. Nothing here was measured on one.

A check that would not fit into what is left of a part is not started, and one that takes far longer is stopped: after LEAST
seconds and PATIENCE times its own. On a slower card all take longer by what its matrix products do, measured at the start.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmark_cases import Lengths, operations
from benchmark_models import LLAMA_8B

# A process: importing torch, transformers, PEFT and bitsandbytes took 6 s of a core on a server of 2026 once the files were in
# memory, up to 41 s beside other work when they were not; CUDA's context about 2 s.
START = 12.0
# The 8B model in NF4 has 5.7 GB in 34 files: read from memory or a fast disk and copied at 1 GB/s.
LOAD = 6.0
# Made: 7e9 numbers drawn, quantised and copied, a second or two at 4 TB/s; 5.7 GB written, at 200 MB/s.
MAKE = 35.0
# One kind of attention, forward and backward, by Inductor and Triton on one core: two kinds and the start of the process took
# 26 to 67 s on a shared server, on a stand-in card.
COMPILE = 15.0
RATE = 4e14  # FLOP/s: 40 % of the 990 TFLOP/s in 16 bits that the vendor names
BANDWIDTH = 4e12  # bytes/s of the card's memory
PACKED = 7e9  # weights of the 8B model in 4 bits, each of which is read, and written and read as 16 bits, in each pass
CORES_A_CHECK = 2
LEAST, PATIENCE = 45.0, 3.0


def step(pairs: Sequence[Lengths], reference: bool = True, again: bool = True, rate: float = RATE) -> float:
    """Return the seconds of a step of the 8B model on these pairs in one pass.

    Args:
        reference: whether the reference is computed in it.
        again: whether full checkpointing computes the policy's forward pass twice.
        rate: FLOP/s.
    """
    one, both = (operations(LLAMA_8B, pairs, 16, with_reference=more) for more in (False, True))
    work = one + (both - one) * (reference + again)  # a second forward pass costs what the reference's does
    passes = 2 + reference + again
    return len(pairs) * work / rate + passes * PACKED * 4.5 / BANDWIDTH


def limit(seconds: float, patience: float) -> float:
    """Return the seconds after which a check is stopped."""
    return patience * (LEAST + PATIENCE * seconds)
