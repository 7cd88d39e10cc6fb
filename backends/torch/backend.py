"""The torch backend: transformers + PEFT, with bitsandbytes for 4 bits, on a CUDA GPU or the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lite_dil.backends.head_files import check_config, read_head
from lite_dil.backends.limits import check_name, check_options, check_strength, check_trains, checkpointing
from lite_dil.backends.options import EngineOptions
from lite_dil.backends.torch import fused as torch_fused
from lite_dil.backends.torch import generate as torch_generate
from lite_dil.backends.torch import layers as torch_layers
from lite_dil.backends.torch import out_of_memory
from lite_dil.backends.torch import probing as torch_probing
from lite_dil.backends.torch import state as torch_state
from lite_dil.backends.torch import unsloth as torch_unsloth
from lite_dil.backends.torch.adapters import Trainable
from lite_dil.backends.torch.arrange import arrange
from lite_dil.backends.torch.device import compute_dtype, where
from lite_dil.backends.torch.load import (
    decoder_of,
    linear_layers,
    load_model,
    make_optimizer,
    need_bitsandbytes,
    packed_text,
    quantize_head,
    set_weights,
)
from lite_dil.backends.torch.lora import PEFT_POLICY, Switch, add_lora, add_unsloth_lora
from lite_dil.backends.torch.offload import ActivationOffload
from lite_dil.backends.torch.reading import StateReader
from lite_dil.backends.torch.score_head import ScoreHead
from lite_dil.backends.types import OWN, POLICY, REFERENCE, Generated, Head, MicroBatch, Sampling, StepResult, joined, never
from lite_dil.base.display import Count, Silent, uncounted
from lite_dil.base.errors import OutOfMemory, UserError, first_line
from lite_dil.base.memory import keep_freed_memory, peak_rss_mb
from lite_dil.batching.batch import Batch
from lite_dil.models import adapter_files, adapters
from lite_dil.models.logits import logit_transform
from lite_dil.models.options import ALL_LINEAR, ModelOptions, ResolvedAdapter
from lite_dil.objectives.loss import NOTHING, SCORES, SUMS, TOKENS, Loss


class TorchBackend:
    """A transformers causal language model with PEFT LoRA adapters; see `lite_dil.backends.protocol.Backend`."""

    def __init__(
        self,
        options: ModelOptions,
        model: str,
        adapter: ResolvedAdapter | None,
        training: EngineOptions | None,
        device: str,
        say: Callable[[str], None] | None = None,
        in_files: bool = False,
    ) -> None:
        self.name, self.device, self.training = device, torch.device(device), training
        check_options(device, options, training)
        if options.load_in_4bit or (training and training.optim == "paged_adamw_8bit"):
            need_bitsandbytes()
        if device == "cpu":
            keep_freed_memory()
        self.dtype = compute_dtype(options.dtype, device)
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        initial = adapter_files.read_adapter(adapter.init_adapter) if adapter and adapter.init_adapter else None
        self.unsloth = bool(training and training.unsloth)
        base = load_model(model, self.dtype, self.device, options, training, in_files)
        self.in_4bit = bool(getattr(base, "is_loaded_in_4bit", False))  # also for an already packed checkpoint
        # A packed weight holds two parameters per byte.
        parameters = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in base.parameters())
        self.checkpointing = checkpointing(training, parameters) if training else "off"
        self.experts = adapters.experts_of(base.config.get_text_config().to_dict())
        packed = packed_text(base, self.experts)
        self.base, self.model, self.decoder, base.name_or_path = base, base, decoder_of(base), model
        if options.head_bits:
            quantize_head(base, options.head_bits, self.dtype, self.device)
        self.head = base.get_output_embeddings()
        if training and training.offload_embeddings:
            torch_layers.offload_embeddings(base, self.head, self.device)
        self.switch, self.adapters, self.seed = Switch(), dict[str, Trainable](), adapter.seed if adapter else 0
        self.linear = self.every = linear_layers(base)
        if adapter and training and not self.unsloth:
            self.linear = torch_probing.adaptable(base, self.decoder, self.linear, self.device)
        if adapter:
            self._add_policy(adapter, initial)
        self.reader = StateReader(self.decoder, self.head, logit_transform(base.config.to_dict()), self.device)
        self.store: ActivationOffload | None = None
        if not self.unsloth:  # which has its own layers
            fused, named = self.dtype if self._fused else None, f"{model} ({type(base).__name__})"
            offload = training is not None and training.offload_activations
            self.reader.last_layer, self.store = arrange(self.decoder, named, self.checkpointing, fused, self.switch, offload)
        torch.manual_seed(self.seed)
        torch_probing.check_head(base, self.reader, self.token_logps, model, self.dtype_name)
        self.layout_reason, self.batched = "", True
        if training:
            probed = base, self.reader, self.token_logps, training, model, self.dtype_name, say or Silent().say
            self.layout_reason = torch_probing.choose_layout(*probed)
        self.layout = self.reader.layout
        bits = (f", {packed}" if self.in_4bit else "") + (f", {options.head_bits}-bit head" if options.head_bits else "")
        bits += ", unsloth" * self.unsloth
        self.description = f"{device} ({where(device)}), {self.dtype_name}{bits}, {self.layout} layout"
        kind = f"{' nf4' if self.in_4bit else ''} head {options.head_bits or 16}{' unsloth' if self.unsloth else ''}"
        self.identity = f"torch {self.dtype_name}{kind}"

    def using(self, name: str) -> AbstractContextManager[None]:
        """Activate adapter `name` inside the block."""
        return self.switch.using(name)

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
        shapes = adapters.select_targets(self.linear, targets, self.experts)
        self._add(name, adapters.fresh(shapes, rank, alpha / rank, self.seed, name), dropout, head)

    def load_adapter(self, name: str, folder: Path) -> None:
        """Add an adapter from its files, with its head if it has one."""
        adapter, head = adapter_files.read_adapter(str(folder)), read_head(folder)
        self._add(name, adapters.match(adapter, self.every, str(folder)), 0.0, head)
        self.adapters[name].loaded = True
        if (made := self.adapters[name].head) is not None:
            check_config(folder, made)
            made.load(folder)

    def set_head(self, head: Head | None) -> None:
        """Give the policy a head that starts at zero, or take its head away."""
        self._trainable(POLICY).head = self._head(head)
        self._trainable(POLICY).set_state(None)

    def _add(self, name: str, adapter: adapters.Adapter, dropout: float, head: Head | None) -> None:
        check_name(name, self.switch.names)
        if self.unsloth:
            raise UserError("--unsloth: its kernels support only one adapter; leave it out for more")
        devices = [self.device] if self.name == "cuda" else []
        with torch.random.fork_rng(devices):  # PEFT draws random numbers, which must not change training's dropout
            self.model = add_lora(self.model, name, adapter, dropout)
        if self._fused:
            torch_fused.install_lora(self.decoder)
        self._take_over(name, head)

    def renew_policy(self, adapter: ResolvedAdapter) -> None:
        """Reset the policy to its initial weights and training state."""
        initial = adapter_files.read_adapter(adapter.init_adapter) if adapter.init_adapter else None
        first = adapters.choose(adapter, self.linear, initial, self.base.name_or_path, self.experts, self.every)
        if adapters.layout(first) != self.policy_layout:
            raise UserError(f"adapter {adapter.init_adapter}: its rank, scale or layers differ from the policy's; load anew")
        set_weights(self.model, PEFT_POLICY, first)
        self.set_head(None)
        self.set_strength(1.0)
        self.seed = adapter.seed
        torch.manual_seed(self.seed)

    def token_logps(self, batch: Batch) -> np.ndarray:
        """Return the log-prob of every response token, without dropout; shape (tokens,), float32."""
        return self._without_grad(lambda: self.reader.logps(batch, TOKENS))

    def token_hits(self, batch: Batch) -> np.ndarray:
        """Return the log-prob of every response token and whether it is the most likely one, (tokens, 2) float32."""
        return self._without_grad(lambda: self.reader.hits(batch))

    def sequence_logps(self, batch: Batch) -> np.ndarray:
        """Return the summed log-prob of every response, without dropout; shape (responses,), float32."""
        return self._without_grad(lambda: self.reader.logps(batch, SUMS))

    def scores(self, batch: Batch, adapter: str) -> np.ndarray:
        """Return the outputs of an adapter's head, (responses, outputs) or (tokens, outputs), float32."""
        head = self._head_of(self._trainable(adapter))
        with self.using(adapter):
            return self._without_grad(lambda: self.reader.scores(batch, head))

    def _without_grad(self, read: Callable[[], Tensor]) -> np.ndarray:
        def run() -> np.ndarray:
            self.model.eval()
            with torch.no_grad():
                return read().cpu().numpy()

        return out_of_memory.whole("a pass without gradients", self.device, run)

    def step(
        self, passes: Sequence[MicroBatch], loss: Loss, learning_rate: float, adapter: str = POLICY, count: Count = uncounted
    ) -> StepResult:
        """Take one AdamW step of an adapter and its head on the mean loss over all examples of `passes`."""
        trained = self._trainable(adapter)
        if self.training is None:
            raise ValueError("the model was loaded for inference; load it with training options")
        if adapter == POLICY:
            check_trains(self.strength)
        read: Callable[[Batch], Tensor] = partial(self.reader.logps, what=loss.reads)
        if loss.reads == SCORES:
            read = partial(self.reader.scores, head=self._head_of(trained))
        self.switch.training_mode(self.model, everything=self.unsloth)
        examples = sum(one.batch.examples for one in passes)
        random, done = out_of_memory.random_state(self.device), []
        chunks = self.store.chunks if self.store is not None else 0
        try:
            with self.using(adapter):
                for one in passes:
                    done.append(self._gradients(one, loss, read, trained.scaler, examples))
                    count(len(done))
            result = self._update(trained, done, learning_rate)
        except out_of_memory.ERRORS as error:
            if not out_of_memory.ran_out(error):
                raise
            detail = first_line(error)
            helps = out_of_memory.helps(error, self.device, self.checkpointing, self.store is not None)
        else:
            trained.forget_gradients()
            return result
        # Outside the except block: as this error's context, the caught one would keep its frames and so all activations.
        self._undo(trained, random, chunks)
        raise OutOfMemory("a training step", detail, helps, len(done) if len(done) < len(passes) else None)

    def _gradients(
        self,
        one: MicroBatch,
        loss: Loss,
        read: Callable[[Batch], Tensor],
        scaler: torch.amp.GradScaler,
        examples: int,
    ) -> tuple[float, np.ndarray, np.ndarray | None]:
        """Add a micro-batch's gradients; return its share of the loss, and the policy's and reference's values."""
        reference, tensor = None, self.reader.tensor
        if one.reference is not None:
            reference = tensor(one.reference)
        elif loss.reference != NOTHING:
            with self.adapter_off(), torch.no_grad():
                reference = self.reader.logps(one.batch, loss.reference)
        policy = read(one.batch)
        inputs = {name: tensor(array) for name, array in one.inputs.items()}
        if loss.reads == TOKENS:
            inputs["present"] = torch.ones_like(policy, requires_grad=False)
        value = loss(policy, reference, inputs) / examples
        scaler.scale(value).backward()
        return value.item(), policy.detach().cpu().numpy(), None if reference is None else reference.cpu().numpy()

    def _update(
        self, trained: Trainable, passes: list[tuple[float, np.ndarray, np.ndarray | None]], learning_rate: float
    ) -> StepResult:
        """Update the weights by the gradients of all passes, unless something is not finite."""
        assert self.training is not None
        losses, policies, references = zip(*passes, strict=True)
        total, most, values = sum(losses), self.training.max_grad_norm, (np.concatenate(policies), joined(references))
        norm, skipped = trained.update(total, learning_rate, most)
        return StepResult(total, 0.0 if skipped else norm, *values, skipped, not skipped and norm > most)

    def _undo(self, trained: Trainable, random: out_of_memory.Random, chunks: int) -> None:
        """Undo a step that failed before its update, and free what it held."""
        trained.undo()
        out_of_memory.set_random_state(random)
        if self.store is not None:
            self.store.clear(chunks)
        out_of_memory.free(self.device)

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
        """Continue the prompts in one batch."""
        self.model.eval()

        def run() -> list[Generated]:  # unsloth's generation makes its own cache
            with torch_unsloth.generating(self.model, max(map(len, prompts))) if self.unsloth else nullcontext():
                asked = prompts, max_new_tokens, end_ids, seeds, sampling, stop
                return torch_generate.generate(self.base, self.device, *asked, share=not self.unsloth, done=done)

        work = f"the generation of {len(prompts)} answers of up to {max_new_tokens} tokens"
        return out_of_memory.whole(work, self.device, run)

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        end_ids: Sequence[int],
        seed: int | None = None,
        sampling: Sampling = OWN,
    ) -> Iterator[int]:
        """Continue one prompt, token by token."""
        if self.unsloth:  # which switches the whole model between training and generation
            raise UserError("--unsloth: cannot stream answers; load the model without it")
        self.model.eval()
        return torch_generate.stream(self.base, self.device, prompt, max_new_tokens, end_ids, seed, sampling)

    @property
    def strength(self) -> float:
        """The factor on the policy's adapter."""
        return self.switch.strength

    def set_strength(self, value: float) -> None:
        """Set the factor on the policy's adapter."""
        self.switch.set_strength(check_strength(value))

    def save_adapter(self, folder: Path, adapter: str = POLICY) -> None:
        """Write an adapter in PEFT's format, with its head if it has one."""
        torch_state.save_adapter(self.model, self._trainable(adapter), folder)

    def save_state(self, folder: Path) -> None:
        """Write all adapters with their heads, optimisers and loss scales, and the random state."""
        torch_state.save(folder, self.model, self.adapters, out_of_memory.random_state(self.device))

    def load_state(self, folder: Path) -> None:
        """Restore the state of `save_state` exactly."""
        out_of_memory.set_random_state(torch_state.load(folder, self.adapters))

    def peak_memory_mb(self) -> float:
        """Return the allocator's peak on a GPU, the process's on a CPU, in MiB."""
        return torch.cuda.max_memory_allocated() / 2**20 if self.name == "cuda" else peak_rss_mb()

    def _add_policy(self, options: ResolvedAdapter, initial: adapters.Adapter | None) -> None:
        """Add the policy's adapter, and the frozen initial one if it is the reference, to the base."""
        adapter = adapters.choose(options, self.linear, initial, self.base.name_or_path, self.experts, self.every)
        self.policy_layout = adapters.layout(adapter)
        if self.unsloth:
            self.model = add_unsloth_lora(self.base, adapter, options.lora_dropout, self.checkpointing, options.seed)
        else:
            self.model = add_lora(self.base, POLICY, adapter, options.lora_dropout)
        if options.reference == "initial-adapter":
            self.model = add_lora(self.model, REFERENCE, adapter, 0.0)
            self.switch.add(self.model, REFERENCE)
        self._take_over(POLICY, None)

    def _take_over(self, name: str, head: Head | None) -> None:
        """Make an adapter on the model trainable."""
        made, scaled = self._head(head), self.dtype == torch.float16
        self.adapters[name] = Trainable(self.model, name, made, self._optimizer, self.name, scaled)
        self.switch.add(self.model, name)
        # PEFT allows gradients only for its active adapter. Here that is the adapter switched on, and no other.
        trained = {id(weight) for adapter in self.adapters.values() for weight in adapter.weights.values()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def _head(self, head: Head | None) -> ScoreHead | None:
        width = self.base.get_input_embeddings().weight.shape[1]
        return None if head is None else ScoreHead(head, width, self.device)

    def _optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        assert self.training is not None
        return make_optimizer(parameters, self.training, self.in_4bit, self.name)

    def _trainable(self, name: str) -> Trainable:
        """Return a trainable adapter. Raises KeyError for an unknown name, ValueError for a frozen one."""
        if name not in self.switch.names:
            raise KeyError(name)
        if name not in self.adapters:
            raise ValueError(f"{name!r} is frozen: it has no adapter to train or save, and no head")
        return self.adapters[name]

    def _head_of(self, adapter: Trainable) -> ScoreHead:
        if adapter.head is None:
            raise ValueError(f"adapter {adapter.name!r} has no head to score with")
        return adapter.head

    @property
    def _fused(self) -> bool:
        """Return whether to use the fused layers; for inference on a GPU bitsandbytes' own are faster."""
        if self.training is None:
            return self.name != "cuda"
        return self.training.fused_layers and not self.unsloth


def load(
    options: ModelOptions,
    model: str,
    adapter: ResolvedAdapter | None,
    training: EngineOptions | None,
    device: str,
    say: Callable[[str], None] | None = None,
    in_files: bool = False,
) -> TorchBackend:
    """Load a model, or raise UserError if memory does not hold it."""
    make = partial(TorchBackend, options, model, adapter, training, device, say, in_files)
    helps = [] if options.load_in_4bit else ["--4bit"]
    if training is None or not training.unsloth:
        helps += [] if options.head_bits else ["--head-bits 8"]
        helps += ["--offload-embeddings"] if training and device == "cuda" and not training.offload_embeddings else []
    return out_of_memory.loaded(model, torch.device(device), helps, make)
