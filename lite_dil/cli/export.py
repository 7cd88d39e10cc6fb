"""``lite-dil export``: convert a trained adapter for other programs, and compare the result with the trained model."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

from lite_dil.base.shell import quote
from lite_dil.cli import adapter_flags
from lite_dil.export.formats import EXPORT_FORMATS
from lite_dil.models.find import EMBEDDED_MODEL, resolve_model
from lite_dil.models.options import MODEL_FIELDS

HELP = "convert a trained adapter for other programs, and check the result"
DESCRIPTION = """\
Convert a trained adapter for other programs, then compare the result with the trained model on held-out rows. A result that
differs is refused (exit code 1) and kept in OUTPUT.refused.

  adapter  the adapter alone, in PEFT's format or mlx-lm's
  merged   a Hugging Face folder, for transformers, vLLM and others
  mlx      a model folder for mlx-lm, 16-bit or quantised
  gguf     one file for llama.cpp
  ollama   that file with a Modelfile for Ollama
  reward   of a reward model: a Hugging Face folder for AutoModelForSequenceClassification

  lite-dil export --adapter runs/my-run --format merged --output my-model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    # --dtype is the type of the weights written; the trained model computes as it did in training.
    adapter_flags.add_arguments(parser, flags=[name for name in MODEL_FIELDS if name != "dtype"])
    group = parser.add_argument_group("export")
    group.add_argument("--format", choices=EXPORT_FORMATS, required=True, help="what to make")
    group.add_argument("--output", metavar="DIR", type=Path, required=True, help="a new folder for the result")
    group.add_argument("--to", choices=("peft", "mlx-lm"), help="adapter: its format (default: the one it is not in)")
    group.add_argument(
        "--dtype",
        dest="weights_dtype",
        choices=("bfloat16", "float16", "float32"),
        help="merged, mlx, reward: type of the weights (default: the checkpoint's own); float16 keeps small changes, which "
        "bfloat16 rounds away",
    )
    group.add_argument(
        "--merge-into",
        choices=("trained", "original"),
        help="after 4-bit training: merge into the dequantised 4-bit weights, which gives the trained model (the default), or "
        "into the original weights, which gives another model",
    )
    group.add_argument("--bits", type=int, choices=(4, 8), help="mlx: quantise to 4 or 8 bits (default: no)")
    group.add_argument(
        "--outtype",
        metavar="TYPE",
        help="gguf, ollama: f32, f16, bf16, q8_0; or q4_K_M, q5_K_M, q6_K by llama.cpp, from llama-cpp-python or as "
        "llama-quantize on the PATH (default: q8_0)",
    )
    group.add_argument(
        "--llama-cpp", metavar="DIR", type=Path, help="gguf, ollama: use the converter in this llama.cpp folder"
    )
    group = parser.add_argument_group("check")
    group.add_argument("--check-rows", metavar="N", type=int, help="held-out rows to compare on (default: 8)")
    group.add_argument(
        "--check-data",
        metavar="FILE",
        help="their data (default: what the run held out, else its training data, else the embedded data)",
    )
    group.add_argument("--no-check", action="store_true", help="skip the comparison")
    group = parser.add_argument_group("hub")
    group.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the result if it passed the check")
    group.add_argument("--private", action="store_true", help="upload to a private repository")


def run(args: argparse.Namespace) -> int:
    """Convert, check, and upload if asked. Returns the exit code: 1 if the result is not the trained model."""
    from lite_dil.cli.progress import Terminal
    from lite_dil.export.exporting import ExportOptions
    from lite_dil.export.making import Refused, check_options, export

    options = ExportOptions(**{field.name: getattr(args, field.name) for field in fields(ExportOptions)})
    check_options(options, ["--private needs --push-to-hub"] if args.private and not args.push_to_hub else [])
    say = Terminal().say
    try:
        made = export(options, adapter_flags.find(args), say)
    except Refused as error:
        print(f"lite-dil: {error}", file=sys.stderr)
        return 1
    if args.push_to_hub:
        from lite_dil.export.push import push

        say(push(made, args.push_to_hub, args.private, say))
    say(f"next:\n{_next(args.format, made)}")
    return 0


def _next(format: str, made: Path) -> str:
    """Return how to load the result, in at most three lines."""
    path, folder = quote(str(made)), json.dumps(str(made), ensure_ascii=False)  # for a shell, and for Python
    if format == "adapter":
        from lite_dil.models.adapter_config import read_config

        config = read_config(made)
        if not config.peft:
            # mlx-lm does not know the embedded model's name.
            model = resolve_model(EMBEDDED_MODEL) if config.model == EMBEDDED_MODEL else config.model
            return f'  mlx_lm.generate --model {quote(model)} --adapter-path {path} --prompt "Hello"'
        return (
            "  from peft import AutoPeftModelForCausalLM\n"
            f"  model = AutoPeftModelForCausalLM.from_pretrained({folder})  # on {config.model}"
        )
    if format == "merged":
        return (
            "  from transformers import pipeline\n"
            f'  chat = pipeline("text-generation", {folder})\n'
            '  print(chat([{"role": "user", "content": "Hello"}])[0]["generated_text"][-1]["content"])'
        )
    if format == "reward":
        return (
            "  from transformers import AutoModelForSequenceClassification\n"
            f"  model = AutoModelForSequenceClassification.from_pretrained({folder})\n"
            "  # README.md there shows how to score a response"
        )
    if format == "mlx":
        return f'  mlx_lm.generate --model {path} --prompt "Hello"'
    file = next(made.glob("*.gguf"))
    if format == "gguf":
        return f"  llama-cli -m {quote(str(file))}"
    from lite_dil.export.ollama import model_name

    name = model_name(file.name)
    return f"  cd {path}\n  ollama create {name} -f Modelfile\n  ollama run {name}"
