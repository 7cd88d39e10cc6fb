"""scripts/gpu_day.py: whether training and generation on this device come to the right numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gpu_day_attention as attention
import gpu_day_training as training
import numpy as np
from benchmark_cases import EOS, read_config
from gpu_day_models import STOCK, Measured, Place
from gpu_day_record import Check, Finding, at_most, same

from lite_dil.backends import registry
from lite_dil.backends.probes import tolerance
from lite_dil.backends.types import Sampling

ROOM = 2.0  # two ways of rounding are equally far from float32, but for chance


def packed_is_plain(place: Place, **quantised: Any) -> list[Finding]:
    """Compare the packed layout of fused layers with the plain one of stock layers, both against the latter in float32."""
    exact = place.measured(**STOCK, **quantised)
    stock = place.measured(dtype=place.dtype, **STOCK, **quantised)
    packed = place.measured(dtype=place.dtype, layout="packed", gradient_checkpointing="off", **quantised)
    return as_near("packed", packed, "the plain layout", stock, exact)


def computed_again(place: Place, mode: str) -> list[Finding]:
    """Compare checkpointing with none."""
    exact = place.measured(**STOCK)
    off = place.measured(dtype=place.dtype, layout="packed", gradient_checkpointing="off")
    again = place.measured(dtype=place.dtype, layout="packed", gradient_checkpointing=mode)
    return as_near(mode, again, "without", off, exact)


def as_near(name: str, one: Measured, other_name: str, other: Measured, exact: Measured) -> list[Finding]:
    """Expect `one` no farther from float32 than `other` is, in log-probs and gradients, but for chance."""

    def logps(found: Measured) -> float:
        return float(np.sqrt(np.mean((found.logps - exact.logps) ** 2)))

    def gradient(found: Measured) -> float:
        of = exact.vector()
        return float(np.linalg.norm(found.vector() - of) / np.linalg.norm(of))

    why = f"{ROOM:g} x what {other_name} is from float32"
    return [
        at_most(f"log-probs of {name}, from float32", logps(one), ROOM * logps(other), why, " nats"),
        at_most(f"gradients of {name}, from float32", gradient(one), ROOM * gradient(other), why),
    ]


def offload(place: Place, **option: bool) -> list[Finding]:
    """Expect what is kept in the computer's memory to come back as it was."""
    here = {"dtype": place.dtype, "layout": "packed", "gradient_checkpointing": "full"}
    one, other = place.measured(**here), place.measured(**here, **option)
    return [
        same("log-probs", bool((one.logps == other.logps).all()), float(np.abs(one.logps - other.logps).max())),
        same("gradients", bool((one.vector() == other.vector()).all()), float(np.abs(one.vector() - other.vector()).max())),
    ]


def fresh_adapter(place: Place) -> list[Finding]:
    """Expect the log-ratio of a fresh adapter to be 0, and its gradient not to be, on the large model."""
    backend = place.load(model=place.large, load_in_4bit=True, dtype=place.dtype)
    result = place.step(backend, place.pairs(), 0.0)
    far = float(np.abs(result.policy - result.reference).max())
    return [
        at_most("largest log-ratio", far, 0.0, "the policy is the reference yet", " nats"),
        Finding("norm of the gradient", f"{result.grad_norm:.3g}", "above 0", 0 < result.grad_norm < np.inf),
    ]


