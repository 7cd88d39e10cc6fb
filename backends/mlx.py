"""The MLX backend: mlx-lm's models, quantisation and adapter format, on Apple silicon (Metal) or on a CPU."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model, quantize_model

from lite_dil import adapters
from lite_dil.backends import PairLosses, StepResult, switched, wants_checkpointing
from lite_dil.backends.head import HeadMismatch, logit_transform
from lite_dil.backends.mlx_head import token_logps
from lite_dil.backends.mlx_lora import add_lora, checkpoint_layers, linear_layers
from lite_dil.batch import Batch
from lite_dil.config import TrainConfig
from lite_dil.errors import UserError, first_line
from lite_dil.layouts import plain

GROUP_SIZE, BITS = 64, 4


class MLXBackend:
    """A causal language model of mlx-lm with a LoRA adapter; see `lite_dil.backends.Backend`."""

    name = "mlx"

    def __init__(self, config: TrainConfig, model: str) -> None:
        if config.optim == "paged_adamw_8bit":
            raise UserError("--optim paged_adamw_8bit is for the cuda and cpu backends; use adamw with mlx")
        if config.dtype == "float16":
            raise UserError("--dtype float16 is for the cuda backend, which scales the loss for it; use bfloat16 with mlx")
        initial = adapters.read(config.init_adapter, _load_tensors) if config.init_adapter else None
        folder = _folder(model)
        self.model, self.config, bits = _load(folder, model, config)
        self.dtype = _set_dtype(self.model, config.dtype, pre_quantised=bool(bits))
        self.dtype_name = str(self.dtype).removeprefix("mlx.core.")
        if config.load_in_4bit and not bits:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints how many bits a weight came to
                self.model, _ = quantize_model(self.model, self.config, GROUP_SIZE, BITS)
            bits = BITS
        mx.eval(self.model.parameters())
        parameters = sum(
            value.size * (32 // BITS if value.dtype == mx.uint32 else 1) for _, value in tree_flatten(self.model.parameters())
        )
        adapter = adapters.choose(config, linear_layers(self.model), initial)
        self.switch = add_lora(self.model, adapter, config.lora_dropout or 0.0, config.reference == "initial-adapter")
        self.seed, self.passes = config.seed, 0
        self.transform = logit_transform(self.config)
        self.vocabulary = int(self._project(mx.zeros((1, self._width()), self.dtype)).shape[-1])
        if wants_checkpointing(config, parameters):
            checkpoint_layers(self.model)
        self.max_grad_norm = config.max_grad_norm
        self.optimizer = optimizers.AdamW(config.learning_rate or 0.0, weight_decay=config.weight_decay, bias_correction=True)
        self.optimizer.init(self.model.trainable_parameters())
        self.adapter_config = {
            "fine_tune_type": "lora",
            "num_layers": len(self.model.layers),
            "lora_parameters": {
                "rank": adapter.rank,
                "scale": adapter.scale,
                "dropout": config.lora_dropout or 0.0,
                "keys": _keys(self.model, adapter),
            },
            "model": model,
        }
        self._check_head(model)
        device = "Metal" if mx.metal.is_available() else "CPU"
        quantised = f", {bits}-bit" if bits else ""
        self.description = f"mlx ({device}), {self.dtype_name}{quantised}"

    def adapter_off(self) -> AbstractContextManager[None]:
        """Make the model the reference inside the block."""

        def flip(on: bool) -> None:
            self.switch.reference = on

        return switched(flip)

    def token_logps(self, batch: Batch) -> np.ndarray:
        """Return the log-prob of every response token, without dropout; shape (tokens,), float32."""
        self.model.eval()
        return np.array(self._token_logps(batch, with_grad=False)[0])

    def sequence_logps(self, batch: Batch) -> np.ndarray:
        """Return the summed log-prob of every response, without dropout; shape (responses,), float32."""
        self.model.eval()
        return np.array(self._sequence_logps(batch, with_grad=False))

    def step(self, batches: Sequence[Batch], losses: PairLosses, learning_rate: float) -> StepResult:
        """Take one AdamW step on the mean loss over all pairs of `batches`."""
        self.model.train()
        pairs = sum(batch.pairs for batch in batches)
        total, grads, policies, references = 0.0, None, [], []
        for batch in batches:
            with self.adapter_off():
                reference = mx.stop_gradient(self._sequence_logps(batch, with_grad=False))
                mx.eval(reference)
            (loss, policy), grad = self._loss_and_grad(batch, reference, losses, pairs)
            grads = grad if grads is None else tree_map(mx.add, grads, grad)
            mx.eval(loss, policy, grads)  # frees this micro-batch's activations before the next
            total += loss.item()
            policies.append(np.array(policy))
            references.append(np.array(reference))

        grads, norm = optimizers.clip_grad_norm(grads, self.max_grad_norm)
        if np.isfinite(norm.item()):
            self.optimizer.learning_rate = learning_rate
            self.optimizer.update(self.model, grads)
            mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        return StepResult(total, norm.item(), np.concatenate(policies), np.concatenate(references))

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_ids: Sequence[int]) -> list[list[int]]:
        """Continue each prompt greedily, one after the other."""
        self.model.eval()
        answers = []
        for prompt in prompts:
            answer: list[int] = []
            for token, _ in generate_step(mx.array(list(prompt)), self.model, max_tokens=max_new_tokens):
                if int(token) in end_ids:
                    break
                answer.append(int(token))
            answers.append(answer)
        return answers

    def save_adapter(self, folder: Path) -> None:
        """Write the policy's adapter in mlx-lm's format."""
        folder.mkdir(exist_ok=True)
        mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(self.model.trainable_parameters())))
        (folder / "adapter_config.json").write_text(json.dumps(self.adapter_config, indent=2) + "\n", encoding="utf-8")

    def save_state(self, folder: Path) -> None:
        """Write adapter, optimiser and how many passes have drawn dropout masks."""
        state = {
            "adapter": self.model.trainable_parameters(),
            "optimizer": self.optimizer.state,
            "passes": mx.array(self.passes),
        }
        mx.save_safetensors(str(folder / "state.safetensors"), dict(tree_flatten(state)))

    def load_state(self, folder: Path) -> None:
        """Go on exactly where `save_state` was called."""
        state = tree_unflatten(list(mx.load(str(folder / "state.safetensors")).items()))
        self.model.update(state["adapter"])
        self.optimizer.state = state["optimizer"]
        self.passes = state["passes"].item()

    def peak_memory_mb(self) -> float:
        """Return MLX's own peak, in MiB."""
        return mx.get_peak_memory() / 2**20

    def _loss_and_grad(
        self, batch: Batch, reference: mx.array, losses: PairLosses, pairs: int
    ) -> tuple[tuple[mx.array, mx.array], Any]:
        lengths, chosen, rejected = map(mx.array, (batch.lengths, batch.chosen, batch.rejected))
        self.passes += 1
        self.switch.draw = int(np.random.SeedSequence((self.seed, self.passes)).generate_state(1)[0])

        def loss() -> tuple[mx.array, mx.array]:
            policy = self._sequence_logps(batch, with_grad=True)
            return losses(policy, reference, lengths, chosen, rejected).sum() / pairs, policy

        return nn.value_and_grad(self.model, loss)()

    def _token_logps(self, batch: Batch, with_grad: bool) -> tuple[mx.array, Any]:
        layout = plain(batch)
        hidden = self._decoder()(mx.array(layout.input_ids))
        hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(layout.hidden_index)]
        targets = mx.array(layout.targets)
        return token_logps(hidden, self._project, targets, self.vocabulary, self.transform, with_grad), layout

    def _sequence_logps(self, batch: Batch, with_grad: bool) -> mx.array:
        logps, layout = self._token_logps(batch, with_grad)
        return (logps[mx.array(layout.token_index)] * mx.array(layout.token_mask)).sum(-1)

    def _causal_lm(self) -> Any:
        """The text model: mlx-lm wraps that of a multimodal checkpoint once more."""
        return getattr(self.model, "language_model", self.model)

    def _decoder(self) -> Any:
        return self._causal_lm().model

    def _project(self, hidden: mx.array) -> mx.array:
        causal_lm = self._causal_lm()
        if "lm_head" in causal_lm:
            return causal_lm.lm_head(hidden)
        return causal_lm.model.embed_tokens.as_linear(hidden)

    def _width(self) -> int:
        return int(self._decoder()(mx.array([[0]])).shape[-1])

    def _check_head(self, model: str) -> None:
        """Compare with the model's own logits on a few tokens; an unknown architecture must not be trained wrongly."""
        ids = np.random.default_rng(0).integers(0, self.vocabulary, 9)
        logits = self.model(mx.array(ids[None, :-1]))[0].astype(mx.float32)
        logps = logits - mx.logsumexp(logits, -1, keepdims=True)
        own = np.array(mx.take_along_axis(logps, mx.array(ids[1:, None]), -1)[:, 0])
        batch = Batch([ids[:1]], [ids[1:]], np.array([0]), np.array([1]))
        difference = float(np.abs(own - self.token_logps(batch)).max())
        if not difference < (1e-3 if self.dtype == mx.float32 else 0.3):
            raise HeadMismatch(model, difference)


