"""A model of any family that transformers knows, as its own class lists it: every weight, and how it is loaded.

`lite_dil.models.shape` knows the dense families by a formula. A `ListedModel` is made by `lite_dil.backends.torch.listing`,
which builds the model without memory for its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from lite_dil.models.logits import LogitTransform
from lite_dil.models.shape import Linear, Quantization


class LayerTurn(NamedTuple):
    """A layer in a step, in bytes.

    Attributes:
        keeps: what its forward pass leaves.
        forward: the most that is live in its forward pass, less what the layers before it keep.
        backward: the same in its backward pass, less also what it keeps itself, and what belongs to no layer.
    """

    keeps: int
    forward: int
    backward: int


class StepProfile(NamedTuple):
    """What the decoder holds in a step besides weights and gradients, in bytes.

    Attributes:
        around: what is live after the forward pass and belongs to no layer; of a pass without gradients its peak.
        layers: one for each layer, in order.
        operations: how many operations were counted.
    """

    around: int
    layers: tuple[LayerTurn, ...]
    operations: int


@dataclass(frozen=True)
class Rehearsal:
    """What a decoder's memory in a step depends on, besides the model.

    Attributes:
        device: "cuda" or "cpu".
        mode: "off", "selective" or "full"; "none" for a pass without gradients.
        layout: "packed" or "plain".
        targets: the adapted layers' names, all of `rank`.
        fused: use the fused layers.
        prompts, responses: lengths in tokens, as in a batch.
        scores: a reward model's head reads the state that ends each response; otherwise those that predict tokens are read.
    """

    device: str
    dtype: str
    mode: str
    layout: str
    targets: tuple[str, ...]
    rank: int
    fused: bool
    dropout: float
    prompts: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    scores: bool = False


@dataclass(frozen=True)
class ListedModel:
    """A model's weights, counted in parameters, and its decoder's memory.

    Attributes:
        stem: the name of the decoder's list of layers, such as "model.layers".
        layers_by_name: the decoder's linear layers.
        packed: those of them that 4 bits pack.
        adaptable: the (out, in) shapes of those that may have an adapter.
        experts_each: the number of experts of each mixture, 0 for none.
        experts: parameters of experts in tensors of their own, which stay at 16 bits.
        expert_linears: parameters of experts among the linear layers.
        chosen: the share of the experts that computes a token.
        largest_expert: parameters of the largest tensor of experts.
        tables: parameters of embedding tables, the main one included.
        rest: parameters of norms, convolutions and the like.
        wide: how many parameters stay in float32 under each narrower type.
        tower: linear layers of towers for images and sound, which are loaded and then freed.
        tower_rest: their other parameters.
        packs_rows: whether prompts can be shared in packed rows.
        selective: whether every layer has an MLP that can be recomputed alone.
        experts_stored_in: bits of an expert's weight in the checkpoint, if not those of `dtype`.
        rehearse: returns the decoder's memory in a step.
        exact: rehearse each load itself, not a few from which others are interpolated.
    """

    model_type: str
    layers: int
    stem: str
    hidden: int
    vocabulary: int
    tied: bool
    dtype: str
    max_positions: int
    long_rope: int | None
    transform: LogitTransform
    quantization: Quantization | None
    layers_by_name: dict[str, Linear]
    packed: frozenset[str]
    adaptable: dict[str, tuple[int, int]]
    experts_each: int
    experts: int
    expert_linears: int
    chosen: float
    largest_expert: int
    tables: int
    rest: int
    wide: dict[str, int]
    tower: tuple[Linear, ...]
    tower_rest: int
    packs_rows: bool
    selective: bool
    experts_stored_in: float | None
    rehearse: Callable[[Rehearsal], StepProfile]
    exact: bool = False

    def linears(self) -> dict[str, Linear]:
        """Return the linear layers of the decoder by name."""
        return self.layers_by_name

    @property
    def table(self) -> int:
        """Parameters of the main embedding table, the same number as in the output head."""
        return self.vocabulary * self.hidden

    @cached_property
    def parameters(self) -> int:
        """Parameters of the model as it trains, towers freed; a tied head counts once."""
        linear = sum(each.parameters for each in self.layers_by_name.values())
        return linear + self.experts + self.tables + self.rest + (0 if self.tied else self.table)

    @property
    def active(self) -> int:
        """Parameters that compute a token: all but the experts that were not chosen."""
        experts = self.experts + self.expert_linears
        return self.parameters - experts + round(experts * self.chosen)

    @cached_property
    def packed_share(self) -> float:
        """Return the share of the parameters that 4 bits pack."""
        return sum(self.layers_by_name[name].weight for name in self.packed) / self.parameters

    @cached_property
    def largest_packed(self) -> dict[int, int]:
        """Return the parameters of the largest packed weight of each layer, by its number; -1 for those outside."""
        found: dict[int, int] = {}
        for name in self.packed:
            number = layer_number(name, self.stem)
            found[number] = max(found.get(number, 0), self.layers_by_name[name].weight)
        return found


def layer_number(name: str, stem: str) -> int:
    """Return the number of the layer that a module's name is in, or -1; `stem` is the name of the list of layers."""
    number = name.removeprefix(f"{stem}.").partition(".")[0] if name.startswith(f"{stem}.") else ""
    return int(number) if number.isdecimal() else -1


def packed_words(share: float) -> str:
    """Return what is said of a mixture of whose weights 4 bits pack only this share."""
    return f"{share:.0%} of the weights are packed; experts stay at 16 bits"
