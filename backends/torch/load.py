"""Loading for the torch backend: a transformers base model, the layers for its adapter, its optimiser."""

from __future__ import annotations

import copy
import importlib.util
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
)
from transformers.utils import cached_file

from lite_dil.backends.options import EngineOptions
from lite_dil.backends.torch import unsloth as torch_unsloth
from lite_dil.backends.torch.head import QuantizedHead
from lite_dil.backends.torch.lazy import leave_in_files
from lite_dil.backends.torch.out_of_memory import conversion_report, ran_out
from lite_dil.base.errors import UserError, first_line
from lite_dil.base.install import install
from lite_dil.models import adapters
from lite_dil.models.hub import STRANGE, needs_code
from lite_dil.models.listing import packed_words
from lite_dil.models.model_config import read_config
from lite_dil.models.options import ModelOptions


def load_model(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    options: ModelOptions,
    training: EngineOptions | None,
    in_files: bool = False,
) -> Any:
    """Load a frozen model directly or through unsloth, by the options. Raises as `load_base` does.

    Args:
        in_files: leave the weights of linear layers in the model's files, where the device is a CPU and they are in full.
    """
    if in_files and device.type == "cpu" and not options.load_in_4bit:
        base = load_base(model, "auto", device, False, trust_remote_code=options.trust_remote_code)
        if getattr(base, "is_loaded_in_4bit", False):
            _set_up_4bit(base, dtype)
        else:
            leave_in_files(base, model, dtype)
        return base
    if training is not None and training.unsloth:
        if options.trust_remote_code:
            raise UserError("--trust-remote-code: unsloth runs no model's own code; leave out --unsloth")
        return torch_unsloth.load(model, dtype, device, options.load_in_4bit, training.max_length)
    offload = training is not None and training.offload_embeddings
    head = options.head_bits is not None
    return load_base(model, dtype, device, options.load_in_4bit, offload, head, options.trust_remote_code)


