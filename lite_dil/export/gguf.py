"""Convert a model folder to a GGUF file, for llama.cpp, Ollama, LM Studio and others."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.base.errors import UserError
from lite_dil.base.files import make_folder, remove, replacing
from lite_dil.base.install import install
from lite_dil.export import gguf_vocabulary, gguf_weights
from lite_dil.export.gguf_reading import different_tokens, reader, silence
from lite_dil.export.merge import defaults_of, end_tokens
from lite_dil.models.find import load_tokenizer
from lite_dil.models.tensors import Stored

# Type of the numbers -> its name in a GGUF file's general.file_type. llama.cpp's converter makes the same types.
KINDS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
# llama.cpp's own quantisations, by the number of their llama_ftype.
QUANTISED = {"q4_K_M": 15, "q5_K_M": 17, "q6_K": 18}
# Allowed mean difference of a token's log-prob from the trained model's, in nats, over held-out responses; the rounding of the
# trained side's compute type is added. Measured on SmolLM2-135M, 772 tokens, llama.cpp against float32 (transformers reads the
# file's numbers, llama.cpp computes in the file's type and caches keys and values in float16): f32 0.001, f16 0.002, bf16
# 0.012, q8_0 0.077. The limits are about three times that; a file with one wrong projection is off by nats.
# llama.cpp's q6_K 0.12, q5_K_M 0.34, q4_K_M 0.32: rows of that model are too short for blocks of 256, and get 5 bits for 4.
GGUF_TOLERANCES = {"f32": 0.005, "f16": 0.01, "bf16": 0.04, "q8_0": 0.25, "q6_K": 0.4, "q5_K_M": 1.0, "q4_K_M": 1.5}
# Texts on which tokenizers disagree: contractions, digits, kinds of space, scripts, emoji of several code points, code.
PROBES = (
    "Hello world, it's Tom's; I'LL go.\n\n\n  and   then\t\ttabs \r\n and",
    "12345 3.14 1,000,000 a1b22c333 ½",
    "naïve café, 日本語のテキスト, русский, עברית, ไทย, 한국어",
    "😀👩‍👩‍👧‍👦 🇫🇷 ∑ ≠ … “quoted” — dash",
    " leading and trailing  ",
    'for (int i=0; i<10; i++) { x[i] += "a\\n"; }  // done',
)
_CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")


def convert(merged: Path, target: Path, kind: str, llama_cpp: Path | None, say: Callable[[str], None]) -> None:
    """Make the GGUF file `target` from the model folder `merged`, completely or not at all.

    A kind of ``QUANTISED`` is made from an f16 file by llama.cpp, from llama-cpp-python or as llama-quantize on the PATH. The
    rest uses llama.cpp's own converter if that is found in the folder `llama_cpp`, in $LLAMA_CPP_DIR or on the PATH. Otherwise
    the file is written here, for the architectures and tokenizers that can be written exactly. If llama-cpp-python is
    installed, `PROBES` must give the same tokens.

    Args:
        merged: a Hugging Face folder with weights of 16 or 32 bits, without an adapter.
        kind: one of ``KINDS`` or ``QUANTISED``, the type of the matrices; vectors stay float32.
        say: shows a line to the user.

    Raises:
        UserError: the model or its tokenizer cannot be written exactly, a package is missing, or the converter failed.
    """
    make_folder(target.parent)
    if kind in QUANTISED:
        whole = target.parent / "f16" / target.name
        convert(merged, whole, "f16", llama_cpp, say)
        say(f"quantising to {kind} with llama.cpp")
        with replacing(target) as made:
            _quantise(whole, made, kind)
        remove(whole.parent)
        return
    converter = find_converter(llama_cpp)
    with replacing(target) as made:
        if converter:
            say(f"converting with {converter}")
            _run(converter, merged, made, kind)
        else:
            _write(merged, made, kind, target.stem, say)
        _check_tokens(made, merged)


def check(model: Path, found: Mapping[str, Stored], kind: str, llama_cpp: Path | None, logps: bool) -> None:
    """Raise UserError if `convert` would refuse a model, as far as that is known before the merge.

    Args:
        model: the folder of the model, not merged yet.
        found: the tensors in it.
        logps: whether the file will be read for the check.
    """
    if find_converter(llama_cpp) is None:
        _need_gguf()
        gguf_weights.read_config(model)
        gguf_vocabulary.read(load_tokenizer(str(model)), gguf_weights.vocabulary_rows(found), lambda line: None)
    if logps:
        reader()
    if kind in QUANTISED and not _quantiser():
        raise UserError(
            f"--outtype {kind} needs llama.cpp: pip install llama-cpp-python, or its llama-quantize on the PATH. Or export "
            f"with --outtype f16, and where llama.cpp is: llama-quantize MODEL.gguf MODEL-{kind}.gguf {kind.upper()}"
        )


def _quantiser() -> str | None:
    """Return what quantises: "llama_cpp", the path of llama-quantize, or None."""
    return "llama_cpp" if importlib.util.find_spec("llama_cpp") is not None else shutil.which("llama-quantize")


def _quantise(whole: Path, made: Path, kind: str) -> None:
    if (program := _quantiser()) != "llama_cpp":
        assert program is not None  # `check` came first
        _call([program, str(whole), str(made), kind.upper()], made)
        return
    import llama_cpp

    llama_cpp.llama_log_set(silence(), None)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = QUANTISED[kind]
    if code := llama_cpp.llama_model_quantize(str(whole).encode(), str(made).encode(), ctypes.byref(params)):
        raise UserError(f"llama.cpp could not quantise {whole.name} to {kind} (code {code})")


def find_converter(llama_cpp: Path | None) -> Path | None:
    """Return llama.cpp's converter, or None if there is none.

    Raises:
        UserError: it is not in the given folder.
    """
    origin = "--llama-cpp" if llama_cpp else "$LLAMA_CPP_DIR"
    if folder := llama_cpp or os.environ.get("LLAMA_CPP_DIR"):
        script = Path(folder) / _CONVERTERS[0]
        if not script.is_file():
            raise UserError(f"{origin} {folder}: no {script.name} there; give the folder of llama.cpp's source")
        return script
    return next((Path(path) for name in _CONVERTERS if (path := shutil.which(name))), None)


def _run(converter: Path, merged: Path, made: Path, kind: str) -> None:
    python = [sys.executable] if converter.suffix == ".py" else []
    _call([*python, str(converter), str(merged), "--outfile", str(made), "--outtype", kind], made)


def _call(command: list[str], made: Path) -> None:
    """Run a program of llama.cpp that makes a file."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode or not made.is_file() or not made.stat().st_size:
        last = "\n".join(line for line in done.stdout.splitlines()[-8:] if line.strip())
        program = next(word for word in command if word != sys.executable)
        raise UserError(f"{program} failed (exit code {done.returncode}). Its last lines:\n{last}")


