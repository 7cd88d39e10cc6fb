"""A GGUF file computed by transformers in float32, for the check where llama.cpp is not installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from gguf import GGUFReader, dequantize
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from lite_dil.backends.torch.export import own_logps
from lite_dil.backends.torch.lazy import make_lazy
from lite_dil.backends.types import Sequences
from lite_dil.base.errors import UserError, first_line
from lite_dil.base.start import without_bar

# Their tensors correspond one to one to transformers' weights, which are then unpacked one at a time.
_LAZY = ("llama", "qwen2", "qwen3")


class GgufModel:
    """A file's model.

    Raises:
        UserError: transformers cannot read it.
    """

    def __init__(self, path: Path) -> None:
        file = GGUFReader(path)
        try:
            config = _config(path, file)
            lazy = file.fields["general.architecture"].contents() in _LAZY
            self.model = _unpacked_lazily(path, file, config) if lazy else _whole(path, config)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: transformers cannot load it ({first_line(error)})") from None
        factors = next((tensor.data for tensor in file.tensors if tensor.name == "rope_freqs.weight"), None)
        if factors is not None:
            self.model.model.rotary_emb.inv_freq /= torch.tensor(np.array(factors))

    def logps(self, sequences: Sequences) -> list[np.ndarray]:
        """Return each response's log-probs, (tokens,) float32."""
        return own_logps(self.model, sequences)


def _config(path: Path, file: Any) -> Any:
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    fields = {key.partition(".")[2]: field for key, field in file.fields.items()}

    def field(name: str) -> Any:
        return fields[name].contents() if name in fields else None

    # transformers ignores the head size of Qwen 3 and the rope scaling in the file.
    own = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.head_dim = field("attention.key_length") or own
    if (factor := field("rope.scaling.factor")) is not None:
        config.rope_parameters |= {"rope_type": field("rope.scaling.type"), "factor": factor}
    return config


def _whole(path: Path, config: Any) -> Any:
    with without_bar():
        return AutoModelForCausalLM.from_pretrained(
            path.parent,
            config=config,
            gguf_file=path.name,
            trust_remote_code=False,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        ).eval()


def _unpacked_lazily(path: Path, file: Any, config: Any) -> Any:
    """Return the model with its linear layers left packed in the file, by the names and order that transformers gives them."""
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    made = TENSOR_PROCESSORS.get(file.fields["general.architecture"].contents(), TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(model, made)
    modules = dict(model.named_modules())
    for tensor in file.tensors:
        if tensor.name not in names:
            continue
        owner, _, part = names[tensor.name].rpartition(".")
        read = _reader(path, tensor, made, names)
        module = modules[owner]
        if type(module) is nn.Linear and part == "weight":
            make_lazy(module, read, torch.float32)
        else:
            setattr(module, part, nn.Parameter(read(), requires_grad=False))
    model.tie_weights()
    absent = [name for name, weight in model.named_parameters() if weight.is_meta]
    if absent:
        raise ValueError(f"the file lacks {absent[0]}")
    return model.eval()


def _reader(path: Path, tensor: Any, made: Any, names: dict[str, str]) -> Callable[[], Tensor]:
    start, size, packed = int(tensor.data_offset), int(tensor.n_bytes), tensor.data

    def read() -> Tensor:  # mapped anew each time, so that its pages are let go; torch warns of "r"
        data = np.memmap(path, np.uint8, "c", start, (size,)).view(packed.dtype).reshape(packed.shape)
        weights = made.process(
            weights=dequantize(data, tensor.tensor_type), name=tensor.name, tensor_key_mapping=names, parsed_parameters={}
        ).weights
        return torch.from_numpy(np.ascontiguousarray(weights))

    return read
