"""Two recipes that the package knows nothing of, from its public pieces alone, each against an eager loop of torch and PEFT.

One weighs the log-prob of each response token, one clips the ratio of each token to its log-prob under an older policy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bare_model, batch, config, oracle_logps
from peft import LoraConfig, get_peft_model

from lite_dil.backends import registry
from lite_dil.backends.types import MicroBatch
from lite_dil.batching.batch import Batch
from lite_dil.models import adapters
from lite_dil.objectives.loss import NOTHING, TOKENS
from lite_dil.online.loss import Surrogate

STEPS, RATE = 3, 5e-3
TARGETS = "q_proj,v_proj,down_proj"
Arrays = dict[str, np.ndarray]


class WeightedTokens:
    """-sum_t w_t log pi(y_t)."""

    reads, reference, token_inputs = TOKENS, NOTHING, ("weights",)

    def __call__(self, policy: Any, reference: Any, inputs: dict[str, Any]) -> Any:
        return -(inputs["weights"] * policy).sum()


class ClippedRatios:
    """-sum_t min(r_t A_t, clip(r_t, 0.8, 1.2) A_t), with r_t = pi(y_t) / pi_old(y_t)."""

    reads, reference, token_inputs = TOKENS, NOTHING, ("old_logps", "advantages")

    def __call__(self, policy: Any, reference: Any, inputs: dict[str, Any]) -> Any:
        library = __import__("mlx.core" if type(policy).__module__.startswith("mlx") else "torch", fromlist=["exp"])
        ratio, advantage = library.exp(policy - inputs["old_logps"]), inputs["advantages"]
        bound = library.ones_like(ratio)
        clipped = library.minimum(library.maximum(ratio, 0.8 * bound), 1.2 * bound)
        return -library.minimum(ratio * advantage, clipped * advantage).sum()


def weights(data: Batch, old: np.ndarray) -> Arrays:
    return {"weights": np.random.default_rng(1).normal(size=len(old)).astype(np.float32)}


def advantages(data: Batch, old: np.ndarray) -> Arrays:
    return {"old_logps": old, "advantages": np.random.default_rng(2).normal(size=len(old)).astype(np.float32)}


def eager_weighted(logps: torch.Tensor, inputs: Arrays) -> torch.Tensor:
    return -(torch.from_numpy(inputs["weights"]) * logps).sum()


def eager_clipped(logps: torch.Tensor, inputs: Arrays) -> torch.Tensor:
    total = torch.zeros(())
    for logp, old, advantage in zip(logps, inputs["old_logps"].tolist(), inputs["advantages"].tolist(), strict=True):
        ratio = (logp - old).exp()
        total = total - torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return total


def surrogate_inputs(data: Batch, old: np.ndarray) -> Arrays:
    draws = np.random.default_rng(3).normal(size=(2, len(old))).astype(np.float32)
    return {"weights": draws[0], "old_logps": old, "kl_weights": abs(draws[1]), "reference_logps": old - 0.1}


def eager_surrogate(logps: torch.Tensor, inputs: Arrays) -> torch.Tensor:
    at_old = torch.from_numpy(inputs["weights"]).sum()
    d = torch.from_numpy(inputs["reference_logps"]) - logps
    k3 = (torch.from_numpy(inputs["kl_weights"]) * (d.exp() - d - 1)).sum()
    return eager_clipped(logps, {"old_logps": inputs["old_logps"], "advantages": inputs["weights"]}) + at_old + k3


def eager_model(model: str) -> Any:
    """The checkpoint with PEFT's own LoRA, at the weights that a fresh adapter has."""
    bare = bare_model(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted: Any = get_peft_model(bare, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS.split(",")))
    modules = dict(adapted.get_base_model().named_modules())
    shapes = {name: (m.out_features, m.in_features) for name, m in modules.items() if hasattr(m, "lora_A")}
    with torch.no_grad():
        for name, (a, b) in adapters.fresh(shapes, 4, 2.0, 0).weights.items():
            modules[name].lora_A["default"].weight.copy_(torch.from_numpy(a))
            modules[name].lora_B["default"].weight.copy_(torch.from_numpy(b))
    return adapted


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize(
    ("loss", "inputs_of", "eager"),
    [
        (WeightedTokens(), weights, eager_weighted),
        (ClippedRatios(), advantages, eager_clipped),
        (Surrogate(0.2, kl=True), surrogate_inputs, eager_surrogate),
    ],
    ids=["weighted tokens", "clipped ratios", "the package's surrogate"],
)
def test_a_recipe_equals_an_eager_loop(
    backend_name: str,
    tiny: str,
    loss: Any,
    inputs_of: Callable[[Batch, np.ndarray], Arrays],
    eager: Callable[[torch.Tensor, Arrays], torch.Tensor],
    sharing: bool,
    split: bool,
) -> None:
    layout = {"cpu": "packed", "mlx": "prefix"}[backend_name] if sharing else "plain"
    options = config(lora_r=4, lora_alpha=8.0, target_modules=TARGETS, layout=layout)
    backend = registry.load(backend_name, options, tiny, options, options)
    whole = batch(4)
    parts = list(whole.halves()) if split else [whole]
    inputs = [inputs_of(part, backend.token_logps(part)) for part in parts]

    other = eager_model(tiny)
    learned = [parameter for parameter in other.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.0)
    for _ in range(STEPS):
        result = backend.step([MicroBatch(part, own) for part, own in zip(parts, inputs, strict=True)], loss, RATE)
        optimizer.zero_grad()
        logps = [oracle_logps(other, part) for part in parts]
        value = sum(eager(here, own) for here, own in zip(logps, inputs, strict=True)) / whole.examples
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(learned, options.max_grad_norm).item()
        optimizer.step()
        assert result.loss == pytest.approx(value.item(), rel=1e-4, abs=1e-4)
        assert result.grad_norm == pytest.approx(norm, rel=2e-3)
        np.testing.assert_allclose(result.policy, torch.cat(logps).detach().numpy(), atol=1e-3)
        assert result.reference is None
    with torch.no_grad():
        np.testing.assert_allclose(backend.token_logps(whole), oracle_logps(other, whole).numpy(), atol=2e-3)
