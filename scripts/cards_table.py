"""Print the README's table of the memory that an 8B Llama with --4bit needs, and what fits where, by `lite-dil plan`.

python scripts/cards_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from benchmark_models import LLAMA_8B

from lite_dil.config.options import build
from lite_dil.planning.plan import Plan, make

CONFIG = LLAMA_8B | {"model_type": "llama", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}


class Machine(NamedTuple):
    """A column: GB of the card or Mac, and of the card's computer if that is limited."""

    name: str
    backend: str
    size: float
    host: float | None = None
    dtype: str = "bfloat16"


# A T4 has 14.6 GB, of which CUDA leaves 14.0, and computes in float16; Colab's computer has 12.7.
MACHINES = (
    Machine("GPU of 6 GB", "cuda", 6),
    Machine("8 GB", "cuda", 8),
    Machine("12 GB", "cuda", 12),
    Machine("Colab's T4", "cuda", 14.6, 12.7, "float16"),
    Machine("16 GB", "cuda", 16),
    Machine("24 GB", "cuda", 24),
    Machine("Mac of 16 GB", "mlx", 16),
    Machine("24 GB", "mlx", 24),
)


def plan(model: str, machine: Machine, **options: object) -> Plan:
    """Return the plan with the given options and otherwise the defaults of `lite-dil plan`."""
    given = {"model": model, "load_in_4bit": True, "backend": machine.backend, "dtype": machine.dtype, **options}
    return make(build(given, {}), set(), machine.size, host=machine.host)


def main() -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        plans = [plan(folder, machine) for machine in MACHINES]
        heads = [plan(folder, machine, head_bits=8) for machine in MACHINES]
    rooms, small = ([plan.rooms[0] for plan in those] for those in (plans, heads))
    rows = {
        "memory": [machine.name for machine in MACHINES],
        "a pair of 1,024 tokens (prompt plus answer) needs": [f"{p.estimate.total / 2**30:.1f} GB" for p in plans],
        "pairs of 1,024 tokens in one pass, at most": [number(room.examples) for room in rooms],
        "with `--auto`": [number(room.examples_auto) for room in rooms],
        "the longest pair, `--max-length`, with `--auto`": [number(room.longest_auto) for room in rooms],
        "and with `--head-bits 8`": [number(room.longest_auto) for room in small],
    }
    lines = [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()]
    print("\n".join([lines[0], "|" + "---|" * (len(MACHINES) + 1), *lines[1:]]))


def number(count: int) -> str:
    """Return a count, or a dash for 0."""
    return f"{count:,}" if count else "-"


if __name__ == "__main__":
    main()
