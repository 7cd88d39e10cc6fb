"""``lite-dil export``: a trained adapter as something that other programs load, compared with what was trained."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from lite_dil.base.disk import failing
from lite_dil.base.errors import UserError, gather
from lite_dil.base.files import make_folder, move, remove, work_folder
from lite_dil.cli import adapter_flags
from lite_dil.models.find import EMBEDDED_MODEL, resolve_model
from lite_dil.models.options import MODEL_FIELDS

HELP = "make a trained adapter into what other programs load, and check it"
DESCRIPTION = """\
Make a trained adapter into what other programs load, then compare what was made with the trained model on held-out rows. What
answers otherwise is refused (exit code 1) and kept in OUTPUT.refused.

  adapter  the adapter alone, in PEFT's format or mlx-lm's
  merged   a Hugging Face folder, for transformers, vLLM and others
  mlx      a model folder for mlx-lm, 16-bit or quantised
  gguf     one file for llama.cpp
  ollama   that file with a Modelfile for Ollama

  lite-dil export --adapter runs/my-run --format merged --output my-model
"""
FORMATS = ("adapter", "merged", "mlx", "gguf", "ollama")
# Which formats an option is of; elsewhere it would change nothing.
_OF = {
    "to": ("adapter",),
    "weights_dtype": ("merged", "mlx"),
    "merge_into": ("merged", "mlx", "gguf", "ollama"),
    "bits": ("mlx",),
    "outtype": ("gguf", "ollama"),
    "llama_cpp": ("gguf", "ollama"),
}
_FLAGS = {"weights_dtype": "--dtype"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    # --dtype is that of the weights that are written; the trained model computes as it did in training.
    adapter_flags.add_arguments(parser, flags=[name for name in MODEL_FIELDS if name != "dtype"])
    group = parser.add_argument_group("export")
    group.add_argument("--format", choices=FORMATS, required=True, help="what to make")
    group.add_argument("--output", metavar="DIR", type=Path, required=True, help="a new folder for it")
    group.add_argument("--to", choices=("peft", "mlx-lm"), help="adapter: its format (default: the one it is not in now)")
    group.add_argument(
        "--dtype",
        dest="weights_dtype",
        choices=("bfloat16", "float16", "float32"),
        help="merged, mlx: type of the weights (default: the checkpoint's own); float16 keeps small changes, which "
        "bfloat16 rounds away",
    )
    group.add_argument(
        "--merge-into",
        choices=("trained", "original"),
        help="where training had the model in 4 bits: merge into those weights, dequantised, which is the model that was "
        "trained (the default), or into the original ones, which is another model",
    )
    group.add_argument("--bits", type=int, choices=(4, 8), help="mlx: quantise to 4 or 8 bits (default: not)")
    group.add_argument("--outtype", metavar="TYPE", help="gguf, ollama: f32, f16, bf16, q8_0 (default: q8_0)")
    group.add_argument(
        "--llama-cpp", metavar="DIR", type=Path, help="gguf, ollama: use the converter of this folder of llama.cpp"
    )
    group = parser.add_argument_group("check")
    group.add_argument("--check-rows", metavar="N", type=int, help="held-out rows to compare on (default: 8)")
    group.add_argument(
        "--check-data",
        metavar="FILE",
        help="where they are (default: what the run held out, else its data, else the embedded)",
    )
    group.add_argument("--no-check", action="store_true", help="compare nothing")
    group = parser.add_argument_group("hub")
    group.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload what was made and passed the check")
    group.add_argument("--private", action="store_true", help="to a repository that only its owner sees")


def run(args: argparse.Namespace) -> int:
    """Make, check, and perhaps upload. Returns the exit code: 1 where what was made is not the trained model."""
    from lite_dil.cli.progress import Terminal
    from lite_dil.export.exporting import Export, ExportOptions, describe

    _check_options(args)
    say = Terminal().say
    source = adapter_flags.find(args)
    assert source.adapter is not None  # --adapter is required
    output: Path = args.output
    with _work_folder(output) as work:
        made = work / "made" / output.name
        make_folder(made)
        options = ExportOptions(**{field.name: getattr(args, field.name) for field in fields(ExportOptions)})
        check = Export(options, source, work, made, say).make()
        refused = check is not None and not check.ok
        target = _refused(output) if refused else output
        if not refused:
            describe(made, source, args.format, check)
        if target.exists():  # an empty folder, or what was refused before
            remove(target)
        move(made, target)
    size = sum(path.stat().st_size for path in target.rglob("*")) / 1e9
    say(f"check: {check}" if check else "check: none was made (--no-check); nobody knows whether this is the trained model")
    if check and not check.ok:
        # The checkpoint's weights lie on the 16-bit grid: a change of less than half a step of it is rounded away.
        lost = check.mean <= check.tolerance and 0 < check.share < 1
        hint = "; weights of few bits may have rounded the adapter away: try float32 ones, or --format adapter" if lost else ""
        print(f"lite-dil: refused: this is not the trained model; what was made is in {target}{hint}", file=sys.stderr)
        return 1
    say(f"{target}: {args.format}, {size:.2f} GB")
    if args.push_to_hub:
        from lite_dil.export.push import push

        say(push(target, args.push_to_hub, args.private, say))
    say(f"next:\n{_next(args.format, target)}")
    return 0


@contextlib.contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """Give a hidden folder on the disk of `output`, which is gone in the end, also where SIGTERM ends the program."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    target = output.absolute()
    before: Any = None
    with contextlib.suppress(ValueError):  # not in the main thread, where Python allows no handlers
        before = signal.signal(signal.SIGTERM, stop)
    try:
        with (
            work_folder(target, f"--output {output}: {target.parent}", "--output") as work,
            failing(f"--output {output}", "--output", "Nothing of it is left there"),
        ):
            yield work
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _check_options(args: argparse.Namespace) -> None:
    """Raise UserError for options that go not together, and where --output is not free."""
    problems = [
        f"{flag} is of --format {' and '.join(formats)}; leave it out with {args.format}"
        for name, formats in _OF.items()
        if getattr(args, name) is not None and args.format not in formats
        for flag in [_FLAGS.get(name, f"--{name.replace('_', '-')}")]
    ]
    if args.no_check and (args.check_rows is not None or args.check_data is not None):
        problems.append("--no-check checks nothing; leave it out, or --check-rows and --check-data")
    if args.check_rows is not None and args.check_rows < 1:
        problems.append(f"--check-rows {args.check_rows}: expected at least 1; --no-check compares nothing")
    if args.no_check and args.push_to_hub:
        problems.append("--push-to-hub uploads what passed the check; leave --no-check out")
    if args.private and not args.push_to_hub:
        problems.append("--private is of --push-to-hub")
    if args.format in ("gguf", "ollama"):
        from lite_dil.export.gguf import KINDS

        if args.outtype is not None and args.outtype not in KINDS:
            problems.append(f"--outtype {args.outtype}: expected one of {', '.join(KINDS)}")
    problems += _not_free(args.output)
    if problems:
        raise UserError(gather(problems, "export cannot start:") if len(problems) > 1 else problems[0])
    if args.push_to_hub:
        from lite_dil.export.push import check as check_name

        check_name(args.push_to_hub)