def load_base(
    model: str,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device,
    in_4bit: bool,
    table_on_host: bool = False,
    head_on_host: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Load a frozen model without dropout, in the type `dtype`, or "auto", the files' own.

    Args:
        table_on_host: leave the embedding table in the computer's memory, and with it a head that shares its weight.
        head_on_host: leave the output head there, unless it shares the weight of a table that is not.
        trust_remote_code: run the Python files that the model brings.

    Raises:
        UserError: it cannot be loaded, with the reason.
        RuntimeError, MemoryError: memory ran out; see `ran_out`.
    """
    try:
        if not Path(model).is_dir():  # of a folder `resolve_model` has read it
            read_config(Path(str(cached_file(model, "config.json"))), f"--model {model}")
        config = without_dropout(AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code))
        places = device_map(config, device, table_on_host, head_on_host, trust_remote_code)
        with conversion_report():
            loaded: Any = auto_class(config).from_pretrained(
                model,
                output_loading_info=True,
                attn_implementation=attention_of(config),
                config=config,
                dtype=dtype,
                quantization_config=_packing(config, model, dtype, in_4bit),
                device_map=places,
                trust_remote_code=trust_remote_code,
            )
    except (OSError, ImportError, RuntimeError, SafetensorError, StrictDataclassError, *STRANGE) as error:
        if ran_out(error):
            raise
        raise UserError(f"--model {model}: cannot be loaded ({needs_code(error) or first_line(error)})") from None
    base, report = loaded
    if len(places) > 1:
        from accelerate.hooks import remove_hook_from_submodules

        # transformers lets accelerate move inputs to each weight's device, also between layers. Here the callers do.
        remove_hook_from_submodules(base)
        del base.hf_device_map
    if absent := sorted(report["missing_keys"]) or sorted(map(str, report["mismatched_keys"])):
        # transformers would fill them with random numbers.
        raise UserError(f"--model {model}: its files lack {len(absent)} of the model's weights, the first is {absent[0]}")
    _check_head(base.get_output_embeddings(), f"{'--head-bits' if head_on_host else '--model'}: the output head of {model}")
    if getattr(base, "is_loaded_in_4bit", False) and dtype != "auto":
        _set_up_4bit(base, dtype)
    base.requires_grad_(False)
    drop_towers(base)
    return base


def auto_class(config: Any) -> Any:
    """Return transformers' loader for the model: of text alone where it has one, else with a tower for images."""
    text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    towers = not text and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if towers else AutoModelForCausalLM


def attention_of(config: Any) -> str | None:
    """Return which attention transformers must take for a model; None leaves it the choice."""
    # transformers 5.17 computes Gemma 2 by SDPA, which ignores the soft cap on its attention scores.
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def _packing(config: Any, model: str, dtype: torch.dtype | Literal["auto"], in_4bit: bool) -> Any:
    """Return how to load a model's weights: packed now, unpacked, or as they are. Raises UserError for packings of others.

    In these transformers computes other numbers with gradients than without (8 bits of bitsandbytes: a fresh adapter's
    log-ratio is not 0), has no gradients, or runs on some GPUs only (FP8).
    """
    own = getattr(config, "quantization_config", None)
    if own is None:
        return _nf4(dtype) if in_4bit else None
    own = own if isinstance(own, dict) else own.to_dict()
    method = own.get("quant_method") or "an unknown method"
    if method == "bitsandbytes" and own.get("load_in_4bit"):
        return _nf4(dtype) if in_4bit else None
    if method == "mxfp4" and not in_4bit:
        from transformers.utils.quantization_config import Mxfp4Config

        return Mxfp4Config(dequantize=True)
    raise UserError(
        f"--model {model}: its weights are packed by {method}, on which this backend cannot train; give the model in 16 bits, "
        "with --4bit to save memory"
    )


def _nf4(dtype: torch.dtype | Literal["auto"]) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _check_head(head: Any, what: str) -> None:
    """Raise UserError for an output head without a matrix in numbers of 16 bits or more."""
    weight: Any = getattr(head, "weight", None)  # some formats have no weight
    packed = weight is None or weight.element_size() < 2
    if packed or (isinstance(head, torch.nn.Linear) and weight.shape != (head.out_features, head.in_features)):
        raise UserError(
            f"{what} is packed in its checkpoint, but this backend needs 16 bits; use a checkpoint with an unpacked head, "
            "or one in 16 bits with --4bit"
        )


def without_dropout(config: Any) -> Any:
    """Return the config without the model's own dropout, which would make the log-ratio noisy and not 0 at the start."""
    for part in (config, config.get_text_config()):
        for name, value in list(vars(part).items()):
            if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def _set_up_4bit(base: Any, dtype: torch.dtype) -> None:
    """Make all layers, packed or not, compute in `dtype`, and keep weights as training needs them."""
    import bitsandbytes

    # transformers leaves an already packed checkpoint in its own type, often bfloat16, which a T4 does not have.
    for parameter in base.parameters():
        packed = isinstance(parameter, bitsandbytes.nn.Params4bit)  # its bytes may be labelled bfloat16 too
        if parameter.dtype in (torch.bfloat16, torch.float16) and not packed:
            parameter.data = parameter.data.to(dtype)
    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On a CPU with avx512_bf16 the first forward in eval mode repacks the weights for inference, after which
            # gradients are silently wrong.
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = dtype, True
            weight: Any = module.weight
            weight.quant_state.dtype = dtype  # the type it is unpacked to


def device_map(
    config: Any, device: torch.device, table: bool, head: bool, trust_remote_code: bool = False
) -> dict[str, torch.device]:
    """Return the device of each part of a model: all on `device`, or table and head in the computer's memory; see `load_base`.

    It names every module with weights: others would stay on the CPU, and accelerate moves everything below a name.
    """
    # An object, not "cpu": bitsandbytes refuses a model with parts on "cpu", and accelerate would fetch those for each call.
    host = torch.device("cpu")
    if device == host or not (table or head):
        return {"": device}
    with torch.device("meta"):
        model: Any = auto_class(config).from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    on_host = {id(embedding)} if table else set()
    if head and output is not embedding:
        on_host.add(id(output))
    if not on_host:
        return {"": device}
    places: dict[str, torch.device] = {}
    for name, module in model.named_modules():
        own = dict(chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)))
        there = host if any(id(weight) in on_host for weight in own.values()) else device
        if own and any(True for _ in module.children()):
            places |= {f"{name}.{part}".removeprefix("."): there for part in own}
        elif own:
            places[name] = there
    return places


# Of a Mamba layer: its GPU kernels read these weights themselves, so an adapter would have no effect and no gradient there.
_READ_BY_KERNELS = ("out_proj", "dt_proj")


def decoder_of(base: Any) -> Any:
    """Return the part of a model from the embeddings to the last norm."""
    decoder, embedding = base.get_decoder(), base.get_input_embeddings()
    while decoder.get_output_embeddings() is not None:  # transformers found a model with its head, as for Llama 4
        decoder = next(child for child in decoder.children() if embedding in child.modules())
    return decoder


