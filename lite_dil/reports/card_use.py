"""How to use a published folder, in a few lines per format, for the model card."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from lite_dil.base.text import one_line
from lite_dil.data.arguments import parse_arguments

_HERE = 'here = "."  # this folder, or OWNER/NAME of its page on the hub'
_HERE_LOCAL = 'here = "."  # this folder; for one on the hub: huggingface_hub.snapshot_download("OWNER/NAME")'
_MESSAGES = 'messages = [{"role": "user", "content": "What is the capital of France?"}]\n'
_TORCH_CHAT = (
    _MESSAGES
    + 'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")'
)
_TORCH_TEXT = 'inputs = tokenizer("The capital of France is", return_tensors="pt")'
_TORCH = """\
answer = model.generate(**inputs.to(model.device), max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
_MLX_CHAT = _MESSAGES + "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)"
_MLX_TEXT = 'prompt = "The capital of France is"'
_MLX = "print(generate(model, tokenizer, prompt=prompt, max_tokens=256))"

_TRAINED_IN_NF4 = (
    "\n\nIn training the base model was in 4 bits (NF4, double quantisation), as with bitsandbytes: "
    '`quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
    "bnb_4bit_use_double_quant=True)`. In 16 bits its answers differ a little."
)
_TRAINED_IN_MLX_4BIT = (
    "\n\nIn training the base model was in 4 bits (groups of 64), as with `mlx_lm.convert --quantize`. "
    "In 16 bits its answers differ a little."
)


def how_to_use(kind: str, folder: Path, base: str, options: dict[str, Any], data: dict[str, Any]) -> str:
    """Return Markdown on how to load and run the model.

    Args:
        kind: "peft", "mlx-lm", "merged", "mlx", "gguf" or "ollama".
        base: the base model's hub id, or a placeholder for its folder.
        options: the run's, or {} if they are not known.
        data: the run's notes on its data; a chat is assumed if they are empty.
    """
    model, chat = json.dumps(one_line(base)), data.get("chat", True)
    if kind in ("gguf", "ollama"):
        return _with_llama_cpp(folder, ollama=kind == "ollama")
    library = _with_mlx if kind in ("mlx-lm", "mlx") else _with_transformers
    text = library(model if kind in ("peft", "mlx-lm") else None, chat)
    if given := parse_arguments(options.get("chat_template_kwargs")) if chat else {}:
        further = "".join(f", {name}={value!r}" for name, value in given.items())
        text = text.replace("add_generation_prompt=True", f"add_generation_prompt=True{further}")
    if kind == "peft" and options.get("load_in_4bit") and options["backend"] != "mlx":
        text += _TRAINED_IN_NF4
    if kind == "mlx-lm" and options.get("load_in_4bit"):
        text += _TRAINED_IN_MLX_4BIT
    return text


def _with_transformers(base: str | None, chat: bool) -> str:
    """Return code that loads a full model, or with `base` an adapter on that model."""
    peft = "from peft import PeftModel\n" if base else ""
    if base:
        whole = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}, dtype="auto"), here)'
    else:
        whole = 'AutoModelForCausalLM.from_pretrained(here, dtype="auto")'
    return f"""\
```python
{peft}from transformers import AutoModelForCausalLM, AutoTokenizer

{_HERE}
model = {whole}
tokenizer = AutoTokenizer.from_pretrained({base or "here"})
{_TORCH_CHAT if chat else _TORCH_TEXT}
{_TORCH}
```"""


def _with_mlx(base: str | None, chat: bool) -> str:
    """Return the same with mlx-lm."""
    return f"""\
```python
from mlx_lm import generate, load

{_HERE_LOCAL if base else _HERE}
model, tokenizer = load({f"{base}, adapter_path=here" if base else "here"})
{_MLX_CHAT if chat else _MLX_TEXT}
{_MLX}
```"""


def _with_llama_cpp(folder: Path, ollama: bool) -> str:
    name = shlex.quote(next((path.name for path in sorted(folder.glob("*.gguf"))), "MODEL.gguf"))
    llama = f"With [llama.cpp](https://github.com/ggml-org/llama.cpp):\n\n```bash\nllama-cli -m {name} -cnv\n```"
    if not ollama:
        return llama
    return f"With [Ollama](https://ollama.com):\n\n```bash\nollama create tuned -f Modelfile\nollama run tuned\n```\n\n{llama}"
