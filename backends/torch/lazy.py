"""Linear layers whose weights stay in a file: a pass reads and converts each when its turn comes, and frees it.

For the few passes of a check, so that a model needs little more memory than its largest weight and its embedding table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lite_dil.models import tensors
from lite_dil.models.find import folder_of
from lite_dil.models.tensors import Stored, core_name

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class LazyLinear(nn.Linear):
    """A frozen linear layer without a weight of its own."""

    make: Callable[[], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's outputs, in the type of its input."""
        return F.linear(input, self.make().to(input.dtype), None if self.bias is None else self.bias.to(input.dtype))


def make_lazy(layer: nn.Linear, make: Callable[[], Tensor], dtype: torch.dtype) -> None:
    """Let `make` return a layer's weight for each pass. The layer keeps its shape, and `dtype`, but no numbers."""
    shape = layer.out_features, layer.in_features
    layer.weight = nn.Parameter(torch.zeros((), dtype=dtype).expand(shape), requires_grad=False)
    layer.__class__ = LazyLinear
    layer.make = make  # type: ignore[assignment]


def leave_in_files(base: Any, model: str, dtype: torch.dtype) -> None:
    """Leave the linear layers of a model on the CPU in its files, and let it compute in `dtype`.

    It was loaded in the files' own type, for which transformers maps the files and copies nothing.
    """
    stored = {core_name(key): tensor for path in _files(folder_of(model)) for key, tensor in tensors.read(path).items()}
    head = base.get_output_embeddings()
    for name, module in base.named_modules():
        tensor = stored.get(core_name(f"{name}.weight"))
        if type(module) is nn.Linear and module is not head and tensor is not None and _same(module.weight, tensor):
            make_lazy(module, _reader(tensor), module.weight.dtype)
    for module in base.modules():
        for weight in () if isinstance(module, LazyLinear) else module.parameters(recurse=False):
            weight.data = weight.data.to(dtype)
        for name, part in module.named_buffers(recurse=False):
            if part.is_floating_point() and name not in module._non_persistent_buffers_set:
                part.data = part.data.to(dtype)


def _files(folder: Path) -> list[Path]:
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("model*.safetensors"))


def _same(weight: Tensor, tensor: Stored) -> bool:
    """Return whether a weight is a tensor of the files as it is; transformers renames and rearranges some."""
    if tensor.shape != tuple(weight.shape) or _TYPES.get(tensor.code) != weight.dtype:
        return False
    return torch.equal(_reader(tensor)()[[0, -1]], weight[[0, -1]])


def _reader(tensor: Stored) -> Callable[[], Tensor]:
    def read() -> Tensor:  # mapped anew each time, so that its pages are let go; torch warns of arrays that cannot be written
        mapped = np.memmap(tensor.path, np.uint8, "c", tensor.start, (tensor.nbytes,))
        return torch.from_numpy(mapped).view(_TYPES[tensor.code]).reshape(tensor.shape)

    return read
