"""The MLX backend: mlx-lm's models, quantisation and adapter format, on Apple silicon (Metal) or on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from lite_dil.backends.limits import check_options, check_strength, check_trains, checkpointing
from lite_dil.backends.mlx import generate as mlx_generate
from lite_dil.backends.mlx.head import token_logps
from lite_dil.backends.mlx.load import (
    BITS,
    causal_lm,
    check_windows,
    limit_memory,
    load,
    load_tensors,
    output_head,
    quantise,
    set_dtype,
)
from lite_dil.backends.mlx.lora import add_lora, linear_layers
from lite_dil.backends.mlx.prefix import NoPrefix, Pass, Rows, arrays, wrap_layers
from lite_dil.backends.options import EngineOptions, LoadOptions
from lite_dil.backends.probes import HeadMismatch, head_probe, layout_probe, tolerance
from lite_dil.backends.switch import switched
from lite_dil.backends.types import OWN, Answer, MicroBatch, Sampling, StepResult, joined, never
from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.batching.layouts import plain, prefix
from lite_dil.models import adapters
from lite_dil.models.find import folder_of
from lite_dil.models.logits import logit_transform
from lite_dil.models.options import ModelOptions, ResolvedAdapter
from lite_dil.objectives.loss import NOTHING, SUMS, Loss

# What an unknown model's code raises where a cache is not what it expects.
MODEL_ERRORS = (NoPrefix, TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, AssertionError)
COMPILED_MULTIPLE = 64  # tokens; shapes must repeat, or the step is compiled anew for every batch


class MLXBackend:
    """A causal language model of mlx-lm with a LoRA adapter; see `lite_dil.backends.Backend`."""

    name = "mlx"
    pads_attention = mx.metal.is_available()  # a GPU wants few large products, a CPU little work

    def __init__(
        self, options: ModelOptions, model: str, adapter_options: ResolvedAdapter | None, training: EngineOptions | None
    ) -> None:
        check_options("mlx", options, training)
        config = LoadOptions.of(options, adapter_options, training)
        limit_memory()
        initial = adapters.read(config.init_adapter, load_tensors) if config.init_adapter else None
        self.model, self.config, bits = load(folder_of(model), model, config)
        self.dtype = set_dtype(self.model, config.dtype, pre_quantised=bool(bits))
        self.dtype_name = str(self.dtype).removeprefix("mlx.core.")
        self.model, quantised = quantise(self.model, self.config, config, model, bits)
        mx.eval(self.model.parameters())
        parameters = sum(
            value.size * (32 // BITS if value.dtype == mx.uint32 else 1) for _, value in tree_flatten(self.model.parameters())
        )
        adapter = adapters.choose(config, linear_layers(self.model), initial, model)
        self.switch = add_lora(self.model, adapter, config.lora_dropout or 0.0, config.reference == "initial-adapter")
        self.seed, self.passes = config.seed, 0
        self.transform = logit_transform(self.config)
        self.vocabulary = output_head(self.model)[1].weight.shape[0]
        wrap_layers(self.model, checkpointing(config, parameters))
        self.max_grad_norm = config.max_grad_norm
        self.optimizer = optimizers.AdamW(0.0, weight_decay=config.weight_decay, bias_correction=True)
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
        self.compile = mx.metal.is_available() if config.compile is None else config.compile
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.layout, self.layout_reason, self.head_axes = "plain", "", 1
        self.model.eval()
        check_windows(self.config, self._windows(), config.max_length, model)
        self._check_head(model)
        self._choose_layout(config, model)
        device = "Metal" if mx.metal.is_available() else "CPU"
        self.identity = f"mlx {self.dtype_name} {quantised}".strip()
        self.description = ", ".join(filter(None, [f"mlx ({device})", self.dtype_name, quantised, f"{self.layout} layout"]))

    def adapter_off(self) -> AbstractContextManager[None]:
        """Make the model the reference inside the block."""

        def flip(on: bool) -> None:
            self.switch.reference = on

        return switched(flip)

    def token_logps(self, batch: Batch) -> np.ndarray:
        """Return the log-prob of every response token, without dropout; shape (tokens,), float32."""
        self.model.eval()
        return np.array(self._token_logps(self._arrays(batch), with_grad=False))[: int(batch.lengths.sum())]

    def sequence_logps(self, batch: Batch) -> np.ndarray:
        """Return the summed log-prob of every response, without dropout; shape (responses,), float32."""
        self.model.eval()
        return np.array(self._read(self._arrays(batch), SUMS))

    def step(self, passes: Sequence[MicroBatch], loss: Loss, learning_rate: float) -> StepResult:
        """Take one AdamW step on the mean loss over all examples of `passes`."""
        check_trains(self.strength)
        self.optimizer.init(self.model.trainable_parameters())  # what is not there yet: inference never needs it
        self.model.train()
        examples = sum(one.batch.examples for one in passes)
        total, grads, policies, references = 0.0, None, [], []
        for one in passes:
            arrays, tokens, reference = self._arrays(one.batch), int(one.batch.lengths.sum()), None
            if one.reference is not None:
                reference = mx.array(np.asarray(one.reference, np.float32))
            elif loss.reference != NOTHING:
                with self.adapter_off():
                    reference = mx.stop_gradient(self._read(arrays, loss.reference))
                    mx.eval(reference)
            value, policy, grad = self._loss_and_grad(loss, one.inputs, arrays, reference, examples)
            grads = grad if grads is None else tree_map(mx.add, grads, grad)
            mx.eval(value, policy, grads)  # frees this micro-batch's activations before the next
            total += value.item()
            policies.append(_read_out(policy, loss.reads, tokens))
            references.append(None if reference is None else _read_out(reference, loss.reference, tokens))

        grads, norm = optimizers.clip_grad_norm(grads, self.max_grad_norm)
        if np.isfinite([norm.item(), total]).all():
            self.optimizer.learning_rate = learning_rate
            self.optimizer.update(self.model, grads)
            mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        return StepResult(total, norm.item(), np.concatenate(policies), joined(references))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_ids: Sequence[int],
        seeds: Sequence[int] | None = None,
        sampling: Sampling = OWN,
        stop: Callable[[], bool] = never,
    ) -> list[Answer]:
        """Continue the prompts, in one batch where the model's cache allows it."""
        self.model.eval()
        return mlx_generate.generate(self.model, prompts, max_new_tokens, end_ids, seeds, sampling, stop)

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        end_ids: Sequence[int],
        seed: int | None = None,
        sampling: Sampling = OWN,
    ) -> Iterator[int]:
        """Continue one prompt, token by token."""
        self.model.eval()
        (processor,) = mlx_generate.processors_of([prompt], None if seed is None else [seed], sampling)
        return mlx_generate.stream(self.model, prompt, max_new_tokens, end_ids, processor)

    @property
    def strength(self) -> float:
        """What the policy's adapter is multiplied by."""
        return self.switch.strength

    def set_strength(self, value: float) -> None:
        """Multiply the policy's adapter."""
        self.switch.strength = check_strength(value)
        self._compiled.clear()  # it is baked into the traces

    def save_adapter(self, folder: Path) -> None:
        """Write the policy's adapter in mlx-lm's format."""
        folder.mkdir(exist_ok=True)
        _save(folder / "adapters.safetensors", self.model.trainable_parameters())
        (folder / "adapter_config.json").write_text(json.dumps(self.adapter_config, indent=2) + "\n", encoding="utf-8")

    def save_state(self, folder: Path) -> None:
        """Write adapter, optimiser and how many passes have drawn dropout masks."""
        state = {
            "adapter": self.model.trainable_parameters(),
            "optimizer": self.optimizer.state,
            "passes": mx.array(self.passes),
        }
        _save(folder / "state.safetensors", state)

    def load_state(self, folder: Path) -> None:
        """Go on exactly where `save_state` was called."""
        state = tree_unflatten(list(mx.load(str(folder / "state.safetensors")).items()))
        self.model.update(state["adapter"])
        self.optimizer.state = state["optimizer"]
        self.passes = state["passes"].item()

    def peak_memory_mb(self) -> float:
        """Return MLX's own peak, in MiB."""
        return mx.get_peak_memory() / 2**20

    def _arrays(self, batch: Batch) -> dict[str, Any]:
        """Lay the batch out as this backend does; what a pure function of it takes. Compiled ones get arrays alone."""
        multiple = COMPILED_MULTIPLE if self.compile else 1
        if self.layout == "prefix":
            layout = prefix(batch, multiple=multiple)
            made = arrays(layout, multiple)
            rows = None if self.compile or self.pads_attention else Rows.of(layout)
        else:
            repeated, rows = plain(batch, multiple=multiple), None
            made = {"ids": repeated.input_ids}
            for name in ("hidden_index", "targets", "token_index", "token_mask"):
                value = getattr(repeated, name)
                made[name] = np.pad(value, [*[(0, 0)] * (value.ndim - 1), (0, -value.shape[-1] % multiple)])
        out: dict[str, Any] = {n: mx.array(v.astype(np.int32) if v.dtype == np.int64 else v) for n, v in made.items()}
        return out if rows is None else out | {"rows": rows}

    def _loss_and_grad(
        self,
        loss: Loss,
        inputs: dict[str, np.ndarray],
        arrays: dict[str, mx.array],
        reference: mx.array | None,
        examples: int,
    ) -> tuple[mx.array, mx.array, Any]:
        """Return the loss, what it read of the policy, and the adapter's gradients."""
        self.passes += 1
        draw = int(np.random.SeedSequence((self.seed, self.passes)).generate_state(1)[0])

        def run(weights: Any, arrays: Any, reference: mx.array | None, inputs: Any, share: mx.array, key: mx.array) -> Any:
            def value(weights: Any) -> tuple[mx.array, mx.array]:
                self.model.update(weights)
                logps = self._token_logps(arrays, with_grad=True)
                policy = _sums(logps, arrays) if loss.reads == SUMS else logps
                return loss(policy, reference, inputs) * share, policy

            with self._borrowed(key):  # also while checkpointed layers are traced again, after `value`
                return mx.value_and_grad(value)(weights)

        given = {}
        for name, array in inputs.items():
            if name in loss.token_inputs:  # tokens that fill up are behind the others
                array = np.pad(array, (0, arrays["targets"].size - len(array)))
            given[name] = mx.array(array.astype(np.int32) if array.dtype == np.int64 else array)
        rest = (arrays, reference, given, mx.array(1 / examples), mx.random.key(draw))
        (value, policy), grads = self._pure(("step", loss), run)(self.model.trainable_parameters(), *rest)
        return value, policy, grads

    def _read(self, arrays: dict[str, mx.array], what: str) -> mx.array:
        """Return summed log-probs, (responses,), or those of the tokens and of what fills them up, without a gradient."""

        def run(weights: Any, arrays: Any) -> mx.array:
            with self._borrowed(None):
                self.model.update(weights)
                logps = self._token_logps(arrays, with_grad=False)
                return _sums(logps, arrays) if what == SUMS else logps

        return self._pure(what, run)(self.model.trainable_parameters(), arrays)

    def _pure(self, name: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of arrays alone, compiled if asked; a trace bakes the switch into itself, so there is one each."""
        if not self.compile:
            return function
        return self._compiled.setdefault((name, self.switch.reference), mx.compile(function))

    @contextmanager
    def _borrowed(self, key: mx.array | None) -> Iterator[None]:
        """Let a trace put its own arrays into the model, and the model's back after it."""
        own, self.switch.key = self.model.trainable_parameters(), key
        try:
            yield
        finally:
            self.model.update(own)
            self.switch.key = None

    def _token_logps(self, inputs: dict[str, mx.array], with_grad: bool) -> mx.array:
        """Return the log-probs of the response tokens, and of those that fill up."""
        decoder = causal_lm(self.model).model
        if "hidden_index" in inputs:
            hidden = decoder(inputs["ids"])
            hidden = hidden.reshape(-1, hidden.shape[-1])[inputs["hidden_index"]]
        else:
            hidden = decoder(
                inputs["ids"], cache=[Pass(inputs, self.head_axes, rows=inputs.get("rows"))] * len(self.model.layers)
            )[0]
        return token_logps(hidden, self._project, inputs["targets"], self.vocabulary, self.transform, with_grad)

    def _project(self, hidden: mx.array) -> mx.array:
        head = output_head(self.model)[1]
        return head(hidden) if "lm_head" in causal_lm(self.model) else head.as_linear(hidden)

    def _windows(self) -> list[int | None] | None:
        """Return the window that mlx-lm gives each layer, or None where that cannot be told."""
        probe: list[int | None] = []
        layers = len(self.model.layers)
        try:
            causal_lm(self.model).model(mx.array([[0, 1]]), cache=[Pass({}, probe=probe)] * layers)
        except MODEL_ERRORS:  # a loop that does more than run its layers
            return None
        return probe if len(probe) == layers else None

    def _choose_layout(self, config: LoadOptions, model: str) -> None:
        """Take the prefix layout where it agrees with the plain one on a few tokens, and say why not elsewhere."""
        if config.layout == "plain":
            return
        batch = layout_probe(self.vocabulary)
        expected = self.token_logps(batch)
        self.layout, reason = "prefix", ""
        for self.head_axes in (1, 2):
            try:
                difference = float(np.abs(self.token_logps(batch) - expected).max())
                if difference < tolerance(self.dtype_name):
                    return
                reason = reason or f"its log-probs would be off by {difference:.2g} nats"
            except NoPrefix as error:
                reason = str(error)
            except MODEL_ERRORS as error:
                reason = reason or f"its code does not take it ({type(error).__name__})"
        self.layout = "plain"
        self.layout_reason = f"plain layout: {reason}"
        if config.layout == "prefix":
            raise UserError(f"--layout prefix cannot be had for {model}: {reason}; use --layout plain")

    def _check_head(self, model: str) -> None:
        """Compare with the model's own logits on a few tokens; an unknown architecture must not be trained wrongly."""
        batch = head_probe(self.vocabulary)
        ids = np.concatenate([*batch.prompts, *batch.responses])
        try:
            logits = self.model(mx.array(ids[None, :-1]))[0].astype(mx.float32)
            here = self.token_logps(batch)
        except TypeError:  # some of mlx-lm's older models insist on a cache
            raise UserError(f"--model {model}: mlx-lm builds this architecture in a way that lite-dil does not know") from None
        logps = logits - mx.logsumexp(logits, -1, keepdims=True)
        own = np.array(mx.take_along_axis(logps, mx.array(ids[1:, None]), -1)[:, 0])
        difference = float(np.abs(own - here).max())
        if not difference < tolerance(self.dtype_name):
            raise HeadMismatch(model, difference)


def _sums(logps: mx.array, inputs: dict[str, mx.array]) -> mx.array:
    """Sum values of the response tokens over each response: (tokens,) to (responses,)."""
    return (logps[inputs["token_index"]] * inputs["token_mask"]).sum(-1)


def _keys(model: Any, adapter: adapters.Adapter) -> list[str]:
    """Return the adapted layers' names within a block, as mlx-lm's adapter_config.json wants them."""
    prefix = next(name for name, module in model.named_modules() if module is model.layers[0]).rpartition("0")[0]
    return sorted({name.removeprefix(prefix).partition(".")[2] for name in adapter.weights})


def _read_out(values: mx.array, what: str, tokens: int) -> np.ndarray:
    """Return what was read as numpy has it, without what fills the tokens up."""
    return np.array(values) if what == SUMS else np.array(values)[:tokens]


def _save(path: Path, tree: Any) -> None:
    with path.open("wb") as file:  # Python's own file says why where it cannot be written
        mx.save_safetensors(file, dict(tree_flatten(tree)))
