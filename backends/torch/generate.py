"""Generation on torch: left-padded batches, and sampling from exactly the model's distribution."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor

from lite_dil.backends.probes import tolerance
from lite_dil.backends.torch import out_of_memory
from lite_dil.backends.types import Done, Generated, Sampling, never

First = tuple[Tensor, DynamicCache, dict[str, int]]


def generate(
    base: Any,
    device: torch.device,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    seeds: Sequence[int] | None,
    sampling: Sampling,
    stop: Callable[[], bool] = never,
    share: bool = True,
    done: Done | None = None,
) -> list[Generated]:
    """Continue the prompts in one batch of a transformers model; see `lite_dil.backends.protocol.Backend.generate`.

    Without padding, for a model that reads it, only prompts of equal lengths go in one batch.

    Args:
        share: compute a repeated prompt only once.
    """
    lengths = list(map(len, prompts))
    if len(set(lengths)) > 1 and not ignores_padding(base, device):
        found = dict[int, Generated]()
        for length in set(lengths):  # without padding
            at = [i for i, other in enumerate(lengths) if other == length]
            some = [prompts[i] for i in at], max_new_tokens, end_ids, seeds and [seeds[i] for i in at]
            found |= zip(at, generate(base, device, *some, sampling, stop, share, done), strict=True)
        return [found[i] for i in range(len(prompts))]
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    rows = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)
    longest = max(map(len, place))
    ids = torch.tensor([[end_ids[0]] * (longest - len(prompt)) + list(prompt) for prompt in place], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in place], device=device)
    draws = _draws(seeds, sampling)
    if share and (first := _first(base, ids, mask)) is not None:
        tokens = _by_step(base, first, mask, rows, max_new_tokens, end_ids, draws, stop, done)
        return [Generated.of(each, end_ids) for each in tokens]

    def stopping(sequences: Tensor, _: Any) -> Tensor:
        ended = [stop() or (done is not None and done(row)) for row in sequences[:, longest:].tolist()]
        return torch.tensor(ended, device=device)

    with _plain_settings(base):
        out = base.generate(
            input_ids=ids[rows],
            attention_mask=mask[rows],
            max_new_tokens=max_new_tokens,
            do_sample=False,  # `Draws` leaves only one token
            use_cache=True,  # an empty GenerationConfig may not set it
            logits_processor=None if draws is None else [draws],
            stopping_criteria=[stopping],
            eos_token_id=list(end_ids),
            pad_token_id=end_ids[0],
        )
    found_rows = [Generated.of(row, end_ids) for row in out[:, longest:].tolist()]
    return [_up_to(row, done) for row in found_rows] if done else found_rows


def _up_to(answer: Generated, done: Done) -> Generated:
    """Cut what was added after a response was done: padding, which is an end token, not the response's own."""
    at = next((at for at in range(1, len(answer.ids) + 1) if done(answer.ids[:at])), None)
    return answer if at is None else Generated(answer.ids[:at], None)


@torch.no_grad()
def _first(base: Any, ids: Tensor, mask: Tensor) -> First | None:
    """Compute each prompt once: return the logits after it, (prompts, vocabulary), the cache of all its tokens, and the
    options with which the model computes the logits of the last token alone.

    None if the cache does not hold all of the model's state by rows, or the model does not take positions.
    """
    wanted = inspect.signature(base.forward).parameters
    if not {"past_key_values", "position_ids"} <= wanted.keys():
        return None
    last = {"logits_to_keep": 1} if "logits_to_keep" in wanted else {}
    out = _pass(base, ids, mask, None, last)
    cache = getattr(out, "past_key_values", None)
    # A model's own cache classes may hold more than rows that can be repeated and left out.
    if type(cache) is not DynamicCache or any(type(layer).__module__ != DynamicCache.__module__ for layer in cache.layers):
        return None
    # RecurrentGemma keeps its recurrent states in its modules and leaves these layers empty.
    recurrent = all(cache.has_previous_state(i) for i, linear in enumerate(cache.is_linear) if linear)
    if not recurrent or not all(getattr(layer, "is_initialized", True) for layer in cache.layers):
        return None
    return out.logits[:, -1].float(), cache, last


@torch.no_grad()
def _by_step(
    base: Any,
    first: First,
    mask: Tensor,
    rows: Tensor,
    max_new_tokens: int,
    end_ids: Sequence[int],
    draws: Draws | None,
    stop: Callable[[], bool],
    done: Done | None,
) -> list[list[int]]:
    """Return the tokens that continue each row, up to its end; a row that has ended is not computed further.

    Args:
        rows: (rows,) the prompt of each row.
    """
    (logits, cache, last), mask = first, mask[rows]
    logits = logits[rows]
    cache.reorder_cache(cast(torch.LongTensor, rows))
    tokens: list[list[int]] = [[] for _ in rows]
    going = list(range(len(tokens)))
    ends = torch.tensor(list(end_ids), device=logits.device)
    for _ in range(max_new_tokens):
        if stop():
            break
        new = logits.argmax(-1) if draws is None else draws.take(logits, going)
        for row, token in zip(going, new.tolist(), strict=True):
            tokens[row].append(token)
        over = torch.isin(new, ends)
        if done is not None:
            over = over | torch.tensor([done(tokens[row]) for row in going], device=over.device)
        left = (~over).nonzero()[:, 0]
        if len(left) == 0 or len(tokens[going[int(left[0])]]) == max_new_tokens:
            break
        if len(left) < len(going):
            going = [going[at] for at in left.tolist()]
            cache.reorder_cache(cast(torch.LongTensor, left))
            mask, new = mask[left], new[left]
        mask = torch.cat([mask, mask.new_ones(len(going), 1)], dim=1)
        logits = _pass(base, new[:, None], mask, cache, last).logits[:, -1].float()
    return tokens


