"""Estimate the memory of a step on torch; the layers of the known dense families are in `lite_dil.planning.dense_layer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lite_dil.backends.limits import (
    FLEX_BLOCK,
    HEAD_SUMS,
    HEAD_TILE,
    MLP_TILE,
    OFFLOAD_CHUNK,
    TORCH_CHUNK,
    checkpointing,
    chunk_tokens,
)
from lite_dil.base.errors import UserError
from lite_dil.base.memory import GIB, expandable_segments, on_wsl
from lite_dil.batching.schedule import PRECOMPUTE_ROWS, examples_per_step, row_tokens
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.models.shape import Linear, ModelShape
from lite_dil.planning.dense_layer import Layer, peak
from lite_dil.planning.drawing import Drawing
from lite_dil.planning.estimate import BYTES, FLOAT32, Estimate, Load, adapter_tensors, head_tensors, layout_for
from lite_dil.planning.reward_models import reward_bytes, rewarding_bytes

# Share of reserved GPU memory lost to fragmentation, with expandable segments and without, by the allocator's statistics in
# steps of an 8B Llama (docs/LOG.md).
RESERVE, FIXED_RESERVE = 0.0625, 0.13
WORKSPACE = 2**24  # cuBLAS, 8 MiB, and small things
PROCESS = 2 * GIB  # of the computer's memory: Python, torch and transformers 1.2 GiB, the rest a guess for CUDA
NF4_BLOCK, NF4_GROUP, NF4_TABLES = 64, 256, 16 * 4 + 256 * 4 + 4  # weights per scale, scales per second scale, bytes per layer


class TorchStep:
    """A training step of the torch backend; see `lite_dil.planning.peak.estimate` for the arguments."""

    def __init__(self, config: ResolvedConfig, shape: ModelShape, backend: str, dtype: str, load: Load) -> None:
        self.config, self.shape, self.load = config, shape, load
        self.cuda, self.e, self.dtype = backend == "cuda", BYTES[dtype], dtype
        self.layout = layout_for(config, shape, backend)
        self.packed4 = config.load_in_4bit or shape.quantization is not None
        self._check()
        self.mode = checkpointing(config, shape.parameters)
        self.eight_bit = config.optim == "paged_adamw_8bit" or (config.optim == "auto" and self.packed4)
        self.tokens = load.tokens(self.layout, FLEX_BLOCK if self.cuda else 1)
        self.tensors = adapter_tensors(config, shape)
        self.rank = next(iter(self.tensors.values()))[0][0]
        self.head = head_tensors(config, shape)
        self.sizes = [rows * columns for tensors in (*self.tensors.values(), self.head) for rows, columns in tensors]
        self.adapter = sum(self.sizes) * FLOAT32
        self.linears = shape.linears()
        self.prepare()

    def prepare(self) -> None:
        """Set what only the known dense families need."""
        self.fused_linears = self.config.fused_layers and not self.config.lora_dropout
        self.fused_mlp = self.fused_linears and not self.shape.joined  # backends/torch/fused.py
        self.targets = {".".join(name.split(".")[-2:]) for name in self.tensors}
        self.mlp_tile = max(16, MLP_TILE // self.shape.intermediate)

    def _check(self) -> None:
        config, shape = self.config, self.shape
        if shape.quantization is not None and shape.quantization.library != "bitsandbytes":
            raise UserError(f"--model {config.model} is quantised for MLX; --backend cuda and cpu cannot load it")
        if config.offload_embeddings and shape.tied and not config.head_bits:
            raise UserError("--offload-embeddings: the table is the output head too; add --head-bits 8 (or 4)")

    def frozen(self, linear: Linear) -> int:
        """Return the bytes of a linear layer of the base: NF4 with its scales, or unquantised."""
        weight = self.packed(linear) if self.packed4 else linear.weight * self.e
        return weight + (linear.parameters - linear.weight) * self.e

    def packed(self, linear: Linear) -> int:
        """Return the bytes of a weight in NF4 with its scales."""
        blocks = linear.weight // NF4_BLOCK
        scales = blocks * FLOAT32
        if self.config.load_in_4bit or (self.shape.quantization and self.shape.quantization.double):
            scales = blocks + blocks // NF4_GROUP * FLOAT32 + NF4_TABLES
        return linear.weight // 2 + scales

    def unpacked(self, names: Sequence[str]) -> int:
        """Return the bytes of the largest of these weights while it is unpacked, scales included."""
        largest = max(self.linears[name].weight for name in names)
        return largest * self.e + largest // NF4_BLOCK * FLOAT32 if self.packed4 else 0

    def weights(self) -> dict[str, int]:
        """Return the frozen model's bytes by component."""
        linears = self.shape.layers * sum(map(self.frozen, self.linears.values()))
        linears += sum(linear.weight * self.e - self.packed(linear) for linear in self.shape.left_whole())
        return {"linears": linears, **self.head_and_table(), "norms": self.shape.norm_parameters * self.e}

    def head_and_table(self) -> dict[str, int]:
        """Return the bytes of the embedding table and of the output head."""
        s, table = self.shape, self.shape.table * self.e
        head = 0 if s.tied else table
        if bits := self.config.head_bits:
            head = s.table * bits // 8 + s.table // NF4_BLOCK * FLOAT32
        return {"embeddings": 0 if self.config.offload_embeddings else table, "head": head}

    def tower(self) -> int:
        """Return the bytes of the parts that text does not pass through: they are loaded, and freed then."""
        return sum(map(self.frozen, self.shape.side)) + self.shape.side_rest * self.e

    def optimizer(self) -> tuple[int, int]:
        """Return the bytes of AdamW's state, and how many of them are paged and may leave the GPU.

        The state is two float32 per parameter, or two bytes with a scale per 256. bitsandbytes keeps it in float32 for tensors
        of fewer than 4096 parameters, and pages it for those of 100000 or more.
        """
        here = paged = 0
        for size in self.sizes:
            if not self.eight_bit or size < 4096:
                here += 2 * size * FLOAT32
                continue
            here += 2 * -(-size // 256) * FLOAT32
            # On WSL managed memory cannot exceed the GPU's own.
            if self.cuda and size >= 100_000 and not on_wsl():
                paged += 2 * size
            else:
                here += 2 * size
        return here, paged

    def estimate(self) -> Estimate:
        """Return the peak over the phases."""
        state, paged = self.optimizer()
        fixed: dict[str, Any] = {**self.weights(), "adapter": self.adapter, "optimizer": state}
        if self.cuda:
            fixed["host_parts"] = self.host(paged)
        if self.config.reference == "initial-adapter":
            fixed["reference"] = self.adapter
        fixed["rewards"] = reward_bytes(self.config, self.e)
        found = [Estimate(phase, **{**fixed, **parts}) for phase, parts in self.phases().items()]
        if self.cuda:
            found = [replace(e, temporaries=e.temporaries + WORKSPACE) for e in found]
            share = RESERVE if expandable_segments() else FIXED_RESERVE
            found = [replace(e, reserve=int(e.total * share)) for e in found]
        best = max(found, key=lambda e: e.total)
        return replace(best, phases=tuple((e.phase, e.total) for e in found))

    def host(self, paged: int) -> tuple[tuple[str, int], ...]:
        """Return what a GPU run has in the computer's memory, by purpose.

        While weights load, the largest is there unquantised, and so is a head that is quantised later.
        """
        s, kept = self.shape, 0
        if self.config.offload_activations and self.mode == "full":
            kept = -(-s.layers * self.tokens * s.hidden * self.e // OFFLOAD_CHUNK) * OFFLOAD_CHUNK
        largest = max([s.table, *(linear.weight for linear in self.linears.values()), s.largest_expert]) * self.e
        waiting = s.table * self.e if self.config.head_bits and not s.tied else 0
        loading = max(0, waiting + largest - kept - paged)
        return (
            ("the process", PROCESS),
            ("embeddings", s.table * self.e if self.config.offload_embeddings else 0),
            ("activations", kept),
            ("paged optimiser", paged),
            ("loading", loading),
        )

    def phases(self) -> dict[str, dict[str, int]]:
        """Return what each phase holds besides the weights, the adapter and the optimiser's state."""
        found = {"loading": self.loading()}
        if self.config.precompute_reference:
            found["reference beforehand"] = self.beforehand()
        if self.config.online:
            found |= self.drawn()
        several = self.config.gradient_accumulation_steps > 1  # the gradients of earlier passes exist
        found |= self.backward(several)
        found["optimiser"] = {"gradients": self.adapter}  # the fused AdamW has no temporaries
        return found

    def loading(self) -> dict[str, int]:
        """Linear layers are quantised one by one, the head tile by tile in float32, from the computer's memory to a GPU.

        A head that is the table comes from there only if the table stays there.
        """
        s, quantising = self.shape, 0
        if self.packed4:
            quantising = max((linear.weight for linear in self.linears.values()), default=0) * (self.e + FLOAT32)
        if self.config.head_bits:
            tile = min(s.vocabulary, HEAD_TILE) * s.hidden
            table = 0 if s.tied else s.table * self.e
            if self.cuda and (not s.tied or self.config.offload_embeddings):
                table = tile * self.e
            quantising = max(quantising, table + tile * FLOAT32)
        return {"adapter": 0, "reference": 0, "rewards": 0, "optimizer": 0, "temporaries": quantising + self.tower()}

    def beforehand(self) -> dict[str, int]:
        """Return what a pass of --precompute-reference holds."""
        return {"optimizer": 0, "temporaries": self.without_gradients(PRECOMPUTE_ROWS * row_tokens(self.config))}

    def without_gradients(self, tokens: int) -> int:
        """Without gradients a pass holds one layer's MLP: its input, the residual, and a piece of gate, up and product."""
        s = self.shape
        tile = min(tokens, self.mlp_tile) if self.fused_mlp else tokens
        inside = (tokens * 3 * s.hidden + tile * 3 * s.intermediate) * self.e
        return inside + self.unpacked([name for name in self.linears if "mlp" in name])

    def drawn(self) -> dict[str, dict[str, int]]:
        """Return what reading prompts, drawing answers and scoring them hold; a scoring pass may have all of a step's."""
        drawing, s = Drawing.of(self.config), self.shape
        read = drawing.prompts * drawing.prompt  # at once, keys and values of a layer repeated for every query head
        reading = {
            "cache": 2 * read * s.keys * s.layers * self.e,
            "temporaries": self.without_gradients(read) + 2 * read * s.queries * self.e,
        }
        step = examples_per_step(self.config) * (drawing.prompt + (self.config.samples or 1) * drawing.tokens)
        scoring = self.without_gradients(min(step, row_tokens(self.config)))
        return {
            "reading prompts": reading,
            "drawing answers": drawing.on_torch(s, self.e),
            "scoring answers": {"temporaries": scoring},
            "rewarding answers": {"temporaries": rewarding_bytes(self.config, self.e)},
        }

    def backward(self, several: bool) -> dict[str, dict[str, int]]:
        """Return the head's phase, when everything is kept, and the backward passes of the layers that may be the peak."""
        s, full = self.shape, self.mode == "full"
        read = None
        if self.layout == "packed":
            read = self.load.answers if self.head else self.load.read_positions
        layer, last = Layer(self, self.tokens), Layer(self, self.tokens, read)
        # A recomputed layer keeps only its input, on the device or in the computer's memory.
        away = full and self.config.offload_activations
        each, top = (layer.keeps, last.keeps) if not full else (0, 0) if away else (layer.stream, layer.stream)
        tables = 2 * self.tokens * s.head_width * self.e  # cos and sin
        if self.layout == "plain" and s.attention_cap:  # a mask for layers with a window, and one for those without
            tables += 2 * self.tokens * self.load.longest * self.e
        # The embeddings have no gradient, so the first norm keeps nothing.
        frozen = 0 if full or layer.input_kept_by_linears else layer.ops()[0].keeps
        kept = each * (s.layers - 1) + top + tables - frozen
        found = {"head": self.scoring(kept) if self.head else self.head_phase(kept)}
        found["head"]["gradients"] = self.adapter if several else 0
        again = 0
        if full:  # its result, its input if nothing in it keeps that, and the next layer's input, already fetched
            again = layer.stream * (1 + (not layer.input_kept) + away)
        for name, number in (("last layer", s.layers - 1), ("last layer but one", s.layers - 2), ("first layer", 0)):
            kept, backward = peak((last if number == s.layers - 1 else layer).ops())
            found[f"backward, {name}"] = {
                "activations": max(number, 0) * each + kept + tables - frozen,
                "temporaries": backward + again,
                "gradients": self.adapter if several else (s.layers - 1 - number) * self.adapter // s.layers,
            }
        return found

    def scoring(self, kept: int) -> dict[str, int]:
        """Return what a reward model's head holds on top of `kept`: the state that ends each response, in float32 too."""
        stream, final = (n * self.shape.hidden * self.e for n in (self.tokens, self.load.answers))
        if self.layout == "packed":
            return {"activations": kept + 2 * final, "temporaries": self.scored()}
        # All states pass the last norm; the gradient of those that are read is written into zeros of full size.
        return {"activations": kept + stream + final, "temporaries": 2 * stream + self.scored()}

    def scored(self) -> int:
        """Return what a reward model's head makes of the states that it reads: a copy in float32 and its gradient."""
        return 2 * self.load.answers * self.shape.hidden * FLOAT32

    def head_phase(self, kept: int) -> dict[str, int]:
        """Return the worst moment of _TokenLogps on top of `kept`: a chunk of logits, arrays made from it, and the sums."""
        s, e, n = self.shape, self.e, self.load.answer_tokens
        final = n * s.hidden * e
        # Gathered before or after the last norm; the norm's result, and d logp / d hidden.
        kept += 3 * final if self.layout == "packed" else 2 * self.tokens * s.hidden * e + 2 * final
        cast = e if e != FLOAT32 else 0
        tile, weight, unpacking = s.vocabulary, 0, 0
        if self.config.head_bits:
            tile = min(tile, HEAD_TILE)
            # bitsandbytes unpacks to float32.
            weight, unpacking = tile * s.hidden * e, tile * s.hidden * (FLOAT32 + cast)
        c = chunk_tokens(tile, TORCH_CHUNK["cuda" if self.cuda else "cpu"])
        together = min(n, max(c, HEAD_SUMS // s.hidden) if self.config.head_bits else c)
        c = min(n, c)
        logits = c * tile * FLOAT32
        # Logits are cast to float32, their exponentials back, and the product is added to the sums.
        forward, back = c * tile * cast, c * tile * cast + c * s.hidden * e
        if s.transform.cap:  # its derivative, one number per logit
            forward, back = max(forward, 2 * logits), back + logits
        # The previous piece's logits are freed when the weight is unpacked.
        temporaries = max(unpacking - logits, weight + forward, weight + back) + together * s.hidden * FLOAT32
        return {"activations": kept, "logits": logits, "temporaries": temporaries}
