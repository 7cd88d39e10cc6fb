"""Train a checkpoint for a few steps and compare all that comes of it with an independent model.

The independent model is transformers' with eager attention and PEFT's LoRA, in float32, one unpadded sequence at a time, with
the whole logits and torch's own gradient of the loss as the paper writes it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from step_gradients import Adapter, common_name, step_gradients
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

import lite_dil as dil
from lite_dil.batching.batch import Batch
from lite_dil.config.train_config import TrainConfig
from lite_dil.objectives.criterion import Criterion

# The windows of the tiny models are 16 tokens, so that these are longer.
PAIRS = [
    {"prompt": "Name a colour of the sky on a fine day in summer.", "chosen": "Blue, mostly.", "rejected": "I do not know."},
    {"prompt": "2 + 2?", "chosen": "It is 4, as everybody can count on four fingers.", "rejected": "5"},
    {"prompt": "Say hello, please.", "chosen": "Hello!", "rejected": "Goodbye, and do not come back any time soon."},
]
# A difference above these is an error of the computation, if float32's own (see `noise`) does not explain it.
LOGPS = {"cpu": 5e-5, "mlx": 1e-4}  # nats of one token
ROUNDING = 3e-4  # nats: no more than this is put down to float32
GRADIENT = {"cpu": 1e-4, "mlx": 1e-3}  # of the gradient's norm, for each weight
GRADIENT_ROUNDING = 4e-4  # of it, likewise


@dataclass
class Found:
    """What came of a checkpoint on a backend; `wrong` says what is not as it should be."""

    layout: str = ""
    logps: float = 0.0  # the largest difference of a token's log-prob, with and without the adapter
    gradient: float = 0.0  # the largest difference of a weight's gradient, as a share of its norm
    reloaded: float = 0.0  # of a token, by the adapter saved for PEFT
    merged: float = 0.0  # of a token, by the merged export
    rounding: float = 0.0  # by how much float32's own error widened the bound of log-probs, where that was needed
    targets: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def check(model: Path, backend: str, place: Path, **more: Any) -> Found:
    """Train, save and export in the folder `place`. Raises UserError if the model is refused."""
    found = Found()
    policy = dil.load(str(model), backend=backend, dtype="float32", lora_r=4, max_length=128, max_grad_norm=1e9, **more)
    found.layout = policy.backend.layout
    fresh = policy.log_ratio([PAIRS[0]["prompt"]], [PAIRS[0]["chosen"]])
    small: dict[str, Any] = {"batch_size": 3, "gradient_accumulation_steps": 1, "report_samples": 0, "eval_fraction": 0.0}
    run = dil.train(policy, PAIRS, loss="lsif", max_steps=3, learning_rate=1e-2, output_dir=str(place / "run"), **small)
    if fresh != [0.0] or abs(run.metrics[0]["loss"] + 0.5) > 1e-6:
        found.wrong.append(f"fresh adapter: log-ratio {fresh[0]:.2g}, loss {run.metrics[0]['loss']:.7f}, not 0 and -0.5")
    examples = [policy.encoder.encode(row) for row in dil.read(PAIRS)]
    batch = Batch.of(examples)
    ours = policy.backend.token_logps(batch)
    with policy.as_reference():
        reference = policy.backend.token_logps(batch)
    criterion = Criterion(TrainConfig(loss="lsif").resolved(), examples)
    _, gradients = step_gradients(policy.backend, [batch], criterion)
    if backend == "mlx":  # the export's own check takes one row: what it writes is compared below
        adapter = run.export(place / "peft", format="adapter", to="peft", check_rows=1)
    else:
        adapter = policy.save(place / "peft")
    merged = run.export(place / "merged", no_check=True)
    policy.close()

    base = independent(model)
    found.logps = float(np.abs(token_logps(base, batch).numpy() - reference).max())
    with warnings.catch_warnings():
        # PEFT 0.21 uses an attribute's old name in transformers 5.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        tuned = PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()
    found.reloaded = float(np.abs(token_logps(tuned, batch).numpy() - ours).max())
    found.gradient, found.targets = compare(gradients, gradients_of(tuned, batch))
    bound_of_gradient = GRADIENT[backend]
    if found.gradient > bound_of_gradient:
        bound_of_gradient += min(2 * gradient_noise(tuned, batch), GRADIENT_ROUNDING)
    found.merged = float(np.abs(token_logps(independent(merged), batch).numpy() - ours).max())
    if not np.abs(ours - reference).max() > 1e-3:
        found.wrong.append("three steps changed nothing")
    bound_of_logps = LOGPS[backend]
    if max(found.logps, found.reloaded, found.merged) > bound_of_logps:
        found.rounding = min(2 * noise(independent(merged), batch), ROUNDING)  # of each of the two that are compared
        bound_of_logps += found.rounding
    for what, value, bound in (
        ("log-probs", found.logps, bound_of_logps),
        ("the saved adapter's log-probs", found.reloaded, bound_of_logps),
        ("the merged model's log-probs", found.merged, bound_of_logps),
        ("gradients", found.gradient, bound_of_gradient),
    ):
        if not value <= bound:
            found.wrong.append(f"{what} {value:.2g} off, {bound:.2g} allowed")
    return found


def independent(model: Path) -> Any:
    """Return transformers' model of a folder, in float32 with eager attention."""
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    causal = type(AutoConfig.from_pretrained(model)) in MODEL_FOR_CAUSAL_LM_MAPPING
    with _still():
        kind = AutoModelForCausalLM if causal else AutoModelForImageTextToText
        return kind.from_pretrained(model, **options).eval().requires_grad_(False)


