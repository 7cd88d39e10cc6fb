"""Print the README's table of what an 8B Llama with --4bit needs, and what has room for what, by `lite-dil plan`'s estimate.

python scripts/cards_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmark_models import LLAMA_8B

from lite_dil.config.options import build
from lite_dil.planning.plan import Plan, make

CONFIG = LLAMA_8B | {"model_type": "llama", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
# Name, backend, GB, GB of the computer around it. A T4 has 14.6 GB, of which CUDA leaves 14.0; Colab's computer 12.7.
MACHINES: tuple[tuple[str, str, float, float | None], ...] = (
    ("GPU of 8 GB", "cuda", 8, None),
    ("12 GB", "cuda", 12, None),
    ("Colab's T4", "cuda", 14.6, 12.7),
    ("16 GB", "cuda", 16, None),
    ("24 GB", "cuda", 24, None),
    ("Mac of 16 GB", "mlx", 16, None),
    ("24 GB", "mlx", 24, None),
)


def plan(model: str, backend: str, size: float, host: float | None) -> Plan:
    """Return the plan with the defaults of `lite-dil plan`."""
    config = build({"model": model, "load_in_4bit": True, "backend": backend}, {})
    return make(config, set(), size, host=host)


def main() -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        plans = [plan(folder, backend, size, host) for _, backend, size, host in MACHINES]
    rooms = [plan.rooms[0] for plan in plans]
    rows = {
        "memory": [name for name, *_ in MACHINES],
        "a pair of 1,024 tokens (prompt plus answer) needs": [f"{p.estimate.total / 2**30:.1f} GB" for p in plans],
        "pairs of 1,024 tokens in one pass, at most": [str(room.examples) for room in rooms],
        "with `--auto`": [str(room.examples_auto) for room in rooms],
        "the longest pair, `--max-length`, with `--auto`": [f"{room.longest_auto:,}" for room in rooms],
    }
    lines = [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()]
    print("\n".join([lines[0], "|" + "---|" * (len(MACHINES) + 1), *lines[1:]]))


if __name__ == "__main__":
    main()
