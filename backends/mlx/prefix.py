"""The prefix layout on unmodified mlx-lm models: a prompt is computed once, and after it only the states that are read.

The decoder's own loop runs once, over one row of all real tokens: first the prompts', then the responses'. Its layers get a
`Pass` in place of a cache. A layer runs on the prompts, passes their keys and values to the responses and runs on these: one
pure function per layer, which can be checkpointed. Norms, MLPs and adapters see no padding; only attention sees padded blocks,
(prompts, columns) padded on the left and (responses, columns) padded on the right. On a CPU, where the softmax takes most
time, attention sees no padding either: it runs on each prompt and each response separately, some queries at a time.

The responses' part of a row holds, for each response token, the token before it: the last prompt token, then the response
without its last token. So all its states are read, the last layer computes nothing else but the prompts' keys and values (MLX
computes nothing whose result is unused), and the hidden states come out in the order of the response tokens. If a head reads
tokens' own states, the last token of each response is included too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lite_dil.backends.foreign import Misfit, foreign
from lite_dil.backends.limits import MLX_QUERIES
from lite_dil.backends.mlx.load import decode
from lite_dil.batching.layouts import Prefix

ATTENTION = ("self_attn", "attention", "attn")
MLP = ("mlp", "block_sparse_moe", "feed_forward")


class Window(NamedTuple):
    """A placeholder for a mask in the model's own loop: how far back a token sees, or None for unlimited."""

    size: int | None


