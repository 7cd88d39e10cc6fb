"""The protocol of a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lite_dil.backends.types import OWN, POLICY, Done, Generated, Head, MicroBatch, Sampling, StepResult, never
from lite_dil.base.display import Count, uncounted

if TYPE_CHECKING:  # --help imports this file, and importing numpy takes longer than all the rest
    import numpy as np

    from lite_dil.batching.batch import Batch
    from lite_dil.models.options import ResolvedAdapter
    from lite_dil.objectives.loss import Loss


class Backend(Protocol):
    """A frozen base model with named LoRA adapters, one of which is active at a time.

    "policy" is the first adapter to train, active outside of any `using`. "reference" is what it is compared with: the bare
    base, or a frozen adapter. Callers may add others under their own names.
    """

    name: str
    description: str  # device, dtype and quantisation, for people
    dtype_name: str  # the resolved --dtype
    layout: str  # "plain", "packed" or "prefix"
    layout_reason: str  # why auto could not take the layout that shares prompts, as a sentence, or empty
    batched: bool  # whether `generate` continues several prompts at once, not one after the other
    identity: str  # what the reference's log-probs depend on besides the checkpoint: library, dtype, quantisation

    def using(self, name: str) -> AbstractContextManager[None]:
        """Activate adapter `name` inside the block: "policy", "reference", or one from `add_adapter`.

        Afterwards, even after an exception, the previous one is active again; blocks may be nested. Raises KeyError for an
        unknown name.
        """

    def adapter_off(self) -> AbstractContextManager[None]:
        """Activate the reference inside the block; short for `using("reference")`."""

    def add_adapter(
        self,
        name: str,
        rank: int,
        alpha: float,
        targets: str = "all-linear",
        dropout: float = 0.0,
        head: Head | None = None,
    ) -> None:
        """Add a new, trainable adapter on the same base.

        Its initial weights are drawn from the seed, the layer's name and its own name; a head starts at zero. Other adapters
        and the random state of training do not change. Raises ValueError if the name is taken or not valid as a folder name.

        Args:
            alpha: the adapter is scaled by alpha / rank.
            targets: "all-linear", or the last parts of the layers' names, comma-separated.
            head: the head for `scores`, trained with this adapter.
        """

    def load_adapter(self, name: str, folder: Path) -> None:
        """Add an adapter from its files, in PEFT's or mlx-lm's format, bit for bit, with its head if it has one.

        It is no part of the state that `save_state` and `load_state` know: its files have it.

        Raises UserError if it is not of this model's layers or cannot be read, and ValueError as `add_adapter` does.
        """

    def set_head(self, head: Head | None) -> None:
        """Give the policy a head for `scores` that starts at zero and is trained with it, or take its head away.

        Its optimiser starts anew. Raises ValueError if there is no policy's adapter.
        """

    def renew_policy(self, adapter: ResolvedAdapter) -> None:
        """Reset the policy to the initial weights that loading with these options gives, bit for bit, without a head.

        Optimiser, strength and dropout's random state are reset as well; base, reference and other adapters stay. Raises
        UserError if an initial adapter does not fit the policy's layers and rank.
        """

    def token_logps(self, batch: Batch) -> np.ndarray:
        """Return the log-probs of all response tokens under the active adapter, without dropout.

        Shape (tokens,), float32, in nats, in the order of the batch's responses. Like `sequence_logps` and `generate`, raises
        OutOfMemory if the device does not hold it all at once and fewer examples may fit.
        """

    def token_hits(self, batch: Batch) -> np.ndarray:
        """Return `token_logps`, and with each whether that token is the most likely one, 1 or 0: (tokens, 2) float32."""

    def sequence_logps(self, batch: Batch) -> np.ndarray:
        """Like `token_logps`, summed over each response: shape (responses,)."""

    def scores(self, batch: Batch, adapter: str) -> np.ndarray:
        """Return the outputs of an adapter's head, without dropout: (responses, outputs), or (tokens, outputs) with `EACH`.

        float32, in the order of the batch's responses. Raises KeyError for an unknown name, ValueError if it has no head,
        and OutOfMemory as `token_logps` does.
        """

    def step(
        self,
        passes: Sequence[MicroBatch],
        loss: Loss,
        learning_rate: float,
        adapter: str = POLICY,
        count: Count = uncounted,
    ) -> StepResult:
        """Take one AdamW step on the mean of `loss` over all examples of `passes`, for one adapter and its head only.

        The reference's figures that the loss reads are computed if they are not given. `count` is called with the
        number of passes done after each.

        Raises OutOfMemory if the device does not hold it, with everything as before the step and its memory freed; KeyError
        for an unknown name; ValueError for what cannot be trained: the reference, a model loaded for inference, or an adapter
        without a head if the loss reads scores.
        """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_ids: Sequence[int],
        seeds: Sequence[int] | None = None,
        sampling: Sampling = OWN,
        stop: Callable[[], bool] = never,
        done: Done | None = None,
    ) -> list[Generated]:
        """Continue the prompts as the policy (or the reference, inside `adapter_off`), without dropout.

        For several responses to a prompt, repeat it: equal prompts are computed once if the model's state allows it, so
            callers
        have one row per response, each with its seed, and may split a batch anywhere.

        Args:
            max_new_tokens: maximum tokens of a response, including its end token; at least 1.
            end_ids: the tokens that end a response, at least one.
            seeds: None always takes the most likely token. Otherwise one number below 2^64 per prompt: each response is a
                sample, by default from the model's exact distribution, whatever settings the checkpoint has. A prompt's sample
                depends on its seed and not on the other prompts (except for rounding in a batch of another shape); the random
                state of training does not change.
            sampling: how to draw if there are seeds.
            stop: called between tokens; if it returns true, the responses end there.
            done: called with the tokens of each response so far; if it returns true, that response ends there.
        """

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        end_ids: Sequence[int],
        seed: int | None = None,
        sampling: Sampling = OWN,
    ) -> Iterator[int]:
        """Continue one prompt as `generate` does, and yield each token as it is generated, the end token last.

        Each `next` uses the adapter that is active at the call, which must be the same throughout a stream. Other streams and
        passes may come in between. `next` raises OutOfMemory.
        """

    @property
    def strength(self) -> float:
        """The factor on the policy's adapter; see `set_strength`."""

    def set_strength(self, value: float) -> None:
        """Multiply the policy's adapter by `value`, 0 to 1.5: 0 is exactly the base; 1, the default, is the adapter as
        trained.

        For inference only: `step` raises ValueError at any strength but 1. The reference and saved files do not change.
        """

    def save_adapter(self, folder: Path, adapter: str = POLICY) -> None:
        """Write an adapter in this library's own format, with its head if it has one."""

    def save_state(self, folder: Path) -> None:
        """Write all adapters with their heads and optimisers, and the random state, for `load_state`."""

    def load_state(self, folder: Path) -> None:
        """Restore the state of `save_state` exactly; the same adapters must have been added."""

    def peak_memory_mb(self) -> float:
        """Return the peak so far in MiB: of the device's allocator, or of the process on a CPU."""