def _write(merged: Path, made: Path, kind: str, name: str, say: Callable[[str], None]) -> None:
    _need_gguf()
    import gguf

    config = gguf_weights.read_config(merged)
    found = gguf_weights.tensors(merged)
    planned = gguf_weights.plan(config, found)
    rows = gguf_weights.vocabulary_rows(found)
    vocabulary = gguf_vocabulary.read(load_tokenizer(str(merged)), rows, say, end_tokens(defaults_of(merged)))
    if getattr(config, "sliding_window", None) and config.model_type == "mistral":
        say(f"note: the format has no sliding window for this model; results differ beyond {config.sliding_window} tokens")
    writer = gguf.GGUFWriter(made, gguf_weights.ARCHITECTURES[config.model_type])
    try:
        gguf_weights.write_config(config, name, rows, writer)
        writer.add_file_type(gguf.LlamaFileType[KINDS[kind]])
        vocabulary.write(writer)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for target, tensor in planned.items():
            stored = _stored_type(kind, tensor.shape)
            size, item = gguf.GGML_QUANT_SIZES[stored]
            writer.add_tensor_info(target, tensor.shape, np.dtype(np.float32), tensor.count // size * item, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for target, tensor in planned.items():
            values = tensor.read()
            stored = _stored_type(kind, tensor.shape)
            if stored == gguf.GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
                raise UserError(f"{target} has numbers too large for f16; take bf16 or q8_0")
            writer.write_tensor_data(gguf.quantize(values, stored))
    finally:
        writer.close()


def _need_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"writing GGUF files needs the gguf package: {install('gguf')}")


def _check_tokens(made: Path, merged: Path) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        return
    if different := different_tokens(made, load_tokenizer(str(merged)), PROBES):
        raise UserError(f"llama.cpp reads {different[0]!r} as other tokens than the model's own tokenizer")


def _stored_type(kind: str, shape: tuple[int, ...]) -> Any:
    """Return a tensor's type in a file of a kind: vectors are small and sensitive, and a q8_0 block is 32 numbers of a row."""
    from gguf import GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType["F16" if kind == "q8_0" and shape[-1] % 32 else kind.upper()]
