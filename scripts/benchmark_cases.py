"""The cases of scripts/benchmark.py: lengths of pairs, random tokens of those lengths, and the operations they need."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.base.signs import CHOSEN, REJECTED
from lite_dil.data.encoder import Example

Lengths = tuple[int, int, int]  # tokens of the prompt, the chosen and the rejected response, including end tokens

EOS = 2
FIRST_ID = 3  # smaller ids are control tokens

# 64 pairs of Anthropic's HH helpful, in SmolLM2's tokens and chat template, drawn at random such that their means, spreads and
# padding are those of 2,000: on average 174 + 78 + 69 tokens (of the 2,000: 177 + 76 + 67), and a padded batch of 1, 4 or 8
# pairs with each prompt twice has 1.7, 2.9 or 3.5 times their tokens (1.7, 2.9, 3.5). The most typical eight come first.
HH: list[Lengths] = [
    *((37, 23, 35), (303, 92, 37), (257, 52, 16), (42, 108, 17), (419, 5, 6), (401, 80, 123), (40, 33, 14), (39, 150, 141)),
    *((36, 28, 6), (192, 194, 119), (162, 130, 22), (37, 136, 30), (471, 81, 120), (63, 29, 35), (106, 50, 9), (42, 256, 55)),
    *((201, 71, 92), (328, 13, 20), (326, 57, 231), (179, 73, 123), (46, 71, 23), (217, 120, 101), (117, 46, 91), (39, 38, 9)),
    *((40, 250, 253), (40, 55, 22), (277, 96, 73), (375, 17, 8), (213, 258, 61), (214, 51, 53), (39, 34, 33), (238, 22, 30)),
    *((39, 29, 31), (40, 13, 9), (377, 53, 21), (246, 93, 43), (37, 44, 54), (50, 24, 57), (375, 31, 11), (39, 27, 43)),
    *(
        (109, 51, 15),
        (258, 19, 259),
        (473, 183, 96),
        (340, 33, 33),
        (215, 111, 168),
        (42, 132, 58),
        (237, 88, 235),
        (109, 39, 62),
    ),
    *((217, 57, 42), (176, 32, 88), (41, 249, 23), (188, 19, 71), (44, 91, 68), (76, 59, 3), (67, 23, 32), (165, 33, 25)),
    *(
        (36, 122, 55),
        (209, 104, 210),
        (323, 62, 128),
        (742, 82, 282),
        (108, 6, 5),
        (40, 172, 153),
        (128, 15, 8),
        (66, 167, 28),
    ),
]
LONG: Lengths = (512, 64, 64)
SHORT: Lengths = (64, 128, 128)
CASES = {
    "hh": "HH helpful, real lengths",
    "long": "prompt 512, answers 64 + 64",
    "short": "prompt 64, answers 128 + 128",
    "mlx": "HH helpful lengths, tiny Llama, MLX",
}


@dataclass(frozen=True)
class Job:
    """One measurement in a fresh process: which contestant trains on what, and how."""

    case: str
    contestant: str
    device: str  # "cpu", "cuda" or "mlx"
    model: str  # a folder
    lengths: tuple[Lengths, ...]  # of all timed pairs, step by step
    batch: int
    bits: int = 16
    checkpointing: str = "off"  # "off", "selective" or "full"
    rounds: int = 1  # passes over the timed pairs
    warmup: str = "small"  # "small": one step of tiny pairs; "full": the timed steps, once
    rank: int = 16
    loss: str = "lsif"
    memory_limit: float = 0.0  # GB that CUDA's allocator may use; 0: all
    longest: bool = False  # search for the longest pair that fits instead
    longest_cap: int = 0  # upper end of that search
    head_bits: int | None = None

    @property
    def group(self) -> tuple[str, int, int, float]:
        """The key of measurements that are compared with each other."""
        return self.case, self.batch, self.bits, self.memory_limit

    @property
    def key(self) -> str:
        """The key shared by repeats, as JSON text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def read(cls, text: str) -> Job:
        """Undo `key`."""
        fields = json.loads(text)
        return cls(**{**fields, "lengths": tuple(map(tuple, fields["lengths"]))})


