"""The MLX backend: mlx-lm's models, quantisation and adapter format, on Apple silicon (Metal) or on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_map

from lite_dil.backends.foreign import Misfit
from lite_dil.backends.limits import (
    BITS,
    COMPILED_MULTIPLE,
    check_name,
    check_options,
    check_strength,
    check_trains,
    checkpointing,
)
from lite_dil.backends.mlx import generate as mlx_generate
from lite_dil.backends.mlx import state as mlx_state
from lite_dil.backends.mlx.adapters import Adapters
from lite_dil.backends.mlx.head import token_hits, token_logps
from lite_dil.backends.mlx.inputs import as_mlx, cut, filled, inputs_of, sums
from lite_dil.backends.mlx.load import TABLES, decode, limit_memory, load, output_head, quantise, set_dtype
from lite_dil.backends.mlx.prefix import Pass, RowLengths
from lite_dil.backends.mlx.probing import check_head
from lite_dil.backends.mlx.repairs import wrap
from lite_dil.backends.mlx.twin import check_twin
from lite_dil.backends.options import EngineOptions
from lite_dil.backends.probes import layout_probe, tolerance
from lite_dil.backends.types import OWN, POLICY, REFERENCE, Generated, Head, MicroBatch, Sampling, StepResult, joined, never
from lite_dil.base.display import Count, uncounted
from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.batching.layouts import plain, prefix
from lite_dil.models import adapter_files, adapters
from lite_dil.models.find import folder_of
from lite_dil.models.logits import logit_transform
from lite_dil.models.options import ALL_LINEAR, ModelOptions, ResolvedAdapter
from lite_dil.models.spelling import text_only
from lite_dil.objectives.loss import NOTHING, SCORES, SUMS, TOKENS, Loss

INFERENCE = EngineOptions(layout="plain", gradient_checkpointing="off")


class MLXBackend:
    """An mlx-lm causal language model with named LoRA adapters; see `lite_dil.backends.protocol.Backend`."""

    name = "mlx"
    pads_attention = mx.metal.is_available()  # a GPU prefers few large products, a CPU less work

    def __init__(
        self,
        options: ModelOptions,
        model: str,
        adapter: ResolvedAdapter | None,
        training: EngineOptions | None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        check_options("mlx", options, training)
        self.training, engine = training, training or INFERENCE
        limit_memory()
        initial = adapter_files.read_adapter(adapter.init_adapter) if adapter and adapter.init_adapter else None
        folder = folder_of(model, options.trust_remote_code)
        self.model, self.config, bits = load(folder, model, options)
        self.dtype = set_dtype(self.model, options.dtype, pre_quantised=bool(bits))
        self.dtype_name = str(self.dtype).removeprefix("mlx.core.")
        self.model, quantised = quantise(self.model, self.config, options, model, bits)
        mx.eval(self.model.parameters())
        parameters = sum(
            value.size * (32 // BITS if value.dtype == mx.uint32 else 1) for _, value in tree_flatten(self.model.parameters())
        )
        self.seed = adapter.seed if adapter else 0
        self.weight_decay, self.max_grad_norm = engine.weight_decay, engine.max_grad_norm
        wrap(self.model, self.config, checkpointing(engine, parameters))
        compared = check_twin(self.model, folder, model, self.config, engine.max_length, options.trust_remote_code)
        if compared.remark and say:
            say(compared.remark)
        self.adapters = Adapters(self.model, model, self._new_optimizer, text_only(self.config))
        self.adapters.shapes = compared.adaptable(self.adapters.shapes)
        self.experts = adapters.experts_of(self.config.get("text_config") or self.config)
        if adapter is None:  # the policy is the bare base
            self.adapters.add(POLICY, adapters.Adapter(0, 1.0, {}))
        else:
            first = adapters.choose(adapter, self.adapters.shapes, initial, model, self.experts)
            self.adapters.add(POLICY, first, adapter.lora_dropout)
            if adapter.reference == "initial-adapter":
                self.adapters.add(REFERENCE, first)
        self.adapters.switch_to(POLICY)
        self.transform = logit_transform(self.config)
        self.vocabulary = output_head(self.model)[1].weight.shape[0]
        self.compile = mx.metal.is_available() if engine.compile is None else engine.compile
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.layout, self.layout_reason, self.head_axes = "plain", "", 1
        self.model.eval()
        check_head(self.model, self.token_logps, self.vocabulary, model, self.dtype_name)
        self._choose_layout(engine.layout, model)
        self.batched = mlx_generate.batchable(self.model)
        device = "Metal" if mx.metal.is_available() else "CPU"
        self.identity = f"mlx {self.dtype_name} {quantised}".strip()
        self.description = ", ".join(filter(None, [f"mlx ({device})", self.dtype_name, quantised, f"{self.layout} layout"]))

    def using(self, name: str) -> AbstractContextManager[None]:
        """Activate adapter `name` inside the block."""
        return self.adapters.using(name)

    def adapter_off(self) -> AbstractContextManager[None]:
        """Activate the reference inside the block."""
        return self.using(REFERENCE)

    def add_adapter(
        self,
        name: str,
        rank: int,
        alpha: float,
        targets: str = ALL_LINEAR,
        dropout: float = 0.0,
        head: Head | None = None,
    ) -> None:
        """Add a new, trainable adapter on the same base."""
        check_name(name, self.adapters.names)
        shapes = adapters.select_targets(self.adapters.shapes, targets, self.experts)
        self.adapters.add(name, adapters.fresh(shapes, rank, alpha / rank, self.seed, name), dropout, head)

    def load_adapter(self, name: str, folder: Path) -> None:
        """Add an adapter from its files, with its head if it has one."""
        check_name(name, self.adapters.names)
        mlx_state.load_adapter(folder, self.adapters, name, text_only(self.config))

    def set_head(self, head: Head | None) -> None:
        """Give the policy a head that starts at zero, or take its head away."""
        self.adapters.set_head(head)
        self._compiled.clear()  # traces contain the head or its lack

    def renew_policy(self, adapter: ResolvedAdapter) -> None:
        """Reset the policy to its initial weights and training state."""
        initial = adapter_files.read_adapter(adapter.init_adapter) if adapter.init_adapter else None
        first = adapters.choose(adapter, self.adapters.shapes, initial, self.adapters.base, self.experts)
        self.adapters.add(POLICY, first, adapter.lora_dropout)
        self.seed = adapter.seed
        self.adapters.switch_to(self.adapters.on)
        self._compiled.clear()  # traces contain the old adapter's strength and scale

    def _new_optimizer(self) -> optimizers.Optimizer:
        return optimizers.AdamW(0.0, weight_decay=self.weight_decay, bias_correction=True)

    def token_logps(self, batch: Batch) -> np.ndarray:
        """Return the log-prob of every response token, without dropout; shape (tokens,), float32."""
        self.model.eval()
        return cut(self._token_logps(self._arrays(batch), with_grad=False), batch)

    def token_hits(self, batch: Batch) -> np.ndarray:
        """Return the log-prob of every response token and whether it is the most likely one, (tokens, 2) float32."""
        self.model.eval()
        inputs = self._arrays(batch)
        read = self._states(inputs), self._project, inputs["targets"], self.vocabulary, self.transform
        return cut(token_hits(*read), batch)

    def sequence_logps(self, batch: Batch) -> np.ndarray:
        """Return the summed log-prob of every response, without dropout; shape (responses,), float32."""
        self.model.eval()
        return np.array(self._read(self._arrays(batch), SUMS))

    def scores(self, batch: Batch, adapter: str) -> np.ndarray:
        """Return the outputs of an adapter's head, without dropout: (responses, outputs) or (tokens, outputs)."""
        head = self.adapters[adapter].scores.spec
        with self.using(adapter):
            self.model.eval()
            return cut(self._read(self._arrays(batch, head), SCORES), batch)

    def step(
        self, passes: Sequence[MicroBatch], loss: Loss, learning_rate: float, adapter: str = POLICY, count: Count = uncounted
    ) -> StepResult:
        """Take one AdamW step of an adapter and its head on the mean loss over all examples of `passes`."""
        if adapter == REFERENCE:
            raise ValueError("the reference is never trained")
        if not self.adapters[adapter].layers:
            raise ValueError(f"adapter {adapter!r} is the bare base; there is nothing to train")
        if self.training is None:
            raise ValueError("the model was loaded for inference; load it with training options to train it")
        if adapter == POLICY:
            check_trains(self.strength)
        optimizer, examples = self.adapters[adapter].optimizer, sum(one.batch.examples for one in passes)
        head = self.adapters[adapter].scores.spec if loss.reads == SCORES else None
        total, grads, policies, references = 0.0, None, [], []
        with self.using(adapter):  # all of it, since checkpointed layers are traced again for the backward pass
            optimizer.init(self.model.trainable_parameters())  # state not there yet, since inference does not need it
            self.model.train()
            for one in passes:
                reference = self._reference(one, loss)
                value, policy, grad = self._loss_and_grad(loss, one.inputs, self._arrays(one.batch, head), reference, examples)
                grads = grad if grads is None else tree_map(mx.add, grads, grad)
                mx.eval(value, policy, grads)  # frees this micro-batch's activations before the next
                total += value.item()
                policies.append(cut(policy, one.batch))
                references.append(None if reference is None else cut(reference, one.batch))
                count(len(policies))

            grads, norm = optimizers.clip_grad_norm(grads, self.max_grad_norm)
            if np.isfinite([norm.item(), total]).all():
                optimizer.learning_rate = learning_rate
                optimizer.update(self.model, grads)
                mx.eval(self.model.trainable_parameters(), optimizer.state)
        clipped = norm.item() > self.max_grad_norm
        return StepResult(total, norm.item(), np.concatenate(policies), joined(references), clipped=clipped)

    def _reference(self, one: MicroBatch, loss: Loss) -> mx.array | None:
        """Return what the loss reads of the reference, given or computed."""
        if one.reference is not None:
            given = np.asarray(one.reference, np.float32)
            return mx.array(filled(given, self._multiple) if loss.reference == TOKENS else given)
        if loss.reference == NOTHING:
            return None
        with self.adapter_off():
            reference = mx.stop_gradient(self._read(self._arrays(one.batch), loss.reference))
            mx.eval(reference)
        return reference

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_ids: Sequence[int],
        seeds: Sequence[int] | None = None,
        sampling: Sampling = OWN,
        stop: Callable[[], bool] = never,
        done: Callable[[Sequence[int]], bool] | None = None,
    ) -> list[Generated]:
        """Continue the prompts, in one batch if the model's cache allows it."""
        self.model.eval()
        return mlx_generate.generate(self.model, prompts, max_new_tokens, end_ids, seeds, sampling, stop, done)

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
        """The factor on the policy's adapter."""
        return self.adapters[POLICY].shared.strength

    def set_strength(self, value: float) -> None:
        """Multiply the policy's adapter."""
        self.adapters[POLICY].shared.strength = check_strength(value)
        self._compiled.clear()  # the traces contain it

    def save_adapter(self, folder: Path, adapter: str = POLICY) -> None:
        """Write an adapter in mlx-lm's format, with its head."""
        mlx_state.save_adapter(folder, self.adapters, adapter)

    def save_state(self, folder: Path) -> None:
        """Write adapters, heads, optimisers and the number of passes that drew dropout masks."""
        mlx_state.save_state(folder, self.adapters)

    def load_state(self, folder: Path) -> None:
        """Restore the state of `save_state` exactly."""
        mlx_state.load_state(folder, self.adapters)

    def peak_memory_mb(self) -> float:
        """Return MLX's own peak, in MiB."""
        return mx.get_peak_memory() / 2**20

    def _arrays(self, batch: Batch, head: Head | None = None) -> dict[str, Any]:
        """Return the batch in this backend's layout, for log-probs or for a head, as inputs of a pure function.

        Compiled functions get only arrays.
        """
        if self.layout != "prefix":
            return inputs_of(plain(batch, multiple=self._multiple), self._multiple, head)
        layout = prefix(batch, multiple=self._multiple, own=head is not None)
        made: dict[str, Any] = inputs_of(layout, self._multiple, head)
        return made if self.compile or self.pads_attention else made | {"rows": RowLengths.of(layout)}

    @property
    def _multiple(self) -> int:
        return COMPILED_MULTIPLE if self.compile else 1

    def _loss_and_grad(
        self,
        loss: Loss,
        inputs: dict[str, np.ndarray],
        arrays: dict[str, mx.array],
        reference: mx.array | None,
        examples: int,
    ) -> tuple[mx.array, mx.array, Any]:
        """Return the loss, what it read, and the gradients of the active adapter and its head."""
        draw = self.adapters[self.adapters.on].draw(self.seed)

        def run(weights: Any, arrays: Any, reference: mx.array | None, inputs: Any, share: mx.array, key: mx.array) -> Any:
            def value(weights: Any) -> tuple[mx.array, mx.array]:
                self.model.update(weights)
                policy = self._compute(arrays, loss.reads, with_grad=True)
                return loss(policy, reference, inputs) * share, policy

            with self._borrowed(key):  # also while checkpointed layers are traced again, after `value`
                return mx.value_and_grad(value)(weights)

        given = {}
        for name, array in inputs.items():
            if name in loss.token_inputs:  # padding comes after the tokens
                array = filled(array, self._multiple)
            given[name] = as_mlx(array)
        if loss.reads == TOKENS:
            given["present"] = (mx.arange(arrays["targets"].size) < arrays["token_mask"].sum()).astype(mx.float32)
        rest = (arrays, reference, given, mx.array(1 / examples), mx.random.key(draw))
        (value, policy), grads = self._pure(("step", loss), run)(self.model.trainable_parameters(), *rest)
        return value, policy, grads

    def _read(self, arrays: dict[str, mx.array], what: str) -> mx.array:
        """Return the result of `_compute`, without a gradient and without dropout."""

        def run(weights: Any, arrays: Any) -> mx.array:
            with self._borrowed(None):
                self.model.update(weights)
                return self._compute(arrays, what, with_grad=False)

        return self._pure(what, run)(self.model.trainable_parameters(), arrays)

    def _pure(self, name: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of arrays only, compiled if requested; a trace contains the active adapter, so each has its own.

        The active adapter is the trained one, and its weights are among the arrays; no other adapter takes part.
        """
        if not self.compile:
            return function
        return self._compiled.setdefault((name, self.adapters.on), mx.compile(function))

    @contextmanager
    def _borrowed(self, key: mx.array | None) -> Iterator[None]:
        """Let a trace put its own arrays into the model; restore the model's arrays afterwards."""
        own, shared = self.model.trainable_parameters(), self.adapters[self.adapters.on].shared
        shared.key = key
        try:
            yield
        finally:
            self.model.update(own)
            shared.key = None

    def _compute(self, inputs: dict[str, mx.array], what: str, with_grad: bool) -> mx.array:
        """Return summed log-probs, (responses,); those of the tokens, with padding; or scores of either kind."""
        if what == SCORES:
            return self.adapters[self.adapters.on].scores(self._states(inputs))
        logps = self._token_logps(inputs, with_grad)
        if what == SUMS:
            return sums(logps, inputs)
        # The padding has log-probs too, of token 0, which no loss may see.
        return mx.where(mx.arange(logps.size) < inputs["token_mask"].sum(), logps, 0.0)

    def _token_logps(self, inputs: dict[str, mx.array], with_grad: bool) -> mx.array:
        """Return the log-probs of the response tokens, with padding."""
        hidden = self._states(inputs)
        return token_logps(hidden, self._project, inputs["targets"], self.vocabulary, self.transform, with_grad)

    def _states(self, inputs: dict[str, mx.array]) -> mx.array:
        """Return the hidden states that are read, (states, width)."""
        cache = Pass(inputs, self.head_axes, rows=inputs.get("rows")) if "prompt_from" in inputs else None
        hidden = decode(self.model, inputs["ids"], cache)
        if not isinstance(hidden, mx.array):
            raise Misfit("its decoder returns something other than hidden states")
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return hidden[inputs["read_index"]] if "read_index" in inputs else hidden

    def _project(self, hidden: mx.array) -> mx.array:
        head = output_head(self.model)[1]
        return head.as_linear(hidden) if isinstance(head, TABLES) else head(hidden)

    def _choose_layout(self, asked: str, model: str) -> None:
        """Take the prefix layout if it agrees with the plain one on a few tokens; otherwise store the reason."""
        if asked == "plain":
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
            except Misfit as error:
                reason = reason or str(error)
        self.layout = "plain"
        self.layout_reason = f"plain layout: {reason}"
        if asked == "prefix":
            raise UserError(f"--layout prefix does not work with {model}: {reason}; use --layout plain")
