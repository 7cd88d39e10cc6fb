"""Estimate the memory of a step on torch: what each operation keeps and needs, with the code that it describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lite_dil.backends.limits import (
    FLEX_BLOCK,
    HEAD_SUMS,
    HEAD_TILE,
    MLP_TILE,
    NORM_TILE,
    OFFLOAD_CHUNK,
    TORCH_CHUNK,
    TORCH_QUERIES,
    checkpointing,
    chunk_tokens,
)
from lite_dil.base.errors import UserError
from lite_dil.base.memory import GIB, expandable_segments, on_wsl
from lite_dil.batching.schedule import PRECOMPUTE_ROWS, row_tokens
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.models.shape import Linear, ModelShape
from lite_dil.planning.estimate import BYTES, FLOAT32, Estimate, Load, adapter_tensors, layout_for

# Share of reserved GPU memory lost to fragmentation, with expandable segments and without, by the allocator's statistics in
# steps of an 8B Llama (docs/LOG.md).
RESERVE, FIXED_RESERVE = 0.0625, 0.13
WORKSPACE = 2**24  # cuBLAS, 8 MiB, and small things
PROCESS = 2 * GIB  # of the computer's memory: Python, torch and transformers 1.2 GiB, the rest a guess for CUDA
NF4_BLOCK, NF4_GROUP, NF4_TABLES = 64, 256, 16 * 4 + 256 * 4 + 4  # weights per scale, scales per second scale, bytes per layer


class Op(NamedTuple):
    """An operation of a layer: bytes kept for its backward pass, and further bytes live while that runs."""

    keeps: int
    backward: int


def peak(ops: Sequence[Op]) -> Op:
    """Return the kept and the further live bytes at the worst moment of the backward pass, which frees from the end."""
    moments, kept = [], 0
    for op in ops:
        kept += op.keeps
        moments.append(Op(kept, op.backward))
    return max(moments, key=sum)


class Layer:
    """One decoder layer over some tokens.

    Args:
        tokens: the number of tokens computed.
        read: the tokens that the last layer's MLP computes in a packed row; None for all.
    """

    def __init__(self, step: TorchStep, tokens: int, read: int | None = None) -> None:
        self.step, self.shape, self.e = step, step.shape, step.e
        self.some_read = read is not None
        self.tokens, self.mlp_tokens = tokens, tokens if read is None else read
        self.stream = tokens * self.shape.hidden * self.e  # bytes of one array of the model's width

    def ops(self) -> list[Op]:
        """Return the layer's operations in order."""
        s = self.shape
        pre = [self._norm()] if not s.post_norms or s.norms == 4 else []
        post = [self._norm()] if s.post_norms else []
        ops = [*pre, self._qkv(), self._rope(), self._attention(), self._output(), *post]
        return [*ops, *self._mlp()] if s.parallel else [*ops, *pre, *self._mlp(), *post]

    @property
    def keeps(self) -> int:
        """Bytes that the whole layer keeps."""
        return sum(op.keeps for op in self.ops())

    @property
    def input_kept_by_linears(self) -> bool:
        """Whether there is no norm before attention, so that q, k and v keep the layer's input itself."""
        return self.shape.post_norms and self.shape.norms == 2

    @property
    def input_kept(self) -> bool:
        """Whether some operation keeps the layer's input itself."""
        fused = self.step.fused_linears if self.input_kept_by_linears else self.step.config.fused_layers
        return self.shape.rms and (fused or self.e == FLOAT32)

    def _norm(self) -> Op:
        """_RMSNorm keeps its input and a float32 per row; its backward has two gradients, the residual's, and float32 pieces.

        The stock module keeps a float32 copy of its input instead, and a layer norm two.
        """
        wide, row = self.tokens * self.shape.hidden * FLOAT32, self.tokens * FLOAT32
        if not self.shape.rms:
            return Op(2 * wide + row, 2 * self.stream + 3 * wide)
        if not self.step.config.fused_layers:
            return Op(wide + row, 2 * self.stream + 2 * wide)
        piece = min(wide, NORM_TILE["cuda"] * FLOAT32) if self.step.cuda else 0  # negligible on a CPU
        return Op(self.stream + row, 3 * self.stream + 3 * piece)

    def _linears(self, names: Sequence[str], tokens: int, shared: bool = True) -> int:
        """Return what linear layers with the same input keep; `shared` says that nothing else keeps that input.

        _LoRA keeps x and A x. PEFT's own layer keeps a float32 copy of x for each adapter, and with dropout also its mask.
        """
        step = self.step
        adapted = [step.linears[name] for name in names if name in step.targets]
        if not adapted:
            return 0
        inputs = tokens * adapted[0].inputs
        if step.fused_linears:
            return (inputs * self.e if shared else 0) + len(adapted) * tokens * step.rank * self.e
        lows = len(adapted) * tokens * step.rank * FLOAT32
        if step.config.lora_dropout:
            return lows + len(adapted) * inputs * (FLOAT32 + (1 if step.cuda else FLOAT32))
        return lows + inputs * FLOAT32 * (len(adapted) if self.e != FLOAT32 else int(shared))

    def _qkv(self) -> Op:
        names = [n for n in self.step.linears if n.endswith(("q_proj", "k_proj", "v_proj", "qkv_proj"))]
        gradients = self.tokens * (self.shape.queries + 2 * self.shape.keys) * self.e
        return Op(self._linears(names, self.tokens), 3 * self.stream + gradients + self.step.unpacked(names))

    def _rope(self) -> Op:
        """Rotation keeps only its tables; norms of queries and keys keep their inputs."""
        s = self.shape
        numbers = self.tokens * (s.queries + s.keys)
        keeps = 0
        if s.qk_norm:
            fused = s.rms and self.step.config.fused_layers
            keeps = numbers * (self.e if fused else FLOAT32 * (1 if s.rms else 2))
            keeps += self.tokens * (s.heads + s.kv_heads) * FLOAT32
        return Op(keeps, self.stream + 3 * numbers * self.e)

    def _attention(self) -> Op:
        """_Blocks, SDPA and FlexAttention keep queries, keys, values, the result and its log-sum-exp."""
        s, t, e = self.shape, self.tokens, self.e
        q, k, row = t * s.queries * e, t * s.keys * e, t * s.heads * FLOAT32
        keeps = 2 * q + 2 * k + row
        if self.step.layout == "plain" and s.qk_norm and s.norms == 4:
            # Gemma 3 norms queries after splitting heads: SDPA's result is then copied for o_proj.
            keeps += q
        if s.joined:  # the values are a view of the whole result of qkv_proj
            keeps += q + k
        if self.step.layout == "plain" and s.attention_cap:
            return self._eager()
        if self.step.layout == "plain" or self.step.cuda:
            return Op(keeps, self.stream + 2 * q + 2 * k + row)
        seen = self.step.load.longest
        wide = 2 * t * s.keys * FLOAT32  # gradients of all keys and values, float32 until the end
        unit = seen * s.keys * (2 * e + 3 * FLOAT32)
        scores = s.heads * TORCH_QUERIES * seen * (2 * FLOAT32 + (e if e != FLOAT32 else 0))
        cast = 2 * k if e != FLOAT32 else 0
        return Op(keeps, self.stream + 2 * q + wide + max(unit + scores, cast))

    def _eager(self) -> Op:
        """Stock attention has the whole score matrix: it keeps tanh's result, the float32 softmax, and its rounded copy."""
        s, e, length = self.shape, self.e, self.step.load.longest
        scores = self.tokens * s.heads * length
        q = self.tokens * s.queries * e
        kept = scores * (e + FLOAT32 + (e if e != FLOAT32 else 0))
        # Keys and values are repeated for each query head; o_proj keeps the result.
        return Op(4 * q + kept, self.stream + scores * (e + FLOAT32))

    def _output(self) -> Op:
        name = "self_attn.o_proj"
        result = self.tokens * self.shape.queries * self.e
        keeps = self._linears([name], self.tokens, shared=False)
        return Op(keeps, 2 * self.stream + result + self.step.unpacked([name]))

    def _mlp(self) -> list[Op]:
        """_GatedMLP keeps its input, gate, up and the low-rank products, or only its input; the rest exists in pieces."""
        s, t, step = self.shape, self.mlp_tokens, self.step
        names = [name for name in step.linears if name.startswith("mlp.")]
        unpacked = step.unpacked(names)
        stream, wide = t * s.hidden * self.e, t * s.intermediate * self.e
        # The norm's result; in a parallel layer q, k and v keep it already.
        x = 0 if s.parallel and step.fused_linears and self._qkv().keeps else stream
        # The residual's gradient is also this one's, unless a norm lies between.
        incoming = self.stream * (2 if s.post_norms else 1)
        incoming += stream if self.some_read else 0  # its rows for the positions that are read
        if not step.fused_mlp:
            ops = self._stock_mlp(names, incoming)
            # checkpoint() holds the recomputed result next to its gradient.
            return [Op(x, sum(peak(ops)) + stream)] if step.mode == "selective" else ops
        lows = self._linears(names, t, shared=False)
        tile = min(t, step.mlp_tile)
        # active, grad_product and grad_gate besides gate and up; the input's gradient, and gate's part of it.
        if step.mode == "selective":
            return [Op(x, incoming + stream + (5 * wide + stream + lows) * tile // t + unpacked)]
        return [Op(x + 2 * wide + lows, incoming + stream + (3 * wide + stream) * tile // t + unpacked)]

    def _stock_mlp(self, names: Sequence[str], incoming: int) -> list[Op]:
        """Stock modules keep the activation and, for down's adapter, the product with up."""
        s, t, step = self.shape, self.mlp_tokens, self.step
        numbers = t * s.intermediate
        wide, unpacked = numbers * self.e, step.unpacked(names)
        first = self._linears(names[:-1], t, shared=step.mode != "selective" and not s.parallel)
        # The product's gradient comes through the weight, and through PEFT's adapter in float32.
        product = wide if step.fused_linears else wide + numbers * FLOAT32
        return [
            Op(first + 3 * wide, incoming + 3 * wide),
            Op(self._linears(names[-1:], t), incoming + product + unpacked),
        ]


class TorchStep:
    """A training step of the torch backend; see `lite_dil.planning.peak.estimate` for the arguments."""

    def __init__(self, config: ResolvedConfig, shape: ModelShape, backend: str, dtype: str, load: Load) -> None:
        self.config, self.shape, self.load = config, shape, load
        self.cuda, self.e = backend == "cuda", BYTES[dtype]
        self.layout = layout_for(config, shape, backend)
        self.packed4 = config.load_in_4bit or shape.quantization is not None
        self._check()
        self.mode = checkpointing(config, shape.parameters)
        self.eight_bit = config.optim == "paged_adamw_8bit" or (config.optim == "auto" and self.packed4)
        self.tokens = load.tokens(self.layout, FLEX_BLOCK if self.cuda else 1)
        self.fused_linears = config.fused_layers and not config.lora_dropout
        self.fused_mlp = self.fused_linears and not shape.joined  # backends/torch/fused.py
        self.linears = shape.linears()
        self.tensors = adapter_tensors(config, shape)
        self.targets = {".".join(name.split(".")[-2:]) for name in self.tensors}
        self.mlp_tile = max(16, MLP_TILE // shape.intermediate)
        self.rank = next(iter(self.tensors.values()))[0][0]
        self.adapter = sum(rows * columns for pair in self.tensors.values() for rows, columns in pair) * FLOAT32

    def _check(self) -> None:
        config, shape = self.config, self.shape
        if shape.quantization is not None and shape.quantization.library != "bitsandbytes":
            raise UserError(f"--model {config.model} is quantised for MLX; --backend cuda and cpu cannot load it")
        if config.offload_embeddings and shape.tied and not config.head_bits:
            raise UserError("--offload-embeddings: the table is the output head too; add --head-bits 8 (or 4)")

    def frozen(self, linear: Linear) -> int:
        """Return the bytes of a linear layer of the base: NF4 with its scales, or unquantised."""
        if not self.packed4:
            return linear.parameters * self.e
        blocks = linear.weight // NF4_BLOCK
        scales = blocks * FLOAT32
        if self.config.load_in_4bit or (self.shape.quantization and self.shape.quantization.double):
            scales = blocks + blocks // NF4_GROUP * FLOAT32 + NF4_TABLES
        return linear.weight // 2 + scales + (linear.parameters - linear.weight) * self.e

    def unpacked(self, names: Sequence[str]) -> int:
        """Return the bytes of the largest of these weights while it is unpacked, scales included."""
        largest = max(self.linears[name].weight for name in names)
        return largest * self.e + largest // NF4_BLOCK * FLOAT32 if self.packed4 else 0

    def weights(self) -> dict[str, int]:
        """Return the frozen model's bytes by component."""
        s, table = self.shape, self.shape.table * self.e
        linears = s.layers * sum(map(self.frozen, self.linears.values()))
        side = sum(map(self.frozen, s.side)) + s.side_rest * self.e
        head = 0 if s.tied else table
        if bits := self.config.head_bits:
            head = s.table * bits // 8 + s.table // NF4_BLOCK * FLOAT32
        away = table if self.config.offload_embeddings else 0
        norms = s.norm_parameters * self.e + side
        return {"linears": linears, "embeddings": table - away, "head": head, "norms": norms}

    def optimizer(self) -> tuple[int, int]:
        """Return the bytes of AdamW's state, and how many of them are paged and may leave the GPU.

        The state is two float32 per parameter, or two bytes with a scale per 256. bitsandbytes keeps it in float32 for tensors
        of fewer than 4096 parameters, and pages it for those of 100000 or more.
        """
        here = paged = 0
        for size in (rows * columns for pair in self.tensors.values() for rows, columns in pair):
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
        largest = max([s.table, *(linear.weight for linear in self.linears.values())]) * self.e
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
        found = {"loading": self._loading()}
        if self.config.precompute_reference:
            found["reference beforehand"] = self._beforehand()
        several = self.config.gradient_accumulation_steps > 1  # the gradients of earlier passes exist
        found |= self._backward(several)
        found["optimiser"] = {"gradients": self.adapter}  # the fused AdamW has no temporaries
        return found

    def _loading(self) -> dict[str, int]:
        """Linear layers are quantised one by one, the head tile by tile in float32, from the computer's memory to a GPU.

        A head that is the table comes from there only if the table stays there.
        """
        s, quantising = self.shape, 0
        if self.packed4:
            quantising = max(linear.weight for linear in self.linears.values()) * (self.e + FLOAT32)
        if self.config.head_bits:
            tile = min(s.vocabulary, HEAD_TILE) * s.hidden
            table = 0 if s.tied else s.table * self.e
            if self.cuda and (not s.tied or self.config.offload_embeddings):
                table = tile * self.e
            quantising = max(quantising, table + tile * FLOAT32)
        return {"adapter": 0, "reference": 0, "optimizer": 0, "temporaries": quantising}

    def _beforehand(self) -> dict[str, int]:
        """Without gradients a pass holds one layer's MLP: its input, the residual, and a piece of gate, up and product."""
        s, tokens = self.shape, PRECOMPUTE_ROWS * row_tokens(self.config)
        tile = min(tokens, self.mlp_tile) if self.fused_mlp else tokens
        inside = (tokens * 3 * s.hidden + tile * 3 * s.intermediate) * self.e
        return {"optimizer": 0, "temporaries": inside + self.unpacked([name for name in self.linears if "mlp" in name])}

    def _backward(self, several: bool) -> dict[str, dict[str, int]]:
        """Return the head's phase, when everything is kept, and the backward passes of the layers that may be the peak."""
        s, full = self.shape, self.mode == "full"
        read = self.load.read_positions if self.layout == "packed" else None
        layer, last = Layer(self, self.tokens), Layer(self, self.tokens, read)
        # A recomputed layer keeps only its input, on the device or in the computer's memory.
        away = full and self.config.offload_activations
        each, top = (layer.keeps, last.keeps) if not full else (0, 0) if away else (layer.stream, layer.stream)
        tables = 2 * self.tokens * s.head_width * self.e  # cos and sin
        if self.layout == "plain" and s.attention_cap:  # a mask for layers with a window, and one for those without
            tables += 2 * self.tokens * self.load.longest * self.e
        # The embeddings have no gradient, so the first norm keeps nothing.
        frozen = 0 if full or layer.input_kept_by_linears else layer.ops()[0].keeps
        found = {"head": self._head(each * (s.layers - 1) + top + tables - frozen)}
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

    def _head(self, kept: int) -> dict[str, int]:
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