def drop_towers(base: Any) -> None:
    """Free the parts of a model that text does not pass through: towers for images and sound, and their projections.

    Their modules' names stay in `base.dropped`: PEFT's short names of layers must not match them where the model is whole.
    """
    base.dropped = []
    kept = {id(decoder_of(base)), id(base.get_output_embeddings()), id(base.get_input_embeddings())}

    def visit(module: torch.nn.Module) -> None:
        for name, child in module.named_children():
            if id(child) in kept:
                continue
            if any(id(part) in kept for part in child.modules()):
                visit(child)
            else:
                base.dropped += [name, *(f"{name}.{inner}" for inner, _ in child.named_modules())]
                setattr(module, name, None)

    visit(base)


def packed_text(base: Any, experts: int) -> str:
    """Return how a model in 4 bits is described: of a mixture whose experts stay at 16 bits, with the share that is packed.

    Args:
        experts: the number of experts in each mixture layer, 0 for a dense model.
    """
    packed = sum(2 * weight.numel() for weight in base.parameters() if weight.dtype == torch.uint8)
    whole = [weight for weight in base.parameters() if weight.dtype != torch.uint8]
    if not any(weight.ndim == 3 and weight.shape[0] == experts for weight in whole):
        return "4-bit"
    return f"4-bit ({packed_words(packed / (packed + sum(weight.numel() for weight in whole)))})"


def keeps_float32(base: Any, name: str, dtype: torch.dtype) -> bool:
    """Return whether transformers keeps a weight in float32 when it loads the model in `dtype`."""
    patterns = list(base._keep_in_fp32_modules_strict or ()) if dtype != torch.float32 else []
    patterns += list(base._keep_in_fp32_modules or ()) if dtype == torch.float16 else []
    return any(f".{pattern}." in f".{name}." for pattern in patterns)


def linear_layers(base: Any) -> dict[str, tuple[int, int]]:
    """Return the (out, in) shape of each linear layer of the decoder, by name in the model."""
    wanted = {id(module) for module in decoder_of(base).modules()} - {id(base.get_output_embeddings())}
    return {
        name: (module.out_features, module.in_features)
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) in wanted
    }


def read_by_kernels(base: Any) -> set[str]:
    """Return the names of linear layers whose weight GPU kernels read."""
    return {
        f"{name}.{inner}"
        for name, module in base.named_modules()
        if {"A_log", "D"} <= dict(module.named_parameters(recurse=False)).keys()
        for inner in _READ_BY_KERNELS
    }


def set_weights(model: Any, name: str, adapter: adapters.Adapter) -> None:
    """Set the weights of the adapter `name` of a PEFT model, in float32; PEFT 0.18 makes a second one in the base's type."""
    modules = dict(model.get_base_model().named_modules())
    with torch.no_grad():
        for layer, matrices in adapter.weights.items():
            for part, values in zip((modules[layer].lora_A, modules[layer].lora_B), matrices, strict=True):
                weight = part[name].weight
                weight.data = weight.data.float()
                weight.copy_(torch.from_numpy(values))


def need_bitsandbytes() -> None:
    """Raise UserError if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--4bit, --head-bits and --optim paged_adamw_8bit need bitsandbytes: {install('cpu')}")


def quantize_head(base: Any, bits: int, dtype: torch.dtype, device: torch.device) -> None:
    """Replace a model's output head by one in 8 or 4 bits."""
    need_bitsandbytes()
    base.set_output_embeddings(QuantizedHead(base.get_output_embeddings(), bits, dtype, device))


def make_optimizer(parameters: list[Tensor], config: EngineOptions, in_4bit: bool, device: str) -> torch.optim.Optimizer:
    """Return the AdamW of --optim."""
    name = config.optim
    if name == "auto":
        name = "paged_adamw_8bit" if in_4bit else "adamw"
    if name == "adamw":
        # Fused, because it needs no extra memory: the others make temporaries during an update.
        return torch.optim.AdamW(parameters, weight_decay=config.weight_decay, fused=True)
    import bitsandbytes

    # A CPU has nothing to page from, and the paged class warns.
    kind = bitsandbytes.optim.PagedAdamW8bit if device == "cuda" else bitsandbytes.optim.AdamW8bit
    return kind(parameters, weight_decay=config.weight_decay)


def create_states(optimizer: Any) -> None:
    """Create the optimiser state of each parameter that has none yet.

    The optimisers would do so in their first update, and bitsandbytes' between parameter updates, where memory may run out.
    """
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            if parameter in optimizer.state:
                continue
            if isinstance(optimizer, torch.optim.AdamW):
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            else:
                optimizer.init_state(group, parameter, g, i)


def load_states(optimizer: Any, saved: Any) -> None:
    """Load the state that an optimiser's `state_dict` returned.

    bitsandbytes moves all of it to the GPU; the state of its paged optimisers is moved back to paged memory.
    """
    optimizer.load_state_dict(saved)
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            buffer = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
            if getattr(buffer, "is_paged", False):
                state[name] = buffer.copy_(state[name])
