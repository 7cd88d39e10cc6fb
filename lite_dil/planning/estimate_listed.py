"""Estimate the memory of a step on torch for any family that transformers knows: weights by list, the rest by rehearsal.

Weights are those of the model's own class, each as it is loaded. What the decoder keeps and makes is counted while the real
step runs without memory (`lite_dil.backends.torch.rehearsal`), for a few numbers of tokens, powers of four; between them it is
taken as linear, which is not too little where the peak is the highest of parts that grow evenly or faster.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np

from lite_dil.backends.limits import TORCH_CHUNK, chunk_tokens
from lite_dil.base.errors import UserError
from lite_dil.batching.schedule import PRECOMPUTE_ROWS, row_tokens
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.models.listing import LayerTurn, ListedModel, Rehearsal, StepProfile, layer_number
from lite_dil.models.shape import ModelShape
from lite_dil.planning.estimate import FLOAT32, Load
from lite_dil.planning.estimate_torch import NF4_BLOCK, TorchStep

_FEWEST, _ROWS = 256, 4  # tokens of the smallest rehearsal, and sequences of the second one of each size
_MOST = 2**14  # operations of a rehearsal, beyond which larger ones are extrapolated: so many are a loop over tokens


class ListedStep(TorchStep):
    """A training step of the torch backend on a listed model."""

    shape: Any

    def __init__(self, config: ResolvedConfig, shape: ListedModel, backend: str, dtype: str, load: Load) -> None:
        super().__init__(config, cast(ModelShape, shape), backend, dtype, load)  # which has what the step reads of a shape

    def prepare(self) -> None:
        """Refuse what the backend would refuse once the model is loaded."""
        if self.config.load_in_4bit and self.shape.experts_stored_in:
            raise UserError(
                f"--model {self.config.model}: its experts are packed by mxfp4, which is unpacked to 16 bits; "
                "leave out --4bit, or give the model in 16 bits"
            )
        if self.packed4:
            self.linears = {name: self.shape.linears()[name] for name in self.shape.packed}

    def weights(self) -> dict[str, int]:
        """Return the frozen model's bytes by component."""
        s = self.shape
        linears = sum(
            self.frozen(linear) if name in s.packed else linear.parameters * self.e for name, linear in s.linears().items()
        )
        parts = self.head_and_table()
        tables = parts["embeddings"] + (s.tables - s.table) * self.e
        norms = s.rest * self.e + s.wide.get(self.dtype, 0) * (FLOAT32 - self.e)
        return {**parts, "linears": linears, "experts": s.experts * self.e, "embeddings": tables, "norms": norms}

    def tower(self) -> int:
        """Return the bytes that loading takes for a moment: towers, and twice the largest tensor of experts.

        Checkpoints often have a tensor for each expert, and transformers joins them in two steps: all experts' gates, and all
        experts' ups, then both to one. While the last result is made, the tensors of the file and those of the first step are
        still there, each as large as the result.
        """
        s = self.shape
        return sum(map(self.frozen, s.tower)) + s.tower_rest * self.e + 2 * s.largest_expert * self.e

    def beforehand(self) -> dict[str, int]:
        """Return what a pass without gradients holds."""
        lengths = Load.worst(
            replace(self.config, batch_size=PRECOMPUTE_ROWS, row_tokens=PRECOMPUTE_ROWS * row_tokens(self.config))
        )
        found = self._profile("none", lengths.tokens(self.layout), lengths.longest)
        unpacked = max(map(self._unpacked, range(-1, self.shape.layers)))
        return {"optimizer": 0, "temporaries": found.around + unpacked}

    def drawn(self) -> dict[str, dict[str, int]]:
        """Refuse: caches differ among these families."""
        raise UserError(
            f"--model {self.config.model}: plan knows what drawn answers need for dense models alone; leave --reward out "
            "to plan for given answers, and try a few --max-steps"
        )

    def backward(self, several: bool) -> dict[str, dict[str, int]]:
        """Return the head's phase, when everything is kept, and the layer whose backward pass is the peak."""
        profile, final = self._now(), self.load.answer_tokens * self.shape.hidden * self.e
        keeps = sum(turn.keeps for turn in profile.layers)
        # What the last norm keeps and makes is part of the profile, and `head_phase` adds it too.
        normed = 2 * final if self.layout == "packed" else 2 * self.tokens * self.shape.hidden * self.e
        if self.head:
            found = {"head": {"activations": keeps + profile.around, "temporaries": self.scored()}}
        else:
            found = {"head": self.head_phase(max(0, keeps + profile.around - normed))}
            # The targets' rows of the head, and their copy, while a chunk's logits are there.
            chunk = chunk_tokens(self.shape.vocabulary, TORCH_CHUNK["cuda" if self.cuda else "cpu"])
            found["head"]["temporaries"] += min(self.load.answer_tokens, chunk) * self.shape.hidden * self.e
        found["head"]["gradients"] = self.adapter if several else 0
        after, kept, moments = self._gradients_after(), 0, []
        for number, turn in enumerate(profile.layers):
            name = {self.shape.layers - 1: "last layer", 0: "first layer"}.get(number, f"layer {number + 1}")
            unpacked = self._unpacked(number)
            forward = {
                "activations": kept,
                "temporaries": turn.forward + unpacked,
                "gradients": self.adapter if several else 0,
            }
            kept += turn.keeps
            backward = {
                "activations": kept + profile.around,
                "temporaries": turn.backward + unpacked,
                "gradients": self.adapter if several else after[number],
            }
            moments += [(f"forward, {name}", forward), (f"backward, {name}", backward)]
        worst, parts = max(moments, key=lambda each: sum(each[1].values()))
        return found | {worst: parts}

    def _now(self) -> StepProfile:
        """Return the decoder's memory for this load, with inputs of recomputed layers offloaded or not."""
        if self.shape.exact and self._operations() <= _MOST:
            found = self.shape.rehearse(self._setting(self.mode, self.load))
        else:
            found = self._profile(self.mode, self.tokens, self.load.longest)
        if self.mode == "full" and self.config.offload_activations:
            stream = self.tokens * self.shape.hidden * self.e
            turns = tuple(
                LayerTurn(max(0, turn.keeps - stream), turn.forward, turn.backward + 2 * stream) for turn in found.layers
            )
            return found._replace(layers=turns)
        return found

    def _operations(self) -> float:
        """Return about how many operations a rehearsal of the load takes, by those of two small ones."""
        fewer = _FEWEST // 4
        low, high = (self._rehearsed(self.mode, tokens)[-1] for tokens in (fewer, _FEWEST))
        return low + (high - low) * (self.tokens - fewer) / (_FEWEST - fewer)

    def _profile(self, mode: str, tokens: int, longest: int) -> StepProfile:
        """Return the memory for `tokens` tokens in sequences of at most `longest`, between those of powers of four."""
        low, known = _FEWEST, []
        while True:
            known.append((low, *self._rehearsed(mode, low)))
            if (low >= tokens and len(known) > 1) or known[-1][-1] > _MOST:
                break
            low *= 4
        (first, even, grows, _), (second, *more, _) = ([known[0]] * 2 + known)[-2:]
        share = (tokens - first) / (second - first) if second > first else tokens / first
        values = even + (more[0] - even) * share if second > first else even * share
        slopes = grows + (more[1] - grows) * min(1.0, max(0.0, share))
        around, *turns = np.maximum(0, values + slopes * tokens * longest).astype(np.int64).tolist()
        return StepProfile(around, tuple(LayerTurn(*turns[i : i + 3]) for i in range(0, len(turns), 3)), 0)

    def _rehearsed(self, mode: str, tokens: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return what grows evenly with the tokens, what does for each token and token of its sequence, and the operations.

        The second is of attention with its scores or a mask in memory, which packed rows have not.
        """

        def played(rows: int) -> tuple[np.ndarray, int]:
            found = self.shape.rehearse(self._setting(mode, Load((1,) * rows, ((tokens // rows - 1,),) * rows)))
            numbers = [found.around, *(number for turn in found.layers for number in turn)]
            return np.array(numbers, np.float64), found.operations

        whole, operations = played(1)
        if self.layout == "packed":
            return whole, np.zeros_like(whole), operations
        grows = np.maximum(0, whole - played(_ROWS)[0]) / (tokens * tokens * (1 - 1 / _ROWS))
        return whole - grows * tokens * tokens, grows, operations

    def _setting(self, mode: str, load: Load) -> Rehearsal:
        fused = self.config.fused_layers
        lengths = load.prompts, load.responses
        device = "cuda" if self.cuda else "cpu"
        targets = tuple(self.tensors)
        return Rehearsal(
            device,
            self.dtype,
            mode,
            self.layout,
            targets,
            self.rank,
            fused,
            float(self.config.lora_dropout),
            *lengths,
            scores=bool(self.head),
        )

    def _unpacked(self, number: int) -> int:
        """Return the bytes of the largest packed weight of a layer while it is unpacked, scales included."""
        largest = self.shape.largest_packed.get(number, 0) if self.packed4 else 0
        return largest * self.e + largest // NF4_BLOCK * FLOAT32

    def _gradients_after(self) -> list[int]:
        """Return for each layer the bytes of the gradients of the layers behind it."""
        found = [0] * self.shape.layers
        for name, pair in self.tensors.items():
            for number in range(layer_number(name, self.shape.stem)):
                found[number] += _size(pair) * FLOAT32
        return found


def _size(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> int:
    return sum(rows * columns for rows, columns in pair)