def lengths_of(case: str, pairs: int, data: Sequence[Lengths] = ()) -> tuple[Lengths, ...]:
    """Return the lengths of the first `pairs` pairs of a case."""
    if case in ("hh", "mlx"):
        source = list(data) or HH
        return tuple(source[i % len(source)] for i in range(pairs))
    return ({"long": LONG, "short": SHORT}[case],) * pairs


def lengths_in(file: str, model: str, max_length: int = 1024) -> list[Lengths]:
    """Return the lengths of a file's pairs, tokenised and cut as in training, in an order drawn from a fixed seed."""
    from lite_dil.config.train_config import TrainConfig
    from lite_dil.data.dataset import load
    from lite_dil.data.encoder import Encoder
    from lite_dil.models.find import load_tokenizer

    examples = load(file, "train", Encoder(load_tokenizer(model)), TrainConfig(max_length=max_length)).examples
    order = np.random.default_rng(0).permutation(len(examples))
    return [(len(e.prompt), len(e.responses[0]), len(e.responses[1])) for e in (examples[i] for i in order)]


def steps_of(job: Job, vocabulary: int) -> tuple[list[list[Example]], int]:
    """Return the examples of every step, and how many of the steps are warm-up."""
    timed = [list(job.lengths[i : i + job.batch]) for i in range(0, len(job.lengths), job.batch)]
    warmup = timed if job.warmup == "full" else [[(8, 8, 8)] * job.batch]
    draw = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return [int(i) for i in draw.integers(FIRST_ID, vocabulary, count)]

    def example(lengths: Lengths) -> Example:
        prompt, *answers = lengths
        return Example(tuple(ids(prompt)), tuple((*ids(n - 1), EOS) for n in answers), (CHOSEN, REJECTED))

    once = [[example(lengths) for lengths in step] for step in timed]
    first = once if job.warmup == "full" else [[example(lengths) for lengths in step] for step in warmup]
    return [*first, *once * job.rounds], len(first)


def operations(config: dict[str, Any], pairs: Sequence[Lengths], rank: int, with_reference: bool) -> float:
    """Return the floating-point operations that an average pair needs in any implementation.

    P prompt tokens are computed once for both responses (c and r tokens), the last token of each response not at all:
    T = P + c + r - 2. In the last layer only the c + r - 1 tokens whose output predicts one need more than keys and values.

    forward    2 in out a token and linear layer, LoRA 2 rank (in + out) more; 4 heads width for each key a query attends to;
               head 2 hidden vocabulary for each of the c + r predicted tokens
    backward   of the frozen layers and the head only with respect to activations: the same again, less the first layer's
               query, key and value, below which nothing is trained; LoRA twice its forward; attention twice its forward
    reference  (first epoch) one forward without LoRA

    Not counted: recomputation by checkpointing, padding, a repeated prompt, norms and the optimiser.
    """
    hidden, inner, layers = (config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    keys = (config.get("num_key_value_heads") or heads) * width
    queries = heads * width
    into = [(hidden, queries), (hidden, keys), (hidden, keys)]
    shapes = [*into, (queries, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    total = 0.0
    for prompt, *answers in pairs:
        read = sum(answers) - 1
        tokens = prompt + sum(answers) - 2

        def linear(cost: Any, tokens: int = tokens, read: int = read) -> float:
            every, kept = sum(cost(*shape) for shape in shapes), 2 * cost(hidden, keys)
            return 2.0 * ((layers - 1) * tokens * every + tokens * kept + read * (every - kept))

        base, lora = linear(lambda a, b: a * b), linear(lambda a, b: rank * (a + b))
        seen = prompt * (prompt + 1) / 2 + sum((n - 1) * prompt + n * (n - 1) / 2 for n in answers)
        attention = 4.0 * queries * (layers * seen - prompt * (prompt - 1) / 2)
        head = 2.0 * hidden * config["vocab_size"] * sum(answers)
        untrained = 2.0 * tokens * sum(a * b for a, b in into)
        total += 2 * base - untrained + 3 * lora + 3 * attention + 2 * head
        total += (base + attention + head) if with_reference else 0.0
    return total / len(pairs)


def read_config(folder: str) -> dict[str, Any]:
    """Return a model folder's config.json."""
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
