"""What ``lite-dil export`` does: measure the trained model, merge, convert, and measure the result."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.backends import registry
from lite_dil.base.errors import UserError
from lite_dil.base.files import make_folder, write
from lite_dil.base.install import install
from lite_dil.base.version import __version__
from lite_dil.data.encoder import Example, encoder_of
from lite_dil.export import merge
from lite_dil.export.check import Check, Trained, held_out, measure, tolerance
from lite_dil.export.runtime import MORE_CONTEXT, Runtime, faults, preferred_ends
from lite_dil.generation import policy as policies
from lite_dil.generation.policy import AdapterSource, Policy
from lite_dil.models import adapter_files
from lite_dil.models.find import folder_of, load_tokenizer, resolve_model
from lite_dil.models.hub import fetch_config
from lite_dil.models.model_config import read_config
from lite_dil.models.names import public_name
from lite_dil.models.spelling import text_only

CHECK_ROWS = 8
OUTTYPE = "q8_0"
# So that a weight is rounded only once, and for fewer bits through float16, since bfloat16 rounds small changes away.
_GGUF_DTYPES = {"f32": "float32", "bf16": "bfloat16"}  # float16 for the others


@dataclass(frozen=True)
class ExportOptions:
    """What to make, and how to check it; None means the format's default.

    Attributes:
        format: "adapter", "merged", "mlx", "gguf", "ollama" or "reward".
        output: the folder to make.
        to: an adapter's new format, "peft" or "mlx-lm"; by default the one it is not in.
        weights_dtype: the type of the written weights, by default the checkpoint's.
        merge_into: "trained", the weights as training had them, or "original".
        bits: bits of an MLX model, 4 or 8.
        outtype: the type of a GGUF file: f32, f16, bf16, q8_0, or q4_K_M, q5_K_M or q6_K by llama.cpp's own quantisation.
        llama_cpp: the folder of llama.cpp with the converter to use.
        check_rows, check_data: how many held-out rows to compare, and their source.
        no_check: skip the comparison.
        push_to_hub: the repository to upload to.
    """

    format: str
    output: Path
    to: str | None = None
    weights_dtype: str | None = None
    merge_into: str | None = None
    bits: int | None = None
    outtype: str | None = None
    llama_cpp: Path | None = None
    check_rows: int | None = None
    check_data: str | None = None
    no_check: bool = False
    push_to_hub: str | None = None


class Export:
    """One export: `make` fills the folder `made`; `work`, around it, holds intermediate files.

    `policy` is the source's model and adapter, where they are in memory.

    Raises:
        UserError: this adapter, or what is installed, does not allow the export.
    """

    def __init__(
        self,
        options: ExportOptions,
        source: AdapterSource,
        work: Path,
        made: Path,
        say: Callable[[str], None],
        policy: Policy | None = None,
    ) -> None:
        assert source.adapter is not None  # the bare model has no adapter to export
        self.options, self.work, self.made, self.say = options, work, made, say
        self.format: str = options.format
        # A folder called as its format gives the model no name.
        run = source.run.path.absolute().name if source.run else f"{Path(public_name(source.options.model)).name}-tuned"
        self.name = run if made.name == self.format else made.name
        # Named like the file, since llama.cpp's converter takes the folder's name as the model's.
        self.merged = made if self.format == "merged" else work / "merged" / self.name
        self.backend = registry.resolve(source.options.backend)
        self.to: str | None = None
        if self.format == "adapter":
            self.to = options.to or ("mlx-lm" if adapter_files.format_of(source.adapter) == "peft" else "peft")
        if source.options.trust_remote_code and self.format != "adapter":
            raise UserError(f"--format {self.format}: a model with Python files of its own exports as --format adapter only")
        self.reader = self._reader()
        self.model = resolve_model(source.options.model, say)
        self.files = adapter_files.read_files(source.adapter, text_only(model_config(self.model)))
        self.encoder = encoder_of(self.model, source.options)
        self.checkpoint: merge.Checkpoint | None = None
        if self.format != "adapter":
            self.checkpoint = merge.Checkpoint.open(folder_of(self.model), source.options.model)
        if self.checkpoint is not None and self.reader == "gguf":
            self._check_gguf(self.checkpoint)
        self.source = self._as_exported(source)
        self.policy = policy if self.source is source else None  # which is of another base then
        self.facts: dict[str, Any] = {
            "lite_dil": __version__,
            "format": self.format,
            "model": public_name(source.options.model),
            "strength": source.strength,
        }

    def make(self) -> Check | None:
        """Fill the folder; return the comparison with the trained model, or None with --no-check."""
        trained = self._from_trained()
        if trained is not None:
            registry.free(self.backend)  # between the trained model and the made one
        if self.format in ("mlx", "gguf", "ollama"):
            self._convert()
        check = None
        if trained is not None:
            self.say(f"checking {self.format} on {len(trained.examples)} rows of {trained.data} ...")
            check = self._check(trained)
        self.facts["check"] = check.as_dict() if check else None
        text = json.dumps(self.facts, indent=2, ensure_ascii=False, allow_nan=False)
        write(self.made / "export.json", text + "\n")
        return check

    def _reader(self) -> str:
        """Return what loads the made files for the check, "torch", "mlx" or "gguf"; it must be installed."""
        if self.format in ("gguf", "ollama"):
            return "gguf"
        if self.format == "merged":
            reader = "torch" if _has_torch() else "mlx"
        else:
            reader = "mlx" if self.format == "mlx" or self.to == "mlx-lm" else "torch"
        installed = importlib.util.find_spec("mlx_lm") is not None if reader == "mlx" else _has_torch()
        if not installed and (self.format == "mlx" or not self.options.no_check):
            what = f"--to {self.to}" if self.to else f"--format {self.format}"
            needed = "mlx-lm" if reader == "mlx" else "torch, peft and accelerate"
            instead = "" if self.format == "mlx" else ", or skip the check with --no-check"
            fix = install("mlx" if reader == "mlx" else "cpu")
            raise UserError(f"{what} is checked with {needed}: {fix}{instead}" if instead else f"{what} needs {needed}: {fix}")
        return reader

    def _check_gguf(self, checkpoint: merge.Checkpoint) -> None:
        """Raise UserError early if the model cannot become a GGUF file, or its template an Ollama one."""
        from lite_dil.export import gguf as gguf_export

        gguf_export.check(
            checkpoint.folder, checkpoint.tensors, self._outtype(), self.options.llama_cpp, not self.options.no_check
        )
        if self.format == "ollama":
            from lite_dil.export.ollama import probe

            probe(load_tokenizer(str(checkpoint.folder)))

    def _as_exported(self, source: AdapterSource) -> AdapterSource:
        """Return the source with the model to merge into; tell the user if that differs from the trained one."""
        config, checkpoint = source.options, self.checkpoint
        if self.options.merge_into == "original":
            if checkpoint is not None and checkpoint.packed:
                raise UserError(
                    f"--merge-into original: {config.model} itself is quantised; give the 16-bit model with --model"
                )
            if config.load_in_4bit or config.head_bits:
                self.say("--merge-into original: training used these weights in fewer bits, so the result is another model")
            return replace(source, options=replace(config, load_in_4bit=False, head_bits=None))
        if config.head_bits:
            why = ""
            if checkpoint is None and not self.backend == self.reader == "mlx":
                why = f"with {self.to} it has full precision"
            elif checkpoint is not None and checkpoint.tied and self.backend != "mlx":
                why = "it is also the embedding table and keeps full precision"
            if why:
                self.say(f"the output head had {config.head_bits} bits in training; {why}, also in the check")
                return replace(source, options=replace(config, head_bits=None))
        return source

    def _from_trained(self) -> Trained | None:
        """Do the work that needs the trained model in memory, and return its figures; then free it."""
        config, checkpoint = self.source.options, self.checkpoint
        rows: tuple[list[Example], str] | None = None
        if not self.options.no_check:  # before loading the model, which is slow
            count = self.options.check_rows or CHECK_ROWS
            rows = held_out(self.source, self.encoder, count, self.options.check_data, self.say)
        loaded: Policy | None = None
        quantised = checkpoint is not None and (config.load_in_4bit or config.head_bits or checkpoint.packed)
        if quantised or rows:
            loaded = self.policy or policies.load(self.source, self.say, in_files=True)
        if checkpoint is None:
            self._write_adapter()
        else:
            self._merge(checkpoint, loaded)
        return measure(loaded.backend, *rows) if loaded and rows else None

    def _merge(self, checkpoint: merge.Checkpoint, loaded: Policy | None) -> None:
        """Write the merged Hugging Face folder, the result or an intermediate step."""
        dense = registry.module(self.backend, "export").dense(loaded.backend) if loaded else {}
        dtype = self.options.weights_dtype or (_GGUF_DTYPES.get(self._outtype(), "float16") if self.reader == "gguf" else None)
        adapter = adapter_files.float_adapter(self.files, self.source.strength)
        if _has_torch() and merge.lacks(checkpoint, adapter):
            renamed = registry.module("torch", "export").renamed(self.model, checkpoint.tensors)
            checkpoint = replace(checkpoint, renamed=renamed)
        planned = merge.plan(checkpoint, adapter, dense, dtype, self.source.options.model)
        self._need_disk(sum(tensor.nbytes for tensor in planned))
        self.say(f"merging the adapter into {len(adapter.weights)} layers" + (f", {len(dense)} dequantised" if dense else ""))
        make_folder(self.merged)
        merge.write(self.merged, planned, checkpoint, dtype, self.encoder.end_ids(), self.encoder.rendering.arguments)
        self.facts |= {"dtype": dtype or checkpoint.dtype, "dequantised_weights": len(dense)}

    def _need_disk(self, merged: int) -> None:
        """Raise UserError if the disk has no room for the merged weights and what is made from them."""
        second = {"merged": 0.0, "mlx": (self.options.bits + 0.5) / 16 if self.options.bits else 1.0}.get(self.format, 1.35)
        needed, free = merged * (1 + second) * 1.02, shutil.disk_usage(self.work).free
        if free < needed:
            beside = ", for the merged model and what is made from it" if second else ""
            raise UserError(
                f"--output {self.options.output}: {needed / 1e9:.1f} GB are needed there{beside}; {free / 1e9:.1f} GB are free"
            )

    def _write_adapter(self) -> None:
        """Write the adapter in the requested format, and read it back."""
        name, config = self.source.options.model, model_config(self.model)
        method = (config.get("quantization_config") or {}).get("quant_method")
        packed_for = "peft" if method else "mlx-lm" if config.get("quantization") else self.to
        if packed_for != self.to:
            raise UserError(f"--to {self.to}: {name} is quantised for {packed_for} only; give the 16-bit model with --model")
        if Path(name).is_dir():
            if self.options.push_to_hub:
                name = public_name(name)
            path = "" if self.options.push_to_hub else ", a path on this machine"
            self.say(f"adapter_config.json will name the model as {name}{path}")
        strength = self.source.strength
        if self.to == "peft":
            layers = set(self.files.adapter.weights)
            targets = registry.module("torch", "export").peft_targets(self.model, layers) if _has_torch() else None
            adapter_files.write_peft(self.made, self.files, strength, name, targets or {"target_modules": sorted(layers)})
        else:
            count = (config.get("text_config") or config).get("num_hidden_layers", -1)
            adapter_files.write_mlx(self.made, self.files, strength, name, count, text_only(config))
            if config.get("rope_parameters") and "rope_theta" not in config:
                self.say(f"warning: plain mlx-lm does not read the rope_parameters of {name}; use --format mlx")
        again = adapter_files.read_files(self.made, text_only(config)).adapter
        for layer, pair in self.files.adapter.weights.items():
            if not all(map(np.array_equal, pair, again.weights[layer])):
                raise AssertionError(f"{layer} was written with other numbers than it was read")
        self.facts["to"] = self.to

    def _convert(self) -> None:
        """Convert the merged folder to the requested format."""
        if self.format == "mlx":
            self.say("writing the MLX model")
            registry.module("mlx", "export").write_model(self.merged, self.made, self.options.bits)
            self.facts["bits"] = self.options.bits
            return
        from lite_dil.export import gguf as gguf_export

        file, kind = self._gguf(), self._outtype()
        gguf_export.convert(self.merged, file, kind, self.options.llama_cpp, self.say)
        self.facts["outtype"] = kind
        if self.format == "ollama":
            from lite_dil.export.ollama import write_modelfile

            for note in write_modelfile(
                self.made, file.name, load_tokenizer(str(self.merged)), merge.defaults_of(self.merged)
            ):
                self.say(f"Modelfile: {note}")

    def _check(self, trained: Trained) -> Check:
        """Compare what was made, loaded by the libraries that it is for, with the trained model."""
        library: Any = None if self.reader == "gguf" else registry.module(self.reader, "export")
        sequences = trained.sequences
        if self.format == "adapter":
            config = self.source.options
            if not self._same_library():
                # What computed in float32 is compared in it: in 16 bits, rounding sends tokens of mixtures to other experts.
                exact = trained.dtype == "float32" and not config.load_in_4bit
                config = replace(config, dtype="float32" if exact else "auto")
            return trained.compare(library.adapter_logps(self.model, self.made, config, sequences), self._tolerance(trained))
        with library.exported(self.made) if library else self._opened(trained) as made:
            logps = made.logps(sequences)
            check = trained.compare(logps, self._tolerance(trained))
            ends = preferred_ends(sequences, logps, self.encoder.end_ids())
            return replace(check, ends=ends, faults=tuple(faults(made, self.encoder, sequences, self.say)))

    def _opened(self, trained: Trained) -> AbstractContextManager[Runtime]:
        """Open the GGUF file, as Ollama does by its Modelfile where there is one."""
        from lite_dil.export import gguf_reading

        tokenizer, render, stops = self.encoder.tokenizer, None, None
        if self.format == "ollama":
            from lite_dil.export.ollama import probe, stops_of

            render, stops = probe(tokenizer).render, stops_of(self.made / "Modelfile")
        context = max(sum(map(len, sequence)) for sequence in trained.sequences) + MORE_CONTEXT
        return gguf_reading.opened(self._gguf(), context, tokenizer, self.say, render, stops)

    def _tolerance(self, trained: Trained) -> float:
        """Return the allowed mean difference, given the rounding on both sides."""
        if self.reader == "gguf":
            from lite_dil.export.gguf import GGUF_TOLERANCES

            return GGUF_TOLERANCES[self._outtype()] + tolerance(self.facts["dtype"], trained.dtype)
        if self.format == "adapter":
            if self._same_library():
                return tolerance(trained.dtype)
            return tolerance("4-bit" if self.source.options.load_in_4bit else "bfloat16", trained.dtype)
        made = f"{self.options.bits}-bit" if self.options.bits else self.facts["dtype"]
        return tolerance(made, trained.dtype)

    def _same_library(self) -> bool:
        return (self.reader == "mlx") == (self.backend == "mlx")

    def _outtype(self) -> str:
        return self.options.outtype or OUTTYPE

    def _gguf(self) -> Path:
        return self.made / f"{self.name}.gguf"


def describe(folder: Path, source: AdapterSource, format: str, check: Any) -> None:
    """Write the model card."""
    from lite_dil.reports.card import write_card

    write_card(folder, source, format, check, shlex.join(["lite-dil", *sys.argv[1:]]))


def model_config(model: str) -> dict[str, Any]:
    """Return the config.json of a resolved model, downloaded if it is a hub id."""
    file = Path(model) / "config.json" if Path(model).is_dir() else fetch_config(model)
    return read_config(file, f"--model {model}")


def _has_torch() -> bool:
    return all(importlib.util.find_spec(module) is not None for module in ("torch", "peft", "accelerate"))
