"""The torch backend: transformers + PEFT, with bitsandbytes for 4 bits, on a CUDA GPU or on the CPU."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from lite_dil import adapters
from lite_dil.backends import PairLosses, StepResult, checkpointing, switched, torch_unsloth
from lite_dil.backends.head import HeadMismatch, logit_transform
from lite_dil.backends.torch_head import token_logps
from lite_dil.batch import Batch
from lite_dil.config import TrainConfig
from lite_dil.errors import OutOfMemory, UserError, first_line
from lite_dil.layouts import plain

POLICY, REFERENCE = "default", "reference"


class TorchBackend:
    """A causal language model of transformers with a PEFT LoRA adapter; see `lite_dil.backends.Backend`."""

    def __init__(self, config: TrainConfig, model: str, device: str) -> None:
        self.name = device
        self.device = torch.device(device)
        self.dtype = _dtype(config.dtype, device)
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        initial = adapters.read(config.init_adapter, _load_tensors) if config.init_adapter else None
        if config.load_in_4bit or config.optim == "paged_adamw_8bit":
            _need_bitsandbytes()
        self.unsloth = config.unsloth
        if self.unsloth:
            base = torch_unsloth.load(model, self.dtype, self.device, config.load_in_4bit, config.max_length)
        else:
            base = _load_base(model, self.dtype, self.device, config.load_in_4bit)
        in_4bit = bool(getattr(base, "is_loaded_in_4bit", False))  # also of a checkpoint that was packed before
        # A packed weight counts for two parameters a byte.
        parameters = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in base.parameters())
        self.checkpointing = checkpointing(config, parameters)
        self.transform = logit_transform(base.config.to_dict())
        self.model = self._adapted(base, config, model, initial)
        self.layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        self.has_reference_adapter = config.reference == "initial-adapter"
        self.base = base
        self.decoder = base.get_decoder()
        self.head = base.get_output_embeddings()
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.max_grad_norm = config.max_grad_norm
        self.optimizer = _optimizer(self.trainable, config, in_4bit, device)
        # float16 gradients underflow without it; it stays idle in the other types.
        self.scaler = torch.amp.GradScaler(device, enabled=self.dtype == torch.float16)

        if self.checkpointing != "off" and not self.unsloth:
            _checkpoint_layers(base, model)
        torch.manual_seed(config.seed)
        self._check_head(model)
        bits = (", 4-bit" if in_4bit else "") + (", unsloth" if self.unsloth else "")
        where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        self.description = f"{device} ({where}), {self.dtype_name}{bits}"

    def adapter_off(self) -> AbstractContextManager[None]:
        """Make the model the reference inside the block."""
        return switched(self._set_reference)

    def token_logps(self, batch: Batch) -> np.ndarray:
        """Return the log-prob of every response token, without dropout; shape (tokens,), float32."""
        self.model.eval()
        with torch.no_grad():
            return self._token_logps(batch)[0].cpu().numpy()

    def sequence_logps(self, batch: Batch) -> np.ndarray:
        """Return the summed log-prob of every response, without dropout; shape (responses,), float32."""
        self.model.eval()
        with torch.no_grad():
            return self._sequence_logps(batch).cpu().numpy()

    def step(self, batches: Sequence[Batch], losses: PairLosses, learning_rate: float) -> StepResult:
        """Take one AdamW step on the mean loss over all pairs of `batches`."""
        try:
            return self._step(batches, losses, learning_rate)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(first_line(error)) from None

    def _step(self, batches: Sequence[Batch], losses: PairLosses, learning_rate: float) -> StepResult:
        self.model.train()
        pairs = sum(batch.pairs for batch in batches)
        total, policies, references = 0.0, [], []
        for batch in batches:
            with self.adapter_off(), torch.no_grad():
                reference = self._sequence_logps(batch)
            policy = self._sequence_logps(batch)
            lengths, chosen, rejected = map(self._tensor, (batch.lengths, batch.chosen, batch.rejected))
            loss = losses(policy, reference, lengths, chosen, rejected).sum() / pairs
            self.scaler.scale(loss).backward()
            total += loss.item()
            policies.append(policy.detach().cpu().numpy())
            references.append(reference.cpu().numpy())

        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, self.max_grad_norm).item()
        result = StepResult(total, norm, np.concatenate(policies), np.concatenate(references))
        if np.isfinite(norm) or self.scaler.is_enabled():
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler.get_scale() < scale:
                result = replace(result, grad_norm=0.0, skipped=True)
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_ids: Sequence[int]) -> list[list[int]]:
        """Continue each prompt greedily, all of them in one batch."""
        self.model.eval()
        longest = max(map(len, prompts))
        ids = torch.tensor([[end_ids[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch_unsloth.generating(self.model, longest) if self.unsloth else nullcontext():
            out = self.base.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=list(end_ids),
                pad_token_id=end_ids[0],
            )
        answers = []
        for row in out[:, longest:].tolist():
            end = next((i for i, token in enumerate(row) if token in end_ids), len(row))
            answers.append(row[:end])
        return answers

    def save_adapter(self, folder: Path) -> None:
        """Write the policy's adapter in PEFT's format."""
        # Without the last argument PEFT asks the hub whether the vocabulary was resized.
        self.model.save_pretrained(folder, selected_adapters=[POLICY], save_embedding_layers=False)

    def save_state(self, folder: Path) -> None:
        """Write adapter, optimiser, loss scale and random state."""
        state = {
            "adapter": self._policy_parameters(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.name == "cuda" else None,
        }
        torch.save(state, folder / "state.pt")

    def load_state(self, folder: Path) -> None:
        """Go on exactly where `save_state` was called."""
        # On the CPU first: the optimiser moves what belongs on the device, and leaves its step counters, as in a new run.
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in self._policy_parameters().items():
                parameter.copy_(state["adapter"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])

    def peak_memory_mb(self) -> float:
        """Return the allocator's peak on a GPU, the process's on a CPU, in MiB."""
        if self.name == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        from lite_dil.memory import peak_rss_mb

        return peak_rss_mb()

    def _policy_parameters(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _adapted(self, base: Any, config: TrainConfig, model: str, initial: adapters.Adapter | None) -> Any:
        """Put the policy's adapter, and the frozen initial one where it is the reference, on the base."""
        adapter = adapters.choose(config, _linear_layers(base), initial)
        settings: dict[str, Any] = {
            "r": adapter.rank,
            "lora_alpha": adapter.scale * adapter.rank,
            "target_modules": _target_names(base, set(adapter.weights)),
            "bias": "none",
            "task_type": "CAUSAL_LM",
        }
        base.name_or_path = model
        dropout = config.lora_dropout or 0.0
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5 for an attribute by its old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            if self.unsloth:
                rank, alpha, targets = (settings[name] for name in ("r", "lora_alpha", "target_modules"))
                adapted = torch_unsloth.adapt(base, rank, alpha, targets, dropout, self.checkpointing, config.seed)
            else:
                adapted = get_peft_model(base, LoraConfig(**settings, lora_dropout=dropout))
        _set_weights(adapted, POLICY, adapter)
        if config.reference == "initial-adapter":
            adapted.add_adapter(REFERENCE, LoraConfig(**settings, inference_mode=True))
            _set_weights(adapted, REFERENCE, adapter)
            for name, parameter in adapted.named_parameters():
                parameter.requires_grad_(f".{POLICY}." in name)
        return adapted

    def _set_reference(self, on: bool) -> None:
        # PEFT's own disable_adapter() also rewrites requires_grad and costs 31 ms over 210 layers; this is what it flips.
        for layer in self.layers:
            if self.has_reference_adapter:
                layer._active_adapter = [REFERENCE if on else POLICY]
            else:
                layer._disable_adapters = on

    def _token_logps(self, batch: Batch) -> tuple[Tensor, Any]:
        layout = plain(batch)
        hidden = self.decoder(input_ids=self._tensor(layout.input_ids), use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1)[self._tensor(layout.hidden_index)]
        return token_logps(hidden, self.head, self._tensor(layout.targets), self.transform), layout

    def _sequence_logps(self, batch: Batch) -> Tensor:
        logps, layout = self._token_logps(batch)
        # A gather and a sum over rows, not index_add: the order of additions is fixed, so equal log-probs sum to equal bits.
        return (logps[self._tensor(layout.token_index)] * self._tensor(layout.token_mask)).sum(-1)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _check_head(self, model: str) -> None:
        """Compare with the model's own logits on a few tokens; an unknown architecture must not be trained wrongly."""
        ids = np.random.default_rng(0).integers(0, self.head.weight.shape[0], 9)
        batch = Batch([ids[:1]], [ids[1:]], np.array([0]), np.array([1]))
        with torch.no_grad():
            self.model.eval()
            logits = self.base(input_ids=self._tensor(ids[None, :-1])).logits[0].float()
        own = logits.log_softmax(-1).gather(-1, self._tensor(ids[1:, None]))[:, 0].cpu().numpy()
        difference = float(np.abs(own - self.token_logps(batch)).max())
        if not difference < (1e-3 if self.dtype == torch.float32 else 0.3):
            raise HeadMismatch(model, difference)