def _folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "model*.safetensors", "*.jinja", "tokenizer.model"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"--model {model}: cannot be had from the hub ({first_line(error)})") from None


def _load(folder: Path, name: str, config: TrainConfig) -> tuple[Any, dict[str, Any], int]:
    """Return the model, its config and the bits that the checkpoint is quantised to (0 where it is not)."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (method := (raw.get("quantization_config") or {}).get("quant_method")) == "bitsandbytes":
        raise UserError(f"--model {name}: its weights are packed by {method}, for CUDA; give the 16-bit model, with --4bit")
    try:
        model, loaded = load_model(folder, lazy=True, model_config=rope_config(raw))
    except FileNotFoundError:
        raise UserError(f"--model {name}: no model*.safetensors in {folder}; MLX reads no other weights") from None
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"--model {name}: mlx-lm cannot load it ({first_line(error)})") from None
    bits = int((loaded.get("quantization") or {}).get("bits", 0))
    if config.load_in_4bit and bits not in (0, BITS):
        raise UserError(f"--4bit: {name} is quantised to {bits} bits already; leave --4bit out")
    return model, loaded, bits


def rope_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return what to add to a config.json so that mlx-lm rotates as the model was trained to.

    transformers 5 writes ``rope_parameters``, which mlx-lm 0.32 does not read for Llama and others: it takes theta 10000
    instead and says nothing.
    """
    if "text_config" in config:
        return {"text_config": config["text_config"] | rope_config(config["text_config"])}
    rope = config.get("rope_parameters")
    if not rope:
        return {}
    added: dict[str, Any] = {}
    if rope.keys() == {"full_attention", "sliding_attention"}:  # Gemma 3: one rope a layer type
        added["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if "rope_theta" not in rope:
        raise UserError(f"config.json: rope_parameters has {', '.join(rope)}; expected rope_theta, which mlx-lm must be told")
    added["rope_theta"] = rope["rope_theta"]
    added["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    if "partial_rotary_factor" in rope:
        added["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return added


def _set_dtype(model: Any, name: str, pre_quantised: bool) -> mx.Dtype:
    """Cast the floating weights (lazily) and return the type that the model computes in."""
    if name == "auto" and pre_quantised:
        own = next(value.dtype for key, value in tree_flatten(model.parameters()) if key.endswith("scales"))
        # A quantised checkpoint keeps its scales: rounding them again would be another model. float16 would need loss
        # scaling, and goes to float32, which holds it exactly.
        dtype = own if own in (mx.bfloat16, mx.float32) else mx.float32
    elif name == "auto":
        dtype = mx.bfloat16 if mx.metal.is_available() else mx.float32
    else:
        dtype = getattr(mx, name)
    model.set_dtype(dtype)
    return dtype


def _load_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return {name: np.array(value.astype(mx.float32)) for name, value in mx.load(str(path)).items()}
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None


def _keys(model: Any, adapter: adapters.Adapter) -> list[str]:
    """Return the adapted layers' names within a block, as mlx-lm's adapter_config.json wants them."""
    prefix = next(name for name, module in model.named_modules() if module is model.layers[0]).rpartition("0")[0]
    return sorted({name.removeprefix(prefix).partition(".")[2] for name in adapter.weights})
