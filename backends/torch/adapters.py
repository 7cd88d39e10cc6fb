"""A trainable adapter: its weights, its head, its optimiser and its loss scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lite_dil.backends.torch.load import create_states, load_states
from lite_dil.backends.torch.lora import peft_name
from lite_dil.backends.torch.out_of_memory import ERRORS
from lite_dil.backends.torch.score_head import ScoreHead


class Trainable:
    """An adapter of a PEFT model, with its training state.

    Args:
        make_optimizer: makes the optimiser for a list of parameters; called at the first step.
        scaled: whether the loss is scaled: float16 gradients underflow without it.

    Attributes:
        weights: its LoRA parameters, by name in the PEFT model.
        loaded: whether it is from files of its own, so that it is no part of a training's state.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        head: ScoreHead | None,
        make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        device: str,
        scaled: bool,
    ) -> None:
        self.name, self.head, self.loaded = name, head, False
        ending = f".{peft_name(name)}.weight"
        self.weights = {key: value for key, value in model.named_parameters() if key.endswith(ending)}
        self._make_optimizer = make_optimizer
        self._device = device
        self.scaler = torch.amp.GradScaler(device, enabled=scaled)

    @property
    def parameters(self) -> list[Tensor]:
        """The trained parameters: LoRA weights, then the head's."""
        return [*self.weights.values(), *(self.head.parameters() if self.head is not None else ())]

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser, made when first used: inference has none."""
        return self._make_optimizer(self.parameters)

    def state(self) -> dict[str, Any] | None:
        """Return the state of the optimiser and loss scale, None before the first step."""
        if "optimizer" not in vars(self):
            return None
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def set_state(self, state: Mapping[str, Any] | None) -> None:
        """Restore a state from `state`."""
        vars(self).pop("optimizer", None)
        self.scaler = torch.amp.GradScaler(self._device, enabled=self.scaler.is_enabled())
        if state is not None:
            load_states(self.optimizer, state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])

    def update(self, loss: float, learning_rate: float, max_grad_norm: float) -> tuple[float, bool]:
        """Update the weights by their gradients, unless one or the loss is not finite.

        Returns the gradients' norm before clipping, and whether the loss scale was too large, which skips the update.
        """
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_grad_norm).item()
        if not (math.isfinite(norm) and math.isfinite(loss)) and not self.scaler.is_enabled():
            return norm, False
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        scale, first = self.scaler.get_scale(), not self.optimizer.state
        try:
            create_states(self.optimizer)
            self.scaler.step(self.optimizer)
        except ERRORS:
            # The states of a failed first step are dropped. bitsandbytes' paged memory stays allocated: it frees none.
            if first:
                del self.optimizer
            raise
        self.scaler.update()
        return norm, self.scaler.get_scale() < scale

    def forget_gradients(self) -> None:
        """Free the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def undo(self) -> None:
        """Undo a step that failed before its update."""
        self.forget_gradients()
        # Gradients may have been unscaled, which a scaler allows once per update: use a new one in the same state.
        state, self.scaler = self.scaler.state_dict(), torch.amp.GradScaler(self._device, enabled=self.scaler.is_enabled())
        self.scaler.load_state_dict(state)