def _dtype(name: str, device: str) -> torch.dtype:
    if name == "auto" and device == "cuda":
        # By default torch also says True where bf16 is emulated, as on a T4.
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif name == "auto":
        name = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    elif name == "float16" and device == "cpu":
        raise UserError("--dtype float16 is for GPUs; on a CPU use bfloat16 or float32")
    return getattr(torch, name)


def _load_base(model: str, dtype: torch.dtype, device: torch.device, in_4bit: bool) -> Any:
    quantization = None
    if in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        config = AutoConfig.from_pretrained(model)
        for part in (config, config.get_text_config()):
            for name, value in list(vars(part).items()):
                # The base model's own dropout would make the log-ratio noisy, and not 0 at the start.
                if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
                    setattr(part, name, 0.0)
        # transformers 5.17 computes Gemma 2 by SDPA, which leaves out the soft cap on its attention scores.
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model,
            output_loading_info=True,
            attn_implementation="eager" if capped else None,
            config=config,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": device},
        )
    except torch.OutOfMemoryError as error:
        raise UserError(f"--model {model}: not enough memory to load it ({first_line(error)}); try --4bit") from None
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model {model}: cannot be loaded ({first_line(error)})") from None
    base, report = loaded
    if absent := sorted(report["missing_keys"]) or sorted(map(str, report["mismatched_keys"])):
        # transformers would fill them with random numbers.
        raise UserError(f"--model {model}: its files lack {len(absent)} of the model's weights, the first is {absent[0]}")
    if getattr(base, "is_loaded_in_4bit", False):
        import bitsandbytes

        for module in base.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                # On a CPU with avx512_bf16 the first forward in eval mode repacks the weights for inference, after which
                # gradients are silently wrong.
                module.support_avx512bf16_for_cpu = False
                # A checkpoint packed before names a type of its own, which this machine may not have.
                module.compute_dtype, module.compute_type_is_set = dtype, True
    base.requires_grad_(False)
    return base