def _not_free(output: Path) -> list[str]:
    """Return what is wrong with --output: what is made there takes the place of an empty folder, and of nothing else."""
    if output.name in ("", "..") or output.is_symlink() or output.is_mount():
        return [f"--output {output}: expected the name of a new folder"]
    return [
        f"--output: {folder} is there already; give a new folder"
        for folder, mark in ((output, ""), (_refused(output), "export.json"))
        if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (mark and (folder / mark).is_file())))
    ]


def _refused(output: Path) -> Path:
    """Return where goes what is not the trained model."""
    return output.with_name(f"{output.name}.refused")


def _next(format: str, made: Path) -> str:
    """Return how to load what was made, in three lines."""
    path, folder = shlex.quote(str(made)), json.dumps(str(made), ensure_ascii=False)  # for a shell, and for Python
    if format == "adapter":
        from lite_dil.models.adapter_files import is_peft, read_config

        config = read_config(made)
        if not is_peft(config):
            # The embedded model has no name that mlx-lm would know.
            model = resolve_model(EMBEDDED_MODEL) if config["model"] == EMBEDDED_MODEL else config["model"]
            return f'  mlx_lm.generate --model {shlex.quote(model)} --adapter-path {path} --prompt "Hello"'
        return (
            "  from peft import AutoPeftModelForCausalLM\n"
            f"  model = AutoPeftModelForCausalLM.from_pretrained({folder})  # on {config['base_model_name_or_path']}"
        )
    if format == "merged":
        return (
            "  from transformers import pipeline\n"
            f'  chat = pipeline("text-generation", {folder})\n'
            '  print(chat([{"role": "user", "content": "Hello"}])[0]["generated_text"][-1]["content"])'
        )
    if format == "mlx":
        return f'  mlx_lm.generate --model {path} --prompt "Hello"'
    file = next(made.glob("*.gguf"))
    if format == "gguf":
        return f"  llama-cli -m {shlex.quote(str(file))}"
    from lite_dil.export.ollama import model_name

    name = model_name(file.name)
    return f"  cd {path}\n  ollama create {name} -f Modelfile\n  ollama run {name}"
