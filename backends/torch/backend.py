"""The torch backend: transformers + PEFT, with bitsandbytes for 4 bits, on a CUDA GPU or on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lite_dil.backends.limits import check_options, check_strength, check_trains, checkpointing
from lite_dil.backends.options import LoadOptions
from lite_dil.backends.probes import HeadMismatch, head_probe, layout_probe, tolerance
from lite_dil.backends.switch import switched
from lite_dil.backends.torch import fused as torch_fused
from lite_dil.backends.torch import generate as torch_generate
from lite_dil.backends.torch import layers as torch_layers
from lite_dil.backends.torch import out_of_memory as torch_memory
from lite_dil.backends.torch import packed_attention as torch_packed
from lite_dil.backends.torch import unsloth as torch_unsloth
from lite_dil.backends.torch.device import compute_dtype
from lite_dil.backends.torch.head import QuantizedHead, token_logps, vocabulary
from lite_dil.backends.torch.load import create_states, load_base, load_tensors, make_optimizer, need_bitsandbytes
from lite_dil.backends.torch.lora import POLICY, Switch, add_lora
from lite_dil.backends.types import OWN, Answer, MicroBatch, Sampling, StepResult, joined, never
from lite_dil.base.errors import OutOfMemory, UserError, first_line
from lite_dil.base.files import create
from lite_dil.base.memory import keep_freed_memory, peak_rss_mb
from lite_dil.batching.batch import Batch
from lite_dil.batching.layouts import Layout, packed, plain
from lite_dil.models import adapters
from lite_dil.models.logits import logit_transform
from lite_dil.objectives.loss import NOTHING, SUMS, TOKENS, Loss


class TorchBackend:
    """A causal language model of transformers with a PEFT LoRA adapter; see `lite_dil.backends.Backend`."""

    def __init__(self, config: LoadOptions, model: str, device: str) -> None:
        self.name = device
        self.device = torch.device(device)
        check_options(device, config)
        if config.load_in_4bit or config.optim == "paged_adamw_8bit":
            need_bitsandbytes()
        if device == "cpu":
            keep_freed_memory()
        self.dtype = compute_dtype(config.dtype, device)
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        initial = adapters.read(config.init_adapter, load_tensors) if config.init_adapter else None
        self.unsloth = config.unsloth
        if self.unsloth:
            base = torch_unsloth.load(model, self.dtype, self.device, config.load_in_4bit, config.max_length)
        else:
            base = load_base(model, self.dtype, self.device, config.load_in_4bit)
        in_4bit = bool(getattr(base, "is_loaded_in_4bit", False))  # also of a checkpoint that was packed before
        # A packed weight counts for two parameters a byte.
        parameters = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in base.parameters())
        self.checkpointing = checkpointing(config, parameters)
        self.transform = logit_transform(base.config.to_dict())
        self.base = base
        self.decoder = base.get_decoder()
        if config.head_bits:
            self._quantize_head(config.head_bits)
        self.head = base.get_output_embeddings()
        if config.offload_embeddings:
            self._offload_embeddings()
        self.model = add_lora(base, config, model, initial, self.checkpointing)
        self.switch = Switch(self.model, config.reference == "initial-adapter")
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.max_grad_norm = config.max_grad_norm
        self.optimizer = make_optimizer(self.trainable, config, in_4bit, device)
        # float16 gradients underflow without it; it stays idle in the other types.
        self.scaler = torch.amp.GradScaler(device, enabled=self.dtype == torch.float16)
        self.last_layer = -1
        self.store: torch_layers.HostStore | None = None
        if not self.unsloth:  # whose layers are its own
            self._arrange_layers(config, model)
        torch.manual_seed(config.seed)
        self.layout, self.layout_reason = "plain", ""
        self._check_head(model)
        self._choose_layout(config, model)
        bits = ", 4-bit" if in_4bit else ""
        bits += f", {config.head_bits}-bit head" if config.head_bits else ""
        bits += ", unsloth" if self.unsloth else ""
        where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        self.description = f"{device} ({where}), {self.dtype_name}{bits}, {self.layout} layout"
        kernels = " unsloth" if self.unsloth else ""
        self.identity = f"torch {self.dtype_name}{' nf4' if in_4bit else ''} head {config.head_bits or 16}{kernels}"

    def adapter_off(self) -> AbstractContextManager[None]:
        """Make the model the reference inside the block."""
        return switched(self.switch.set_reference)

    def token_logps(self, batch: Batch) -> np.ndarray:
        """Return the log-prob of every response token, without dropout; shape (tokens,), float32."""
        return self._without_grad(lambda: self._read(batch, TOKENS))

    def sequence_logps(self, batch: Batch) -> np.ndarray:
        """Return the summed log-prob of every response, without dropout; shape (responses,), float32."""
        return self._without_grad(lambda: self._read(batch, SUMS))

    def _without_grad(self, logps: Callable[[], Tensor]) -> np.ndarray:
        def run() -> np.ndarray:
            self.model.eval()
            with torch.no_grad():
                return logps().cpu().numpy()

        return torch_memory.whole("a pass without gradients", self.device, run)

    def step(self, passes: Sequence[MicroBatch], loss: Loss, learning_rate: float) -> StepResult:
        """Take one AdamW step on the mean loss over all examples of `passes`."""
        check_trains(self.strength)
        self.model.train()
        examples = sum(one.batch.examples for one in passes)
        random, done = torch_memory.random_state(self.device), []
        try:
            for one in passes:
                done.append(self._gradients(one, loss, examples))
            result = self._update(done, learning_rate)
        except torch.OutOfMemoryError as error:
            detail = first_line(error)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            return result
        # Not in the except block: as this error's context, that one would keep its frames, and with them all activations.
        self._undo(random)
        failed = len(done) if len(done) < len(passes) else None
        raise OutOfMemory("a training step", detail, training=True, micro_batch=failed)

    def _gradients(self, one: MicroBatch, loss: Loss, examples: int) -> tuple[float, np.ndarray, np.ndarray | None]:
        """Add a micro-batch's gradients; return its share of the loss, and what was read of policy and reference."""
        reference = None
        if one.reference is not None:
            reference = self._tensor(one.reference)
        elif loss.reference != NOTHING:
            with self.adapter_off(), torch.no_grad():
                reference = self._read(one.batch, loss.reference)
        policy = self._read(one.batch, loss.reads)
        value = loss(policy, reference, {name: self._tensor(array) for name, array in one.inputs.items()}) / examples
        self.scaler.scale(value).backward()
        return value.item(), policy.detach().cpu().numpy(), None if reference is None else reference.cpu().numpy()

    def _read(self, batch: Batch, what: str) -> Tensor:
        """Return summed log-probs, (responses,), or those of each response token, (tokens,)."""
        logps, layout = self._token_logps(batch)
        return self._sums(logps, layout) if what == SUMS else logps

    def _update(self, passes: list[tuple[float, np.ndarray, np.ndarray | None]], learning_rate: float) -> StepResult:
        """Change the weights by the gradients of all passes, unless something is not finite."""
        losses, policies, references = zip(*passes, strict=True)
        total = sum(losses)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, self.max_grad_norm).item()
        result = StepResult(total, norm, np.concatenate(policies), joined(references))
        if np.isfinite([norm, total]).all() or self.scaler.is_enabled():
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            scale = self.scaler.get_scale()
            create_states(self.optimizer)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler.get_scale() < scale:
                result = replace(result, grad_norm=0.0, skipped=True)
        return result

    def _undo(self, random: torch_memory.Random) -> None:
        """Go back to before a step that failed ahead of its update, and let go of what it held."""
        self.optimizer.zero_grad(set_to_none=True)
        # Gradients may have been unscaled, which a scaler allows once between updates: a new one in the same state.
        state, self.scaler = self.scaler.state_dict(), torch.amp.GradScaler(self.name, enabled=self.scaler.is_enabled())
        self.scaler.load_state_dict(state)
        torch_memory.set_random_state(random)
        if self.store is not None:
            self.store.clear()
        torch_memory.free(self.device)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_ids: Sequence[int],
        seeds: Sequence[int] | None = None,
        sampling: Sampling = OWN,
        stop: Callable[[], bool] = never,
    ) -> list[Answer]:
        """Continue the prompts, all of them in one batch."""
        self.model.eval()

        def run() -> list[Answer]:
            with torch_unsloth.generating(self.model, max(map(len, prompts))) if self.unsloth else nullcontext():
                return torch_generate.generate(self.base, self.device, prompts, max_new_tokens, end_ids, seeds, sampling, stop)

        work = f"the generation of {len(prompts)} answers of up to {max_new_tokens} tokens"
        return torch_memory.whole(work, self.device, run)

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        end_ids: Sequence[int],
        seed: int | None = None,
        sampling: Sampling = OWN,
    ) -> Iterator[int]:
        """Continue one prompt, token by token."""
        if self.unsloth:  # whose switch between training and generation is the whole model's
            raise UserError("--unsloth: answers cannot be streamed from it; load the model without")
        self.model.eval()
        return torch_generate.stream(self.base, self.device, prompt, max_new_tokens, end_ids, seed, sampling)

    @property
    def strength(self) -> float:
        """What the policy's adapter is multiplied by."""
        return self.switch.strength

    def set_strength(self, value: float) -> None:
        """Multiply the policy's adapter."""
        self.switch.set_strength(check_strength(value))

    def save_adapter(self, folder: Path) -> None:
        """Write the policy's adapter in PEFT's format."""
        # Without the last argument PEFT asks the hub whether the vocabulary was resized.
        self.model.save_pretrained(folder, selected_adapters=[POLICY], save_embedding_layers=False)

    def save_state(self, folder: Path) -> None:
        """Write adapter, optimiser, loss scale and random state."""
        host, device = torch_memory.random_state(self.device)
        state = {
            "adapter": self._policy_parameters(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": host,
            "cuda_rng": device,
        }
        with create(folder / "state.pt") as file:
            torch.save(state, file)

    def load_state(self, folder: Path) -> None:
        """Go on exactly where `save_state` was called."""
        # On the CPU first: the optimiser itself moves what belongs on the device.
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in self._policy_parameters().items():
                parameter.copy_(state["adapter"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch_memory.set_random_state((state["rng"], state["cuda_rng"]))

    def peak_memory_mb(self) -> float:
        """Return the allocator's peak on a GPU, the process's on a CPU, in MiB."""
        if self.name == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return peak_rss_mb()

    def _policy_parameters(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _token_logps(self, batch: Batch) -> tuple[Tensor, Layout]:
        layout: Layout
        if self.layout == "packed":
            multiple = torch_packed.BLOCK if self.name == "cuda" else 1
            layout = in_row = packed(batch, multiple=multiple)
            row = torch_packed.Row.of(in_row, self.device, self.last_layer)
            ids = self._tensor(in_row.input_ids)
            with torch_packed.computing(self.decoder.config, row):
                output = self.decoder(input_ids=ids, position_ids=row.position_ids, use_cache=False)
            hidden = output.last_hidden_state[0]  # of the response tokens only
        else:
            layout = repeated = plain(batch)
            output = self.decoder(input_ids=self._tensor(repeated.input_ids), use_cache=False)
            hidden = output.last_hidden_state.flatten(0, 1)[self._tensor(layout.hidden_index)]
        return token_logps(hidden, self.head, self._tensor(layout.targets), self.transform), layout

    def _sums(self, logps: Tensor, layout: Layout) -> Tensor:
        """Sum values of the response tokens over each response: (tokens,) to (responses,)."""
        # A gather and a sum over rows, not index_add: the order of additions is fixed, so equal log-probs sum to equal bits.
        return (logps[self._tensor(layout.token_index)] * self._tensor(layout.token_mask)).sum(-1)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _check_head(self, model: str) -> None:
        """Compare with the model's own logits on a few tokens; an unknown architecture must not be trained wrongly."""
        batch = head_probe(vocabulary(self.head))
        ids = np.concatenate([*batch.prompts, *batch.responses])
        with torch.no_grad():
            self.model.eval()
            logits = self.base(input_ids=self._tensor(ids[None, :-1])).logits[0].float()
        own = logits.log_softmax(-1).gather(-1, self._tensor(ids[1:, None]))[:, 0].cpu().numpy()
        difference = float(np.abs(own - self.token_logps(batch)).max())
        if not difference < tolerance(self.dtype_name):
            raise HeadMismatch(model, difference)

    def _quantize_head(self, bits: int) -> None:
        need_bitsandbytes()
        head = QuantizedHead(self.base.get_output_embeddings(), bits, self.dtype)
        self.base.set_output_embeddings(head)

    def _offload_embeddings(self) -> None:
        embedding = self.base.get_input_embeddings()
        if getattr(self.head, "weight", None) is embedding.weight:
            raise UserError(
                "--offload-embeddings: this model's embedding table is its output head too, which the GPU needs; "
                "add --head-bits 8 (or 4), which gives the head a small copy of its own"
            )
        torch_layers.offload_embeddings(embedding, self.device)

    def _arrange_layers(self, config: LoadOptions, model: str) -> None:
        """Put in the fused layers, and computing again for the backward pass."""
        mode = self.checkpointing
        layers = torch_layers.layers_of(self.decoder)
        fused = torch_fused.install(self.decoder, self.dtype, mode == "selective") if config.fused_layers else set()
        if layers is None:
            if mode != "off":
                raise UserError(
                    f"--gradient-checkpointing {mode}: the layers of {model} ({type(self.base).__name__}) are unknown"
                )
            return
        text = self.decoder.config
        if mode == "selective":
            for layer in layers:
                mlp = getattr(layer, "mlp", None)
                if mlp is None:
                    raise UserError(f"--gradient-checkpointing selective: a layer of {model} has no MLP; take full")
                if id(mlp) not in fused:
                    torch_layers.again(mlp, text)
        if hasattr(self.decoder, "norm"):
            torch_layers.skip_unread(self.decoder, layers[-1])
            self.last_layer = len(layers) - 1
        if mode == "full":
            self.store = torch_layers.HostStore() if config.offload_activations else None
            for layer in layers:
                torch_layers.again(layer, text, self.store)

    def _choose_layout(self, config: LoadOptions, model: str) -> None:
        """Take the packed layout where it is right for this model, which is computed and not assumed."""
        if self.unsloth:
            self.layout_reason = "plain layout, each prompt computed for each of its answers: unsloth's kernels know no other"
        if config.layout == "plain" or self.unsloth:
            return
        reason = torch_packed.why_not(self.base, config.max_length) or self._packed_differs()
        if not reason:
            self.layout = "packed"
        elif config.layout == "packed":
            raise UserError(f"--layout packed: not for {model}: {reason}; leave --layout out")
        else:
            self.layout_reason = f"plain layout, each prompt computed for each of its answers: {reason}"

    def _packed_differs(self) -> str:
        """Compare both layouts on a few tokens; what no config tells shows here."""
        if self.last_layer < 0:
            return "its layers are unknown"
        batch = layout_probe(vocabulary(self.head))
        expected = self.token_logps(batch)
        self.layout = "packed"
        try:
            difference = float(np.abs(self.token_logps(batch) - expected).max())
        except torch_packed.Unsupported as error:
            return str(error)
        finally:
            self.layout = "plain"
        return (
            ""
            if difference < tolerance(self.dtype_name)
            else f"its log-probs differ from the plain layout's by {difference:.3g} nats"
        )
