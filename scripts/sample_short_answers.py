"""Make lite_dil/data/short_answers/{train,test}.jsonl: the model's own answers become the rejected side.

    python scripts/sample_short_answers.py questions.jsonl lite_dil/data/short_answers

questions.jsonl has {"prompt", "chosen"} lines of plain text. `lite-dil generate` samples the rejected answers from
SmolLM2-135M-Instruct at temperature 1 without truncation, that is from pi_ref itself, as DIL's derivation requires. The first
of several samples that ended by itself is taken; a question whose answers never end within 128 tokens is left out.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from lite_dil.cli.main import main as lite_dil
from lite_dil.models.find import EMBEDDED_MODEL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--test", type=int, default=60, help="rows of the test split (default: 60)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--tries", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rows = [json.loads(line) for line in args.questions.read_text(encoding="utf-8").splitlines()]
    random.Random(args.seed).shuffle(rows)  # noqa: S311 - an order of questions, not a secret
    with tempfile.TemporaryDirectory() as folder:
        asked, answers = Path(folder, "questions.jsonl"), Path(folder, "answers.jsonl")
        messages = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
        asked.write_text("".join(json.dumps(row) + "\n" for row in messages), encoding="utf-8")
        flags = ["--model", EMBEDDED_MODEL, "--temperature", "1", "--num-answers", str(args.tries), "--seed", str(args.seed)]
        flags += ["--max-new-tokens", str(args.max_new_tokens), "--output", str(answers)]
        if code := lite_dil(["generate", str(asked), *flags]):
            return code
        drawn = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]

    pairs = []
    for row, at in zip(rows, range(0, len(drawn), args.tries), strict=True):
        if rejected := first_whole(drawn[at : at + args.tries], row["chosen"]):
            chosen = [{"role": "assistant", "content": row["chosen"]}]
            pairs.append({"prompt": drawn[at]["prompt"], "chosen": chosen, "rejected": rejected})
    args.output.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", pairs[: args.test]), ("train", pairs[args.test :])):
        text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in part)
        (args.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(part)} pairs")
    return 0


def first_whole(drawn: list[dict[str, Any]], chosen: str) -> list[dict[str, str]] | None:
    """Return the first answer that ended by itself, says something, and is not the chosen one."""
    for row in drawn:
        text = row["completion"][0]["content"].strip()
        if row["finish_reason"] == "stop" and text and text != chosen:
            return [{"role": "assistant", "content": text}]
    return None


if __name__ == "__main__":
    raise SystemExit(main())