def arrays(layout: Prefix, multiple: int = 1, read: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Turn a prefix layout into the arrays of a `Pass`; rows are padded to a multiple of `multiple` tokens.

    Args:
        read: flat indices of the own states to read, in a layout that has them; by default the states that predict the
            response tokens come out.

    Returns:
        ids: (1, Tp + Tr), prompts without their last tokens, then the token before each response token (and the last one of
            each response, if own states are read).
        prompt_from: (B, columns), the index among the Tp tokens for each place of the prompts' block; prompt_mask: true on
            tokens.
        prompt_at: (Tp,), the flat place of each token in that block.
        response_at: (Tr,), the same in the (n, R) block; `token_index`, (n, R), is its inverse.
        owner: (n,), the prompt of each response; left out if every prompt has the same number of responses, in order.
        targets, token_mask: as in the layout, padded; or read_index, the indices of the Tr states to read.
    """
    mask = layout.prompt_mask[:, :-1]
    if not mask.any():  # prompts of one token, which belongs to the responses' part
        mask = np.zeros((len(mask), 1), bool)
    prompt_ids, prompt_at = layout.prompt_ids[:, :-1][layout.prompt_mask[:, :-1]], np.flatnonzero(mask)
    before = np.concatenate([layout.prompt_ids[layout.owner, -1:], layout.response_ids[:, :-1]], 1)
    rows, width = before.shape
    here = np.arange(width) < layout.states[:, None]
    response_at = np.flatnonzero(here)
    made = {
        "ids": np.concatenate([_filled(prompt_ids, multiple), _filled(before.ravel()[response_at], multiple)])[None],
        "prompt_from": np.where(mask, np.cumsum(mask).reshape(mask.shape) - 1, 0),
        "prompt_mask": mask,
        "prompt_at": _filled(prompt_at, multiple),
        "response_at": _filled(response_at, multiple),
        "token_index": np.where(here, np.cumsum(here).reshape(here.shape) - 1, 0),
    }
    if read is None:
        token_mask = np.pad(layout.token_mask, ((0, 0), (0, width - layout.token_mask.shape[1])))
        made |= {"targets": _filled(layout.targets, multiple), "token_mask": token_mask}
    else:
        made["read_index"] = np.searchsorted(response_at, read)
    if rows % len(mask) or (layout.owner != np.repeat(np.arange(len(mask)), rows // len(mask))).any():
        made["owner"] = layout.owner
    return made


class RowLengths(NamedTuple):
    """Lengths for attention without padding: tokens of each prompt but its last, and states and prompt of each response."""

    prompts: list[int]
    responses: list[int]
    owners: list[int]

    @classmethod
    def of(cls, layout: Prefix) -> RowLengths:
        """Read them from a layout."""
        return cls((layout.prompt_mask.sum(1) - 1).tolist(), layout.states.tolist(), layout.owner.tolist())


class Pass:
    """One pass through the decoder; it takes the place of each layer's cache.

    Args:
        arrays: the result of `arrays`, as MLX arrays.
        head_axes: the number of head axes between batch and tokens in the model's scores: 1, or 2 (Gemma 2).
        probe: a list that collects each layer's `Window`; then no layer computes anything.
        rows: attend by these lengths, without padding.
    """

    offset = 0  # some models' loops read it

    def __init__(
        self,
        arrays: dict[str, mx.array],
        head_axes: int = 1,
        probe: list[int | None] | None = None,
        rows: RowLengths | None = None,
    ) -> None:
        self.arrays, self.head_axes, self.probe, self.rows = arrays, head_axes, probe, rows
        self._masks: dict[Any, Any] = {}

    def make_mask(self, *_: Any, window_size: int | None = None, **__: Any) -> Window:
        """Called by mlx-lm's create_attention_mask."""
        return Window(window_size)

    def run(self, block: Callable[..., mx.array], x: mx.array, window: Any, last: bool) -> mx.array:
        """Run the model's decoder block on (1, Tp + Tr, width); the last block returns only the responses' part."""
        if not isinstance(window, Window):
            raise Misfit("the model makes its own attention masks")
        _check_row(x, self.arrays["ids"].shape[1], "a layer is handed")
        split = self.arrays["prompt_at"].shape[0]

        def mask_of(queries: int, keys: int) -> mx.array:
            return self.causal(queries, keys, window.size, x.dtype)

        prompts: Any
        responses: Any
        rows = self.rows
        if rows is not None:
            prompts = Unpadded(rows.prompts, [None] * len(rows.prompts), mask_of)
        else:
            prompt_mask, response_mask = self.masks(window.size, x.dtype)
            prompts = Prompts(self.arrays, prompt_mask)
        prompts_out = foreign(block, x[:, :split], prompts.mask, prompts)
        _check_row(prompts_out, split, "a layer returns")
        if not prompts.attended:
            raise Misfit("not every layer is attention over keys and values")
        if rows is not None:
            responses = Unpadded(rows.responses, [prompts.kept[owner] for owner in rows.owners], mask_of)
        else:
            responses = ResponseCache(self.arrays, response_mask, prompts)
        responses_out = foreign(block, x[:, split:], responses.mask, responses)
        _check_row(responses_out, x.shape[1] - split, "a layer returns")
        return responses_out if last else mx.concatenate([prompts_out, responses_out], 1)

    def note(self, arguments: list[Any]) -> Any:
        """Append the window among a layer's arguments to the probe; return its hidden states, the first of them."""
        windows = [one.size for one in arguments if isinstance(one, Window)]
        if self.probe is None or len(windows) != 1:
            raise Misfit("the model makes its own attention masks")
        self.probe.append(windows[0])
        return arguments[0]

    def causal(self, queries: int, keys: int, window: int | None, dtype: mx.Dtype) -> mx.array:
        """Return the mask of the keys that the last `queries` of `keys` tokens see, to be added to scores."""
        if (mask := self._masks.get((queries, keys, window))) is None:
            mask = self._masks[queries, keys, window] = _additive(_causal(queries, keys, window), dtype)
        return mask

    def masks(self, window: int | None, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        """Return the masks (B, 1, columns, columns) and (n, 1, R, columns + R), to be added to scores.

        Adding is many times faster than selecting by a boolean mask on a CPU, and as fast on Metal.
        """
        if window not in self._masks:
            keys = self.arrays["prompt_mask"]
            columns, width = keys.shape[1], self.arrays["token_index"].shape[1]
            prompts = (keys[:, None] & _causal(columns, columns, window)) | mx.eye(columns, dtype=mx.bool_)
            rows = _to_responses(keys, self.arrays)
            keys = mx.concatenate([rows, mx.ones((len(rows), width), mx.bool_)], 1)
            responses = keys[:, None] & _causal(width, columns + width, window)
            axes = tuple(range(1, 1 + self.head_axes))
            self._masks[window] = tuple(mx.expand_dims(_additive(mask, dtype), axes) for mask in (prompts, responses))
        return self._masks[window]


class Prompts:
    """The cache of a block's run on the prompts: it stores their keys and values."""

    offset = 0

    def __init__(self, arrays: dict[str, mx.array], mask: mx.array) -> None:
        self.mask, self.places, self.back = mask, arrays["prompt_from"], arrays["prompt_at"]
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def attended(self) -> bool:
        """Whether the block's attention has run."""
        return self.keys is not None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Called by the model's attention."""
        if self.keys is not None:
            raise Misfit("a layer attends more than once")
        _check_keys((keys, values), *self.places.shape)
        self.keys, self.values = keys, values
        return keys, values


Keys = tuple[mx.array, ...]  # keys and values


class Unpadded:
    """The cache of a block's run on sequences that attend one after the other; it stores their keys and values.

    Args:
        lengths: tokens of each sequence.
        before: keys and values that come before each, or None.
    """

    mask = None  # each call gets its own

    def __init__(self, lengths: list[int], before: list[Keys | None], mask_of: Callable[[int, int], mx.array]) -> None:
        self.lengths, self.before, self.mask_of = lengths, before, mask_of
        self.offset, self.queries, self.attended = 0, 0, not any(lengths)
        self.seen: Keys | None = None
        self.kept: list[Keys | None] = []

    def attend(self, attention: Callable[..., mx.array], x: mx.array) -> mx.array:
        """Run the model's attention on (1, tokens, width), some queries at a time."""
        _check_row(x, None, "attention is handed")
        self.kept, parts, at = [], [], 0
        for length, before in zip(self.lengths, self.before, strict=True):
            self.seen, past = before, 0 if before is None else before[0].shape[2]
            for start in range(0, length, MLX_QUERIES):
                stop, self.offset = min(start + MLX_QUERIES, length), past + start
                self.queries = stop - start
                mask = self.mask_of(self.queries, past + stop)
                parts.append(foreign(attention, x[:, at + start : at + stop], mask, self))
                _check_row(parts[-1], self.queries, "attention returns")
                if self.seen is None or self.seen[0].shape[2] != past + stop:
                    raise Misfit("a layer does not attend once over keys and values")
            self.kept.append(self.seen)
            at += length
        parts.append(mx.zeros((1, x.shape[1] - at, x.shape[2]), x.dtype))  # padding
        return mx.concatenate(parts, 1)

    def update_and_fetch(self, *new: mx.array) -> Keys:
        """Called by the model's attention; return all keys and values so far."""
        self.attended = True
        _check_keys(new, 1, self.queries)
        self.seen = new if self.seen is None else tuple(mx.concatenate(two, 2) for two in zip(self.seen, new, strict=True))
        return self.seen


class ResponseCache:
    """The cache of a block's run on the responses: it puts the prompts' keys and values before theirs."""

    def __init__(self, arrays: dict[str, mx.array], mask: mx.array, prompts: Prompts) -> None:
        self.mask, self.places, self.back = mask, arrays["token_index"], arrays["response_at"]
        self.arrays, self.prompts = arrays, prompts
        self.offset = prompts.places.shape[1]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Called by the model's attention."""
        _check_keys((keys, values), *self.places.shape)
        past = [_to_responses(array, self.arrays) for array in (self.prompts.keys, self.prompts.values)]
        return mx.concatenate([past[0], keys], 2), mx.concatenate([past[1], values], 2)


def applied_windows(model: Any) -> list[int | None] | None:
    """Return the window that mlx-lm gives each layer, or None if unknown; the layers must be wrapped."""
    probe: list[int | None] = []
    layers = len(model.layers)
    try:
        decode(model, mx.array([[0, 1]]), Pass({}, probe=probe))
    except Misfit:  # the loop does more than run its layers
        return None
    return probe if len(probe) == layers else None


def wrap_layers(model: nn.Module, checkpointing: str) -> None:
    """Wrap each decoder block so that it can run a `Pass`, and recomputes for the backward pass as requested.

    Args:
        checkpointing: "off"; "selective", a block's MLP is recomputed; "full", a block keeps only its input.

    Instances get their own class, since mlx-lm's grad_checkpoint patches the class for the whole process.
    """
    for layer in model.layers:
        if name := next((name for name in ATTENTION if name in layer), None):
            layer[name].__class__ = _attention(type(layer[name]))
        if checkpointing == "selective" and (name := next((name for name in MLP if name in layer), None)):
            layer[name].__class__ = _checkpointed(type(layer[name]))
        layer.__class__ = _block(type(layer), last=layer is model.layers[-1], checkpoint=checkpointing == "full")


def _attention(kind: type) -> type:
    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        cache = kwargs.get("cache", args[-1] if args else None)
        if isinstance(cache, Unpadded):
            return cache.attend(partial(kind.__call__, self), x)
        if not isinstance(cache, (Prompts, ResponseCache)):
            return kind.__call__(self, x, *args, **kwargs)
        _check_row(x, None, "attention is handed")
        out = foreign(kind.__call__, self, x[0][cache.places], cache.mask, cache)
        if not isinstance(out, mx.array) or out.shape[:2] != cache.places.shape:
            raise Misfit("attention returns something other than a state for each token")
        return out.reshape(-1, out.shape[-1])[cache.back][None]

    return type(kind.__name__, (kind,), {"__call__": call})


def _block(kind: type, last: bool, checkpoint: bool) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        whole = [*args, *kwargs.values()]
        cache = next((arg for arg in whole if isinstance(arg, Pass)), None)
        if cache is None:
            return kind.__call__(self, *args, **kwargs)
        if cache.probe is not None:
            return cache.note(whole)
        if len(whole) != 3 or not isinstance(whole[2], Pass):
            raise Misfit("a layer takes more than hidden states, a mask and a cache")
        if not any(name in self for name in ATTENTION):
            raise Misfit("not every layer is attention over keys and values")
        x, window, _ = whole
        return cache.run(partial(kind.__call__, self), x, window, last)

    made = type(kind.__name__, (kind,), {"__call__": forward})
    return _checkpointed(made) if checkpoint else made


def _checkpointed(kind: type) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        def inner(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            self.update(parameters)
            return kind.__call__(self, *args, **kwargs)

        return mx.checkpoint(inner)(self.trainable_parameters(), *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})


def _check_row(x: Any, tokens: int | None, where: str) -> None:
    """Raise Misfit unless the model's code gave (1, tokens, width); `tokens` None allows any number."""
    if not isinstance(x, mx.array) or x.ndim != 3 or x.shape[0] != 1 or x.shape[1] != (tokens or x.shape[1]):
        raise Misfit(f"{where} something other than a state for each token")


def _check_keys(arrays: tuple[Any, ...], rows: int, tokens: int) -> None:
    """Raise Misfit unless the model's code gave keys and values of (rows, heads, tokens, width)."""
    if not all(isinstance(x, mx.array) and x.ndim == 4 and (x.shape[0], x.shape[2]) == (rows, tokens) for x in arrays):
        raise Misfit("its keys and values are not (rows, heads, tokens, width)")


def _to_responses(of_prompts: mx.array, arrays: dict[str, mx.array]) -> mx.array:
    """Repeat the values of each prompt, (B, ...), for each of its responses, (n, ...)."""
    if "owner" in arrays:
        return of_prompts[arrays["owner"]]
    return mx.repeat(of_prompts, arrays["token_index"].shape[0] // of_prompts.shape[0], 0)


def _causal(queries: int, keys: int, window: int | None) -> mx.array:
    """Return a causal mask, (queries, keys) bool; the queries are the last of the keys."""
    query, key = mx.arange(keys - queries, keys)[:, None], mx.arange(keys)
    seen = query >= key
    return seen if window is None else seen & (query < key + window)


def _additive(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    """Turn a boolean mask into one that is added to scores."""
    return mx.where(mask, mx.array(0, dtype), mx.array(mx.finfo(dtype).min, dtype))


def _filled(array: np.ndarray, multiple: int) -> np.ndarray:
    return np.pad(array, (0, max(1, -(-len(array) // multiple)) * multiple - len(array)))