def _pass(base: Any, ids: Tensor, mask: Tensor, cache: DynamicCache | None, last: dict[str, int]) -> Any:
    """Compute the last tokens of rows that are padded on the left: `ids` are those not in the cache, `mask` covers all."""
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    padding = None if bool(mask.all()) else mask  # without one, attention needs no mask of its own
    return base(input_ids=ids, attention_mask=padding, position_ids=positions, past_key_values=cache, use_cache=True, **last)


# By base model, so that it is tested once.
_IGNORES: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def ignores_padding(base: Any, device: torch.device) -> bool:
    """Return whether a prompt is continued the same in a left-padded batch, which is tested on a few tokens.

    RecurrentGemma's convolution, for one, reads the padding. What the padding holds must change nothing, and the log-probs of
    the next token must be those of the prompt by itself, which shows wrong positions.
    """
    if base not in _IGNORES:
        draw = np.random.default_rng(0)
        tokens = base.config.get_text_config().vocab_size
        long, pads, short = (draw.integers(0, tokens, shape) for shape in ((1, 6), (2, 4), (1, 2)))
        rows = np.concatenate([long, np.concatenate([pads, short.repeat(2, 0)], axis=1)])
        mask = np.ones_like(rows)
        mask[1:, :4] = 0
        _, one, other = _next_logps(base, device, rows, mask)
        (alone,) = _next_logps(base, device, short, mask[:1, :2])
        limit = tolerance(str(base.dtype).removeprefix("torch."))
        # Only rounding of batched experts may differ between the two rows.
        _IGNORES[base] = bool(abs(one - other).max() < limit / 10 and abs(one - alone).max() < limit)
    return _IGNORES[base]


def _next_logps(base: Any, device: torch.device, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the log-probs of all tokens after each row, (rows, vocabulary)."""
    with _plain_settings(base):
        out = base.generate(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            max_new_tokens=1,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
    found: np.ndarray = out.logits[0].float().log_softmax(-1).cpu().numpy()
    return found


def stream(
    base: Any,
    device: torch.device,
    prompt: Sequence[int],
    max_new_tokens: int,
    end_ids: Sequence[int],
    seed: int | None,
    sampling: Sampling,
) -> Iterator[int]:
    """Continue one prompt with a transformers model; see `lite_dil.backends.protocol.Backend.stream`.

    Each token is one forward pass, inside one `next`.
    """
    draws = _draws(None if seed is None else [seed], sampling)
    past, new, cache = list(prompt), list(prompt), None
    for _ in range(max_new_tokens):
        ids = torch.tensor([new], device=device)
        scores, cache = out_of_memory.whole("the generation of an answer", device, partial(_forward, base, ids, cache))
        token = int((scores if draws is None else draws(ids, scores)).argmax(-1))
        yield token
        if token in end_ids:
            return
        past.append(token)
        new = past if cache is None else [token]  # a model with another kind of state recomputes everything


@torch.no_grad()
def _forward(base: Any, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Return the logits after the last of `ids`, (1, vocabulary) float32, and the model's own cache."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    out = base(input_ids=ids, past_key_values=cache, use_cache=True, **last)
    return out.logits[:, -1].float(), getattr(out, "past_key_values", None)


def _draws(seeds: Sequence[int] | None, sampling: Sampling) -> Draws | None:
    """Return the sampler of each row's tokens, or None for greedy decoding."""
    return None if seeds is None or sampling.temperature == 0 else Draws(seeds, sampling)


class Draws(LogitsProcessor):
    """Samples each row's next token from its logits, with one of the row's own random numbers per token.

    The numbers come from numpy, so torch's random state, which dropout uses, does not change.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        self.rows, self.sampling = [np.random.default_rng(seed) for seed in seeds], sampling

    def take(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the sampled token of some rows, (rows,), from their logits, (rows, vocabulary)."""
        numbers = torch.tensor([[self.rows[row].random()] for row in rows], dtype=torch.float64)
        return pick(logits, numbers.to(logits.device), self.sampling)[:, 0]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores`, (rows, vocabulary), as 0 for the sampled token and minus infinity for all others."""
        token = self.take(scores, range(len(self.rows)))
        return torch.full_like(scores, -torch.inf).scatter(-1, token[:, None], 0.0)


def pick(logits: Tensor, numbers: Tensor, sampling: Sampling) -> Tensor:
    """Return each row's token, (rows, 1), at which the cumulative probability passes its number from [0, 1).

    In float64: float32 would merge several rare tokens of a large vocabulary, all but one of which would never be sampled.
    """
    shares = (logits.double() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = shares.sort(dim=-1, descending=True, stable=True)
        kept = ordered.cumsum(-1) - ordered < sampling.top_p  # the tokens before it do not reach top_p yet
        shares = torch.zeros_like(shares).scatter(-1, order, ordered * kept)
    sums = shares.cumsum(-1)
    return torch.searchsorted(sums, numbers * sums[:, -1:], right=True).clamp_max(logits.shape[-1] - 1)


@contextmanager
def _plain_settings(base: Any) -> Iterator[None]:
    """Ignore the checkpoint's generation_config.json: a repetition penalty, for example, would change greedy decoding too.

    An argument of `generate` only overrides the settings that it names.
    """
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
