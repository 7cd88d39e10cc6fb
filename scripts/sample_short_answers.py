"""Make lite_dil/data/short_answers/{train,test}.jsonl: the model's own answers become the rejected side.

    python scripts/sample_short_answers.py questions.jsonl lite_dil/data/short_answers

questions.jsonl has {"prompt", "chosen"} lines of plain text. The rejected answers are sampled from SmolLM2-135M-Instruct at
temperature 1 without truncation, that is from pi_ref itself, as DIL's derivation requires. An answer that has not ended after
128 tokens is sampled again, up to 6 times; a question whose answers never end is left out.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lite_dil.models.find import EMBEDDED_MODEL, load_tokenizer, resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--test", type=int, default=60, help="rows of the test split (default: 60)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--tries", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rows = [json.loads(line) for line in args.questions.read_text(encoding="utf-8").splitlines()]
    random.Random(args.seed).shuffle(rows)
    torch.manual_seed(args.seed)
    path = resolve_model(EMBEDDED_MODEL, print)
    tokenizer = load_tokenizer(path)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    rejected: dict[int, str] = {}
    for attempt in range(args.tries):
        waiting = [i for i in range(len(rows)) if i not in rejected]
        for start in range(0, len(waiting), 48):
            indices = waiting[start : start + 48]
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": rows[i]["prompt"]}], tokenize=False, add_generation_prompt=True
                )
                for i in indices
            ]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            out = model.generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.max_new_tokens
            )
            for i, ids in zip(indices, out[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
                if tokenizer.eos_token_id in ids:
                    text = tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id)], skip_special_tokens=True).strip()
                    if text and text != rows[i]["chosen"]:
                        rejected[i] = text
        print(f"try {attempt + 1}: {len(rejected)} of {len(rows)} answers ended", flush=True)

    pairs = [
        {
            "prompt": [{"role": "user", "content": rows[i]["prompt"]}],
            "chosen": [{"role": "assistant", "content": rows[i]["chosen"]}],
            "rejected": [{"role": "assistant", "content": rejected[i]}],
        }
        for i in sorted(rejected)
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", pairs[: args.test]), ("train", pairs[args.test :])):
        text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in part)
        (args.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(part)} pairs")


if __name__ == "__main__":
    main()
