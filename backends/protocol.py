"""The protocol of a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lite_dil.backends.types import OWN, POLICY, Generated, Head, MicroBatch, Sampling, StepResult, never

if TYPE_CHECKING:  # the command line's help comes from here too, and numpy takes longer than the rest of it
    import numpy as np

    from lite_dil.batching.batch import Batch
    from lite_dil.models.options import ResolvedAdapter
    from lite_dil.objectives.loss import Loss


class Backend(Protocol):
    """A frozen base model with named LoRA adapters, one of which is on at a time.

    "policy" is the one that training starts with, and is on outside of any `using`. "reference" is what it is compared with:
    the bare base, or a frozen adapter. Others are added under names of the caller's.
    """

    name: str
    description: str  # device, dtype and quantisation, for people
    dtype_name: str  # what --dtype auto came to
    layout: str  # "plain", "packed" or "prefix"
    layout_reason: str  # a sentence for people where auto could not take the sharing layout, else nothing
    identity: str  # what the reference's log-probs depend on beside the checkpoint: library, dtype, quantisation

    def using(self, name: str) -> AbstractContextManager[None]:
        """Compute as adapter `name` inside the block: "policy", "reference", or one that `add_adapter` added.

        Afterwards, also after an exception, it is as before; blocks may be nested. Raises KeyError for an unknown name.
        """

    def adapter_off(self) -> AbstractContextManager[None]:
        """Compute as the reference inside the block; short for `using("reference")`."""

    def add_adapter(
        self,
        name: str,
        rank: int,
        alpha: float,
        targets: str = "all-linear",
        dropout: float = 0.0,
        head: Head | None = None,
    ) -> None:
        """Put a fresh, trainable adapter on the same base.

        Its first weights are drawn from the seed, the layer's name and its own name; a head starts at zero. The other adapters
        and what is drawn in training stay as they are. Raises ValueError where the name is taken or cannot name a folder.

        Args:
            alpha: the adapter is scaled by alpha / rank.
            targets: "all-linear", or the last parts of the layers' names, with commas.
            head: what `scores` reads, trained with this adapter.
        """

    def renew_policy(self, adapter: ResolvedAdapter) -> None:
        """Give the policy the first weights that loading with these options gives it, to the last bit.

        Optimiser, strength and what dropout draws are then as after a load; base, reference and other adapters stay.
        Raises UserError where an initial adapter does not fit the policy's layers and rank.
        """

    def token_logps(self, batch: Batch) -> np.ndarray:
        """Return log-probs of all response tokens under the policy, or the adapter in `using`, without dropout.

        Shape (tokens,), float32, in nats, in the order of the batch's responses. Raises OutOfMemory, as `sequence_logps` and
        `generate` do, where the device does not hold it all at once and fewer examples may fit.
        """

    def sequence_logps(self, batch: Batch) -> np.ndarray:
        """Like `token_logps`, summed over each response: shape (responses,)."""

    def scores(self, batch: Batch, adapter: str) -> np.ndarray:
        """Return the outputs of an adapter's head, without dropout: (responses, outputs), or (tokens, outputs) of `EACH`.

        float32, in the order of the batch's responses. Raises KeyError for an unknown name, ValueError where it has no head,
        and OutOfMemory as `token_logps` does.
        """

    def step(self, passes: Sequence[MicroBatch], loss: Loss, learning_rate: float, adapter: str = POLICY) -> StepResult:
        """Take one AdamW step on the mean of `loss` over all examples of `passes`, for one adapter and its head alone.

        What the loss reads of the reference is computed where it is not given.

        Raises OutOfMemory where the device does not hold it, with everything as it was before the step and its memory freed;
        KeyError for an unknown name; ValueError for what cannot be trained: the reference, a model loaded for inference, or
        an adapter without a head where the loss reads scores.
        """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_ids: Sequence[int],
        seeds: Sequence[int] | None = None,
        sampling: Sampling = OWN,
        stop: Callable[[], bool] = never,
    ) -> list[Generated]:
        """Continue the prompts as the policy (or the reference, inside `adapter_off`), without dropout.

        For several answers to a prompt, repeat it: equal prompts are found and computed once, where the model's state allows
        it, so that callers keep one row an answer, each with its seed, and may split a batch anywhere.

        Args:
            max_new_tokens: of an answer at most, its end token counted; at least 1.
            end_ids: the tokens that end an answer, at least one.
            seeds: None takes the likeliest token each time. Otherwise one number below 2^64 a prompt: each answer is a draw,
                by default from exactly the model's own distribution, whatever settings the checkpoint comes with. A prompt's
                draw is decided by its seed and not by the prompts beside it (but for the rounding of a batch of another
                shape); the training's random state is left alone.
            sampling: how to draw where there are seeds.
            stop: asked between tokens; where it returns true the answers end as they are.
        """

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        end_ids: Sequence[int],
        seed: int | None = None,
        sampling: Sampling = OWN,
    ) -> Iterator[int]:
        """Continue one prompt as `generate` does, and yield each token when it is made, the end token last.

        Each `next` computes as the policy, or as the reference inside `adapter_off`, whichever it is called in; it must be
        the same for all of a stream. Other streams and passes may come between. Raises OutOfMemory from `next`.
        """

    @property
    def strength(self) -> float:
        """What the policy's adapter is multiplied by; see `set_strength`."""

    def set_strength(self, value: float) -> None:
        """Multiply the policy's adapter by `value`, 0 to 1.5: 0 is exactly the base, 1, the default, the adapter as trained.

        For inference: `step` raises ValueError at any strength but 1. The reference and what is saved do not change.
        """

    def save_adapter(self, folder: Path, adapter: str = POLICY) -> None:
        """Write an adapter in this library's own format, and its head, where it has one, beside it."""

    def save_state(self, folder: Path) -> None:
        """Write all adapters with their heads and optimisers, and the random state, for `load_state`."""

    def load_state(self, folder: Path) -> None:
        """Go on exactly where `save_state` was called; the adapters must have been added as they were then."""

    def peak_memory_mb(self) -> float:
        """Return the peak so far in MiB: of the device's allocator, or of the process on a CPU."""
