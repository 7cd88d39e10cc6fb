"""A tiny model with a tokenizer, and rows to train it on, made without a download."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import numpy as np

from lite_dil.base.files import make_folder, write
from lite_dil.doctor import tiny_model
from lite_dil.models import tensors

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_WORDS = ("the", "capital", "of", "France", "is", "Paris", "what", "how", "do", "you", "make", "good", "bread", "and", "tea")


def make_model(folder: Path, seed: int = 0, hidden: int = 128) -> Path:
    """Write a Llama of two layers with random weights and a tokenizer of bytes, and return its folder.

    `hidden` is its width, a multiple of 64.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({name: number for number, name in enumerate([*_SPECIAL, *alphabet])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=_SPECIAL[0], eos_token=_SPECIAL[2], pad_token=_SPECIAL[2]
    )
    tokenizer.chat_template = _TEMPLATE
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": 1, "head_dim": 64}
    config = tiny_model.CONFIG | {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "vocab_size": len(tokenizer),
        **heads,
    }
    config |= {"bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 4096}
    draw = np.random.default_rng(seed)
    values = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else draw.normal(0, 0.15, shape).astype(np.float32)
        for shard in tiny_model.shapes(config)
        for name, shape in shard.items()
    }
    make_folder(folder)
    tokenizer.save_pretrained(folder)
    planned = [tensors.Planned(name, "F32", value.shape, partial(list, [value])) for name, value in values.items()]
    tensors.write(folder / "model.safetensors", planned, "pt")
    write(folder / "config.json", json.dumps(config, indent=1))
    return folder


def write_rows(path: Path, rows: int, seed: int = 0, words: int = 9, pairs: bool = True) -> Path:
    """Write chat pairs, or demonstrations, of up to `words` words as JSON Lines, and return the path."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            asked, good, bad = (" ".join(draw.choices(_WORDS, k=draw.randint(2, words))) for _ in range(3))
            answers = {"chosen": f"{good} yes", "rejected": f"{bad} no"} if pairs else {"completion": f"{good} yes"}
            sides = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
            file.write(json.dumps({"prompt": [{"role": "user", "content": f"{asked} {number}"}], **sides}) + "\n")
    return path
