"""Compare learning rates for each objective by held-out figures; the source of the default rates (docs/LOG.md).

    python scripts/sweep.py --losses lsif,ukl,bce,dpo --rates 1e-6,1e-5,3e-5,1e-4,3e-4 --output runs/sweep -- --max-steps 14

Flags after -- go to every run. A run that is already in the output folder is not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lite_dil.cli.main import main as lite_dil

COLUMNS = ("eval_loss", "eval_rewards/accuracies", "eval_log_ratio/chosen", "eval_log_ratio/rejected", "eval_logps/chosen")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", default="lsif,ukl,bce,dpo")
    parser.add_argument("--rates", default="1e-6,1e-5,3e-5,1e-4,3e-4")
    parser.add_argument("--output", type=Path, default=Path("runs/sweep"))
    parser.add_argument("train_flags", nargs="*")
    args = parser.parse_args()

    rows = []
    for loss in args.losses.split(","):
        for rate in args.rates.split(","):
            folder = args.output / f"{loss}-{rate}"
            if not (folder / "adapter").exists():
                flags = ["--loss", loss, "--learning-rate", rate, "--output-dir", str(folder), "--resume", "auto"]
                if code := lite_dil(["train", *flags, *args.train_flags]):
                    return code
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            held_out = next(line for line in reversed(lines) if "eval_loss" in line)
            rows.append(f"| {loss} | {rate} | " + " | ".join(f"{held_out[column]:.4f}" for column in COLUMNS) + " |")
    print("| loss | learning rate | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
