"""All cases of the rehearsal by name, with their settings. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from rehearse_cuda.stand_in import USABLE

PARTS = ("train", "attention", "out-of-memory", "memory", "fallbacks")


@dataclass(frozen=True)
class Case:
    """One run in a separate process on a stand-in card.

    Attributes:
        card: its compute capability, 86 for sm_86.
        gib: its memory.
        lag: the launches that the card may be behind.
        settings: the part's settings, as plain values for JSON.
    """

    part: str
    name: str
    card: int = 86
    gib: float = 24.0
    lag: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The part, card and name, which --only searches."""
        return f"{self.part} sm_{self.card} {self.name}"

    @property
    def key(self) -> str:
        """A unique name, also used for files."""
        kept = "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in self.name)
        return f"{self.part}.sm_{self.card}.{kept}"


def cases(parts: tuple[str, ...] = PARTS, everything: bool = False) -> list[Case]:
    """Return the cases of these parts; `everything` includes the full attention table instead of only models' shapes."""
    found: dict[str, list[Case]] = {
        "train": list(_train()),
        "attention": list(_table() if everything else _shipped()),
        "out-of-memory": list(_out_of_memory()),
        "memory": list(_memory()),
        "fallbacks": list(_fallbacks()),
    }
    return [case for part in parts for case in found[part]]


# --- train: options as `TrainConfig` names them

FOUR_BITS = {"load_in_4bit": True}
TRAININGS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("fp16 with loss scale", 75, {"dtype": "float16"}),
    ("bf16", 86, {"dtype": "bfloat16"}),
    ("4-bit", 86, FOUR_BITS),
    ("4-bit, fp16, 8-bit head", 75, FOUR_BITS | {"head_bits": 8, "dtype": "float16"}),
    ("4-bit, 4-bit head, table away", 86, FOUR_BITS | {"head_bits": 4, "offload_embeddings": True}),
    ("full checkpointing, activations away", 89, {"gradient_checkpointing": "full", "offload_activations": True}),
    ("selective checkpointing", 120, {"gradient_checkpointing": "selective"}),
    ("dropout, stock layers, two passes", 86, {"lora_dropout": 0.1, "fused_layers": False, "passes": 2}),
    ("initial adapter as reference", 86, {"init_adapter": True, "reference": "initial-adapter"}),
    ("second adapter with a head", 90, {"head": True}),
)


def _train() -> Iterator[Case]:
    for layout, (name, card, options) in product(("plain", "packed"), TRAININGS):
        yield Case("train", f"{layout}, {name}", card, settings={**options, "layout": layout})
    yield Case("train", "the command, stopped and resumed", settings={"command": True})
    yield Case("train", "a policy trained and closed, twice", settings={"close": True})


# --- attention

MODELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Llama 3, Mistral, Qwen 3", {"width": 128, "heads": 32, "kv_heads": 8}),
    ("SmolLM2, Llama 3.2 1B, Qwen 2.5 0.5B", {"width": 64, "heads": 9, "kv_heads": 3}),
    ("Phi-3 mini", {"width": 96, "heads": 32, "kv_heads": 32, "windows": [2047]}),
    ("Gemma 2", {"width": 256, "heads": 8, "kv_heads": 4, "windows": [4096], "cap": 50.0}),
    ("Gemma 2, full attention", {"width": 256, "heads": 8, "kv_heads": 4, "cap": 50.0}),
    ("Gemma 3", {"width": 256, "heads": 8, "kv_heads": 4, "windows": [1024]}),
    ("Gemma 4, full attention", {"width": 512, "heads": 8, "kv_heads": 1}),
)
HALF, BRAIN = "float16", "bfloat16"


def _attention(card: int, dtype: str, name: str, shape: Mapping[str, Any]) -> Case:
    short = {HALF: "fp16", BRAIN: "bf16"}[dtype]
    return Case("attention", f"{name}, {short}", card, settings={"dtype": dtype, **shape})


def _shipped() -> Iterator[Case]:
    """Yield the twelve combinations of width, window, cap and type of published models, each on a card."""
    models = dict(MODELS)
    for name in models:
        if models[name]["width"] != 512 and name != "Gemma 2, full attention":
            yield _attention(75, HALF, name, models[name])
    for card, name in zip((86, 89, 120, 86, 89, 90, 86), models, strict=True):
        yield _attention(card, BRAIN, name, models[name])


WIDTHS, CARDS = (64, 80, 96, 128, 192, 256, 512), (75, 80, 86, 89, 90, 120)


def _table() -> Iterator[Case]:
    """Yield every combination, with and without a window in one case: the same kernels compute both. bf16 is not on sm_75."""
    for card, width, cap, dtype in product(CARDS, WIDTHS, (None, 50.0), (HALF, BRAIN)):
        if card == 75 and dtype == BRAIN:
            continue
        shape = {"width": width, "heads": 8, "kv_heads": 2, "windows": [None, 256], "cap": cap}
        yield _attention(card, dtype, f"width {width}{', cap' if cap else ''}", shape)


# --- out of memory

CAPACITIES = 16


def _out_of_memory() -> Iterator[Case]:
    long = {"max_length": 512, "gradient_checkpointing": "off"}
    large = long | {"lora_r": 512}  # its gradients take more than the head did in forward; a small adapter's do not
    again = {"max_length": 512, "gradient_checkpointing": "full"}
    away = again | {"offload_activations": True, "batch_size": 40}  # in two chunks of pinned memory
    wide = {"max_length": 64, "lora_r": 512, "gradient_checkpointing": "full", "optim": "adamw"}
    for layout in ("plain", "packed"):
        for name, where, options in (
            ("forward and backward", "device", large),
            ("4-bit, computed again", "device", again | FOUR_BITS | {"head_bits": 8}),
            ("optimiser", "first step", wide),
            ("pinned memory", "pinned", away),
            ("cuBLAS' workspace", "product", long),
        ):
            yield Case("out-of-memory", f"{layout}, {name}", settings={**options, "layout": layout, "where": where})
    yield Case("out-of-memory", "packed, a kernel", settings={**long, "layout": "packed", "where": "launch"})


# --- memory: a pair of an 8B model, with the flags that `lite-dil plan` names

PAIRS = (
    ("6 GB", 86, 1024),
    ("8 GB", 86, 4096),
    ("12 GB", 89, 8192),
    ("T4", 75, 8192),
    ("16 GB", 89, 20000),
    ("24 GB", 89, 20000),
)


def _memory() -> Iterator[Case]:
    for name, card, length in PAIRS:
        settings = {"max_length": length, "memory": name}
        # As many launches as CUDA lets the host run ahead: memory that waits for the card is reused as late as on a real one.
        yield Case("memory", f"{name}, 2 x {length:,}", card, USABLE[name], 1024, settings)


# --- fallbacks


def _fallbacks() -> Iterator[Case]:
    yield Case("fallbacks", "no C compiler", settings={"without": "compiler"})
    yield Case("fallbacks", "no Triton", settings={"without": "triton"})
