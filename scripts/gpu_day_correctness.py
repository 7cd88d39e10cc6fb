"""scripts/gpu_day.py: whether training and generation on this device come to the right numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import gpu_day_attention as attention
import gpu_day_training as training
import numpy as np
from benchmark_cases import EOS, read_config
from gpu_day_costs import COMPILE, LOAD, MAKE, START
from gpu_day_models import STOCK, Measured, Place
from gpu_day_record import Check, Finding, at_most, same

from lite_dil.backends import registry
from lite_dil.backends.probes import tolerance
from lite_dil.backends.types import Sampling

ROOM = 2.0  # two ways of rounding are equally far from float32, but for chance
# What neither may be: a toy in 16 bits is 0.006 of its gradients from float32, one in NF4 0.04.
FAR, FAR_GRADIENT = 0.3, 0.2


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
    near, nearby = min(FAR, ROOM * logps(other)), min(FAR_GRADIENT, ROOM * gradient(other))
    return [
        at_most(f"log-probs of {name}, from float32", logps(one), near, why, " nats", some=True),
        at_most(f"gradients of {name}, from float32", gradient(one), nearby, why, some=True),
    ]


def offload(place: Place, **option: bool) -> list[Finding]:
    """Expect offloaded tensors to come back bit-equal."""
    here = {"dtype": place.dtype, "layout": "packed", "gradient_checkpointing": "full"}
    one, again, other = place.measured(**here), place.measured(**here, seed=1), place.measured(**here, **option)
    findings = []
    # Without the first two a difference of the others might be one that every two runs on this device have.
    for name, found in (("without it, twice", again), ("with it", other)):
        for what, left, right in (("log-probs", one.logps, found.logps), ("gradients", one.vector(), found.vector())):
            findings.append(same(f"{what}, {name}", np.array_equal(left, right), float(np.abs(left - right).max())))
    return findings


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
    half = getattr(torch, place.dtype)
    state.dtype = half  # what it comes to; the packed weights stay
    rounded = dequantize_4bit(packed, state).float().cpu().numpy().ravel()
    far = float((np.abs(rounded - here) / np.maximum(np.abs(here), 1e-30)).max())
    findings.append(at_most("dequantised to 16 bits, from that", far, torch.finfo(half).eps / 2, "one rounding"))
    state.dtype = torch.float32
    if place.device == "cuda":
        state.to("cpu")
        cpu = dequantize_4bit(packed.cpu(), state).float().numpy().ravel()
        far = float((np.abs(here - cpu) / np.maximum(np.abs(cpu), 1e-30)).max())
        findings.append(at_most("dequantised, from the CPU's", far, 2**-21, "a few roundings of float32"))
    return findings


def generation(place: Place) -> Iterator[Finding]:
    """Compare answers in batches, streamed, and drawn with seeds, and greedy ones with the logits of a plain forward pass."""
    backend = generator(place, "float32")
    prompts, seeds = [list(pair.prompt) for pair in place.pairs(6)], list(range(1, 7))
    count = 8 if place.tiny else 32

    def answers(**options: Any) -> list[list[int]]:
        return [answer.ids for answer in backend.generate(prompts, count, [EOS], **options)]

    greedy = answers()
    behind, _ = chosen(backend, prompts, greedy)
    why = "float32; a tie may fall either way"
    yield at_most("greedy, behind a forward pass's largest logit", behind, 1e-4, why, " nats")
    yield equal("greedy, streamed", greedy, [streamed(backend, prompt, count) for prompt in prompts])
    drawn = answers(seeds=seeds)
    yield equal("seeded, drawn again", drawn, answers(seeds=seeds))
    # By arithmetic one answer in a hundred: a number within 1e-8 of the border of two of 32,768 tokens, in one of 32 draws.
    one_by_one = [streamed(backend, p, count, seed) for p, seed in zip(prompts, seeds, strict=True)]
    yield equal("seeded, streamed", drawn, one_by_one, allowed=0 if place.tiny else 1)
    yield equal("seeded at temperature 0, greedy", answers(seeds=seeds, sampling=Sampling(temperature=0.0)), greedy)
    different = sum(a != b for a, b in zip(drawn, greedy, strict=True))
    yield Finding(
        "seeds draw others than greedy", f"{different} of {len(drawn)}", "more than half", different > len(drawn) / 2
    )


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


def equal(what: str, one: list[list[int]], other: list[list[int]], allowed: int = 0) -> Finding:
    """Expect the same tokens, in all answers but `allowed`."""
    different = sum(a != b for a, b in zip(one, other, strict=True))
    tokens = sum(map(len, one))
    expected = f"{f'at most {allowed} differs' if allowed else 'none differ'}, some tokens"
    text = f"{different} of {len(one)} answers differ ({tokens} tokens)"
    return Finding(what, text, expected, different <= allowed and tokens > 0)


def head(place: Place) -> list[Finding]:
    """Compare the 8-bit head's log-probs with those of the whole head: what 8 bits cost is bounded by their steps."""
    whole = place.measured(**STOCK)
    packed = place.measured(**STOCK, head_bits=8)
    far = float(np.sqrt(np.mean((packed.logps - whole.logps) ** 2)))
    width = read_config(place.small)["hidden_size"]
    # Weights of deviation 0.02 in blocks of 64 have a largest one of about 0.05, and steps of at most 0.007 of it near it.
    limit = 0.05 * 0.007 * np.sqrt(width) * np.sqrt(2)
    return [
        at_most("log-probs with an 8-bit head", far, limit, "the type's largest step, on states of size 1", " nats", some=True)
    ]


# A model of 0.2e9 parameters, read or made in a second: each load of it compiles its attention, or finds that compiled.
ONE, TWO, THREE = START + COMPILE + 5, START + COMPILE + 10, START + COMPILE + 15
CHECKS = [
    Check("the models", Place.make_all, START + MAKE + 15, gib=16.0, first=True, there=Place.has_all),
    Check("NF4", nf4, START + 3, models=False),
    *attention.checks("", cuda=False),
    Check("packed = plain, 16 bits", packed_is_plain, THREE),
    Check("packed = plain, NF4", partial(packed_is_plain, load_in_4bit=True), THREE),
    Check("checkpointing selective", partial(computed_again, mode="selective"), THREE),
    Check("checkpointing full", partial(computed_again, mode="full"), THREE),
    Check("--offload-activations", partial(offload, offload_activations=True), THREE, cuda=True),
    Check("--offload-embeddings", partial(offload, offload_embeddings=True), THREE, cuda=True),
    Check("8-bit AdamW", training.adamw_8bit, START + 5, models=False),
    Check("resumed, NF4", training.resumed, TWO),
    Check("fp16, overflow", training.overflow, TWO, cuda=True),
    Check("generation", generation, START + 25),  # 32 tokens, 21 times over, of 4 layers: launches
    Check("generation, NF4", generation_in_4_bits, START + 10),
    Check("8-bit head", head, TWO),
    Check("fresh adapter, NF4", fresh_adapter, START + LOAD + COMPILE + 5, gib=20.0),
    *attention.checks("float16", cuda=True),
]