def _checkpoint_layers(base: Any, model: str) -> None:
    if not base.supports_gradient_checkpointing:
        raise UserError(f"--gradient-checkpointing: {model} ({type(base).__name__}) has no support for it in transformers")
    # Renamed in transformers 5.18; the old name warns.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _linear_layers(base: Any) -> dict[str, tuple[int, int]]:
    """Return the (out, in) shape of each linear layer of the decoder, by its name in the model."""
    decoder = {id(module) for module in base.get_decoder().modules()} - {id(base.get_output_embeddings())}
    return {
        name: (module.out_features, module.in_features)
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) in decoder
    }


def _target_names(base: Any, wanted: set[str]) -> list[str]:
    """Return the shortest names by which PEFT finds exactly the wanted layers: last parts where they suffice."""
    suffixes = {name.rpartition(".")[2] for name in wanted}
    matched = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in suffixes}
    return sorted(suffixes if matched == wanted else wanted)


def _set_weights(model: Any, name: str, adapter: adapters.Adapter) -> None:
    modules = dict(model.get_base_model().named_modules())
    with torch.no_grad():
        for layer, (a, b) in adapter.weights.items():
            modules[layer].lora_A[name].weight.copy_(torch.from_numpy(a))
            modules[layer].lora_B[name].weight.copy_(torch.from_numpy(b))


def _load_tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file

    try:
        return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _need_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--4bit and --optim paged_adamw_8bit need bitsandbytes: pip install bitsandbytes")


def _optimizer(parameters: list[Tensor], config: TrainConfig, in_4bit: bool, device: str) -> torch.optim.Optimizer:
    name = config.optim
    if name == "auto":
        name = "paged_adamw_8bit" if in_4bit else "adamw"
    if name == "adamw":
        return torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
    import bitsandbytes

    # On a CPU there is nothing to page from, and the paged class warns.
    kind = bitsandbytes.optim.PagedAdamW8bit if device == "cuda" else bitsandbytes.optim.AdamW8bit
    return kind(parameters, weight_decay=config.weight_decay)