def nf4(place: Place) -> list[Finding]:
    """Compare bitsandbytes' dequantisation with NF4 by its definition, in numpy, and the quantising with its own bound."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    rows, columns = (256, 512) if place.tiny else (4096, 4096)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    packed, state = quantize_4bit(weight.to(place.device), quant_type="nf4", compress_statistics=True)
    here = dequantize_4bit(packed, state).float().cpu().numpy().ravel()
    code, scales = state.code.cpu().numpy(), state.state2.code.cpu().numpy()[state.absmax.cpu().numpy()]
    of = np.repeat(state.state2.absmax.cpu().numpy(), state.state2.blocksize)[: len(scales)]
    largest = np.repeat(scales * of + np.float32(state.offset.cpu()), state.blocksize)
    byte = packed.cpu().numpy().ravel()
    book = code[np.stack([byte >> 4, byte & 15], 1).ravel()] * largest
    block = np.abs(weight.numpy().reshape(-1, state.blocksize)).max(1).repeat(state.blocksize)
    gap = float((np.abs(here - weight.numpy().ravel()) / block).max())
    relative = float((np.abs(here - book) / np.maximum(np.abs(book), 1e-30)).max())
    findings = [
        at_most("dequantised, from the definition in numpy", relative, 2**-21, "a few roundings of float32"),
        at_most("quantising error by the block's largest", gap, 0.17, "half of NF4's largest gap is 0.152, and 8-bit scales"),
    ]
    if place.device == "cuda":
        state.to("cpu")
        cpu = dequantize_4bit(packed.cpu(), state).float().numpy().ravel()
        far = float((np.abs(here - cpu) / np.maximum(np.abs(cpu), 1e-30)).max())
        findings.append(at_most("dequantised, from the CPU's", far, 2**-21, "a few roundings of float32"))
    return findings


def generation(place: Place) -> list[Finding]:
    """Compare answers in batches, streamed, and drawn with seeds, and greedy ones with the logits of a plain forward pass."""
    backend = generator(place, "float32")
    prompts = [list(pair.prompt) for pair in place.pairs(3)]
    count = 8 if place.tiny else 32
    greedy = [answer.ids for answer in backend.generate(prompts, count, [EOS])]
    drawn = [answer.ids for answer in backend.generate(prompts, count, [EOS], seeds=[1, 2, 3])]
    again = [answer.ids for answer in backend.generate(prompts, count, [EOS], seeds=[1, 2, 3])]
    likeliest = backend.generate(prompts, count, [EOS], seeds=[1, 2, 3], sampling=Sampling(temperature=0.0))
    behind, _ = chosen(backend, prompts, greedy)
    return [
        equal("greedy, streamed", greedy, [streamed(backend, prompt, count) for prompt in prompts]),
        equal("seeded, drawn again", drawn, again),
        equal(
            "seeded, streamed", drawn, [streamed(backend, p, count, seed) for p, seed in zip(prompts, (1, 2, 3), strict=True)]
        ),
        equal("seeded at temperature 0, greedy", [answer.ids for answer in likeliest], greedy),
        Finding("seeds draw other answers", "no" if drawn == greedy else "yes", "yes", drawn != greedy),
        at_most("greedy, behind a forward pass's largest logit", behind, 1e-4, "float32; a tie may fall either way", " nats"),
    ]


def generation_in_4_bits(place: Place) -> list[Finding]:
    """Compare greedy answers of 4 bits with the logits of a plain forward pass, as near as 16 bits allow."""
    backend = generator(place, place.dtype, load_in_4bit=True)
    prompts = [list(pair.prompt) for pair in place.pairs(3)]
    greedy = [answer.ids for answer in backend.generate(prompts, 8 if place.tiny else 32, [EOS])]
    behind, share = chosen(backend, prompts, greedy)
    limit = tolerance(backend.dtype_name)
    said = f"greedy, behind a forward pass's largest logit ({100 * share:.0f} % of the tokens are the largest)"
    return [at_most(said, behind, limit, "what two ways may be apart in backends/probes.py", " nats")]


def generator(place: Place, dtype: str, **options: Any) -> Any:
    """Load the small model with the trained adapter for inference."""
    place.free()
    config = place.config(dtype=dtype, init_adapter=place.adapter, reference="base", **options)
    return registry.load(place.device, config, config.model, config, None)


def streamed(backend: Any, prompt: Sequence[int], count: int, seed: int | None = None) -> list[int]:
    """Return a streamed answer without its end token."""
    return [token for token in backend.stream(prompt, count, [EOS], seed) if token != EOS]


def chosen(backend: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Return how far the answers' tokens are behind the largest logits at most, and the share that is the largest."""
    import torch

    gaps = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer]], device=backend.base.device)
        with torch.no_grad():
            logits = backend.base(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        gaps.append((logits.amax(-1) - logits.gather(-1, ids[0, len(prompt) :, None])[:, 0]).cpu().numpy())
    every = np.concatenate(gaps)
    return float(every.max()), float((every == 0).mean())


def equal(what: str, one: list[list[int]], other: list[list[int]]) -> Finding:
    """Expect the same tokens."""
    different = sum(a != b for a, b in zip(one, other, strict=True))
    tokens = sum(map(len, one))
    return Finding(
        what, f"{different} of {len(one)} answers differ ({tokens} tokens)", "none differ", not different and tokens > 0
    )


def head(place: Place) -> list[Finding]:
    """Compare the 8-bit head's log-probs with those of the whole head: what 8 bits cost is bounded by their steps."""
    whole = place.measured(**STOCK)
    packed = place.measured(**STOCK, head_bits=8)
    far = float(np.sqrt(np.mean((packed.logps - whole.logps) ** 2)))
    width = read_config(place.small)["hidden_size"]
    # Weights of deviation 0.02 in blocks of 64 have a largest one of about 0.05, and steps of at most 0.007 of it near it.
    limit = 0.05 * 0.007 * np.sqrt(width) * np.sqrt(2)
    return [at_most("log-probs with an 8-bit head", far, limit, "the type's largest step, on states of size 1", " nats")]


SHIPPED, OTHERS = attention.checks()
CHECKS = [
    Check("NF4", nf4, 5),
    *SHIPPED[:3],
    Check("packed = plain, 16 bits", packed_is_plain, 30),
    Check("packed = plain, NF4", lambda place: packed_is_plain(place, load_in_4bit=True), 30),
    Check("checkpointing selective", lambda place: computed_again(place, "selective"), 15),
    Check("checkpointing full", lambda place: computed_again(place, "full"), 15),
    Check("--offload-activations", lambda place: offload(place, offload_activations=True), 15, cuda=True),
    Check("--offload-embeddings", lambda place: offload(place, offload_embeddings=True), 15, cuda=True),
    Check("8-bit AdamW", training.adamw_8bit, 5),
    Check("resumed, NF4", training.resumed, 20),
    Check("fp16, overflow", training.overflow, 20, cuda=True),
    Check("generation", generation, 20),
    Check("generation, NF4", generation_in_4_bits, 15),
    Check("8-bit head", head, 15),
    Check("fresh adapter, NF4", fresh_adapter, 40),
    *SHIPPED[3:],
    *OTHERS,
]