@contextmanager
def _still() -> Iterator[None]:
    """Keep torch's random numbers as they are: some models draw weights that they then load."""
    with torch.random.fork_rng():
        yield


def token_logps(model: Any, batch: Batch) -> torch.Tensor:
    """Return the log-probs of all response tokens, by the textbook."""
    with torch.no_grad():
        return torch.cat(sequences(model, batch))


def noise(model: Any, batch: Batch) -> float:
    """Return float32's own error of a model's log-probs: its largest difference from the same weights in float64."""
    model.set_experts_implementation("eager")  # grouped products take no float64
    before = token_logps(model, batch)
    return float((token_logps(model.double(), batch) - before).abs().max())


def gradient_noise(model: Any, batch: Batch) -> float:
    """Return float32's own error of a model's gradients, which is then in float64; see `compare`."""
    model.get_base_model().set_experts_implementation("eager")  # grouped products take no float64
    before = gradients_of(model, batch)
    found, _ = compare(before, gradients_of(model.double(), batch))
    return found


def sequences(model: Any, batch: Batch) -> list[torch.Tensor]:
    """Return each response's token log-probs."""
    found = []
    for response, prompt in zip(batch.responses, batch.prompt_of, strict=True):
        start = len(batch.prompts[prompt])
        ids = torch.from_numpy(np.concatenate([batch.prompts[prompt], response]))[None]
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1).float()
        found.append(logps.gather(-1, ids[0, 1:, None])[start - 1 :, 0])
    return found


def gradients_of(model: Any, batch: Batch) -> Adapter:
    """Return the gradient of lsif (Table 1 of the paper, mean log-ratios) for each weight of the adapter."""
    with model.disable_adapter(), torch.no_grad():
        reference = [values.mean() for values in sequences(model, batch)]
    weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
    policy = [values.mean() for values in sequences(model, batch)]
    loss = torch.zeros(())
    for sign, ours, theirs in zip(batch.signs, policy, reference, strict=True):
        ratio = (ours - theirs).exp()
        loss = loss + (-ratio if sign > 0 else ratio**2 / 2)
    grads = torch.autograd.grad(loss / (len(policy) / 2), list(weights.values()), allow_unused=True)
    return {
        common_name(name): np.zeros(weight.T.shape) if grad is None else grad.numpy().T
        for (name, weight), grad in zip(weights.items(), grads, strict=True)
    }


def compare(ours: Adapter, theirs: Adapter) -> tuple[float, list[str]]:
    """Return the largest distance of a weight's gradient as a share of its norm, and the last names of the adapted layers."""
    ours, theirs = ({_layer(name): value for name, value in some.items()} for some in (ours, theirs))
    targets = sorted({name.split(".")[-2] for name in ours})
    if ours.keys() != theirs.keys():
        return float("inf"), targets
    norms = {name: float(np.linalg.norm(value)) for name, value in theirs.items()}
    if not min(norms.values()) > 0:  # a weight that nothing flows to must not have an adapter
        return float("nan"), targets
    return max(float(np.linalg.norm(ours[name] - value)) / norms[name] for name, value in theirs.items()), targets


def _layer(name: str) -> str:
    """Return a weight's name without the parts around the decoder, which the libraries call differently."""
    parts = name.split(".")
    while parts[0] in ("model", "language_model", "transformer", "backbone"):
        del parts[0]
    return ".".join(parts)
