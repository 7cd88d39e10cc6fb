"""Run the torch backend through unsloth in a process of its own, on the CPU, and save what it computes.

    python tests/unsloth_run.py kernels|stock|cuda MODEL OUT.npz OPTION=VALUE ...

unsloth must be imported before transformers, which the tests' own process has imported. Without a GPU it loads by stock
transformers and PEFT ("stock"). "kernels" takes the path of a GPU: its patched forward, its fused LoRA functions and its
Triton kernels, which Triton's interpreter computes with numpy; what asks for CUDA is answered by a stand-in. The interpreter
gets bfloat16 wrong, so 16 bits are float16 there, which the product has for GPUs only. "cuda" is a real GPU.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np


def pretend_cuda() -> None:
    """Let unsloth see a GPU, and put on the CPU what it would put there. To be called before it is imported."""
    os.environ |= {"UNSLOTH_ALLOW_CPU": "1", "TRITON_INTERPRET": "1"}
    import torch
    from torch.overrides import TorchFunctionMode

    size = 8 * 2**30
    card = types.SimpleNamespace(name="none", total_memory=size, major=8, minor=0, multi_processor_count=2, warp_size=32)
    answers: dict[str, Any] = {
        "current_device": 0,
        "device_count": 1,
        "empty_cache": None,
        "get_device_capability": (8, 0),
        "get_device_name": "none",
        "get_device_properties": card,
        "max_memory_reserved": 0,
        "mem_get_info": (size, size),
        "memory_reserved": 0,
        "synchronize": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch._C._cuda_getCurrentRawStream = lambda index: 0  # type: ignore[attr-defined]
    cpu = torch.device("cpu", 0)

    def here(device: Any) -> Any:
        number = isinstance(device, int) and not isinstance(device, bool)
        return cpu if number or str(device).startswith("cuda") else device

    class OnTheCPU(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if function is torch.device and here(args[0]) is cpu:
                return cpu
            kwargs.pop("pin_memory", None)
            if "device" in kwargs:
                kwargs["device"] = here(kwargs["device"])
            if function is torch.Tensor.to:
                args = (args[0], *map(here, args[1:]))
            return function(*args, **kwargs)

    OnTheCPU().__enter__()


def measure(backend: Any) -> dict[str, np.ndarray]:
    """What the plain path and unsloth's must agree on: log-probs, a step's loss and gradients, the reference, answers."""
    from conftest import batch, criterion, one_step

    data, out = batch(), {}
    out["start"] = backend.token_logps(data)
    with backend.adapter_off():
        out["off"] = backend.token_logps(data)
    gradients: dict[str, np.ndarray] = {}

    def keep(*_: Any) -> None:
        named = backend.adapters["policy"].weights.items()
        gradients.update({name: parameter.grad.float().cpu().numpy().copy() for name, parameter in named})

    backend.adapters["policy"].optimizer.register_step_pre_hook(keep)
    losses = criterion(loss="dpo", beta=0.5)
    for step in range(2):  # in the first one B is 0, and so is the gradient of A
        result = one_step(backend, [data], losses, 1e-2)
        out[f"policy{step}"], out[f"reference{step}"] = result.policy, result.reference
        out[f"norm{step}"] = np.array(result.grad_norm)
        out |= {f"gradient{step} {name}": value for name, value in gradients.items()}
    out["on"] = backend.token_logps(data)
    with backend.adapter_off():
        out["off_again"] = backend.token_logps(data)
        out["answers_off"] = np.array([answer.ids for answer in backend.generate([[5, 6, 7, 8], [9, 10]], 4, [511])])
        out["drawn"] = np.array([answer.ids for answer in backend.generate([[5, 6, 7, 8], [9, 10]], 4, [511], [1, 2])])
    out["answers_on"] = np.array([answer.ids for answer in backend.generate([[5, 6, 7, 8], [9, 10]], 4, [511])])
    out["norm_after_generation"] = np.array(one_step(backend, [data], losses, 0.0).grad_norm)
    return out


def make(model: str, device: str = "cpu", half: bool = False, **changes: Any) -> Any:
    """The torch backend, past the checks at the door; in float16 if `half`; without loss scaling."""
    import torch
    from conftest import config

    from lite_dil.backends.torch import backend as module

    name = "_dtype" if hasattr(module, "_dtype") else "compute_dtype"
    before, options = getattr(module, name), config(**changes)
    if half:
        setattr(module, name, lambda *_: torch.float16)
    try:
        backend = module.TorchBackend(options, model, options, options, device)
    finally:
        setattr(module, name, before)
    backend.adapters["policy"].scaler = torch.amp.GradScaler(device, enabled=False)
    return backend


def main(path: str, model: str, out: str, *options: str) -> None:
    if path == "kernels":
        pretend_cuda()
    from lite_dil.backends.torch import unsloth as torch_unsloth

    torch_unsloth.require()
    changes = {name: json.loads(value) for name, value in (option.split("=", 1) for option in options)}
    backend = make(model, "cuda" if path == "cuda" else "cpu", unsloth=True, **changes)
    results = measure(backend)
    backend.save_adapter(Path(out).with_suffix(""))
    layer = backend.decoder.layers[0]
    forwards = (type(backend.decoder).forward, layer.mlp.forward, getattr(layer.self_attn, "apply_qkv", None))
    results["checkpointing"] = np.array(bool(backend.decoder.gradient_checkpointing))
    results["forwards"] = np.array([getattr(forward, "__name__", "") for forward in forwards])
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
