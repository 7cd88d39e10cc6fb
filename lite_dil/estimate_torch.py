"""The memory of a step on torch, in formulas that name the code they are of: what each operation keeps and needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from lite_dil.adapters import select_targets
from lite_dil.backends import checkpointing
from lite_dil.backends.head import chunk_tokens
from lite_dil.config import TrainConfig
from lite_dil.errors import UserError
from lite_dil.estimate import Estimate, Load, layout_for
from lite_dil.shape import Linear, ModelShape

FLOAT32 = 4
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FLEX_BLOCK = 128  # torch_packed.BLOCK
QUERIES = 64  # torch_packed.QUERIES
MLP_TILE = 2**25  # torch_fused.TILE_ELEMENTS
HEAD_TILE = 2**14  # torch_head.TILE_ROWS
CHUNK = {"cpu": 2**22, "cuda": 2**24}  # torch_head.CHUNK_ELEMENTS
NF4_BLOCK, NF4_GROUP, NF4_TABLES = 64, 256, 16 * 4 + 256 * 4 + 4  # weights a scale, scales a second scale, bytes a layer


class Op(NamedTuple):
    """An operation of a layer: bytes it keeps for its backward pass, and bytes live beside all kept ones while that runs."""

    keeps: int
    backward: int


def peak(ops: Sequence[Op]) -> Op:
    """Return what is kept and what is live beside it at the worst moment of the backward pass, which frees from the end."""
    moments, kept = [], 0
    for op in ops:
        kept += op.keeps
        moments.append(Op(kept, op.backward))
    return max(moments, key=sum)


class Layer:
    """One decoder layer over some tokens.

    Args:
        tokens: that it computes.
        mlp_tokens: that its MLP computes: of the last layer in a packed row only those that are read.
    """

    def __init__(self, step: TorchStep, tokens: int, mlp_tokens: int) -> None:
        self.step, self.shape, self.e = step, step.shape, step.e
        self.tokens, self.mlp_tokens = tokens, mlp_tokens
        self.stream = tokens * self.shape.hidden * self.e  # one array of the model's width

    def ops(self) -> list[Op]:
        """Return the layer's operations in order."""
        s, x = self.shape, self.stream
        pre = [self._norm(x)] if not s.post_norms or s.norms == 4 else []
        post = [self._norm(x)] if s.post_norms else []
        ops = [*pre, self._qkv(), self._rope(), self._attention(), self._output(), *post]
        if s.parallel:
            return [*ops, self._mlp(0)]
        mlp_input = self.mlp_tokens * s.hidden * self.e
        return [*ops, *pre, self._mlp(mlp_input), *post]

    def _norm(self, x: int) -> Op:
        """_RMSNorm keeps its input and a float32 a row; its backward holds two gradients and the residual's."""
        wide = 3 * self.tokens * self.shape.hidden * FLOAT32 if self.step.cuda else 0
        return Op(x + self.tokens * FLOAT32, 3 * x + wide)

    def _low(self, name: str, tokens: int) -> int:
        """_LoRA keeps A x."""
        return tokens * self.step.rank * self.e if name in self.step.targets else 0

    def _qkv(self) -> Op:
        names = [n for n in self.step.linears if n.endswith(("q_proj", "k_proj", "v_proj", "qkv_proj"))]
        lows = sum(self._low(name, self.tokens) for name in names)
        unpacked = max(self.step.unpacked(self.step.linears[name]) for name in names)
        gradients = self.tokens * (self.shape.queries + 2 * self.shape.keys) * self.e
        return Op((self.stream if lows else 0) + lows, 3 * self.stream + gradients + unpacked)

    def _rope(self) -> Op:
        """Rotation keeps only its tables; norms of queries and keys keep their inputs."""
        s = self.shape
        both = self.tokens * (s.queries + s.keys) * self.e
        keeps = both + self.tokens * (s.heads + s.kv_heads) * FLOAT32 if s.qk_norm else 0
        return Op(keeps, self.stream + 3 * both)

    def _attention(self) -> Op:
        """_Blocks keeps queries, keys, values, the result and its log-sum-exp."""
        s, t, e = self.shape, self.tokens, self.e
        q, k = t * s.queries * e, t * s.keys * e
        keeps = 2 * q + 2 * k + t * s.heads * FLOAT32
        if self.step.cuda:
            return Op(keeps, self.stream + 2 * q + 2 * k + t * s.heads * FLOAT32)
        wide = 2 * t * s.keys * FLOAT32 + (2 * k if e != FLOAT32 else 0)  # gradients of keys and values are float32
        seen = self.step.load.longest
        unit = seen * s.keys * (2 * e + 3 * FLOAT32)
        scores = s.heads * QUERIES * seen * (2 * FLOAT32 + (e if e != FLOAT32 else 0))
        return Op(keeps, self.stream + 2 * q + wide + unit + scores)

    def _output(self) -> Op:
        name = "self_attn.o_proj"
        result = self.tokens * self.shape.queries * self.e
        return Op(self._low(name, self.tokens), 2 * self.stream + result + self.step.unpacked(self.step.linears[name]))

    def _mlp(self, x: int) -> Op:
        """_GatedMLP keeps its input (`x` bytes that nobody else keeps), gate, up and the low-rank products, or its input."""
        s, t = self.shape, self.mlp_tokens
        names = [name for name in self.step.linears if name.startswith("mlp.")]
        unpacked = max(self.step.unpacked(self.step.linears[name]) for name in names)
        lows = sum(self._low(name, t) for name in names)
        stream, wide = t * s.hidden * self.e, t * s.intermediate * self.e
        if self.step.mode == "selective":
            tile = min(t, max(16, MLP_TILE // s.intermediate))
            piece, narrow = tile * s.intermediate * self.e, tile * s.hidden * self.e
            return Op(x, self.stream + stream + 5 * piece + narrow + lows * tile // t + unpacked)
        # The residual's gradient, which is this one's too, the input's, active, grad_product and grad_gate, part_x.
        return Op(x + 2 * wide + lows, self.stream + 2 * stream + 3 * wide + unpacked)


class TorchStep:
    """A training step of the torch backend; see `lite_dil.estimate.estimate` for the arguments."""

    def __init__(self, config: TrainConfig, shape: ModelShape, backend: str, dtype: str, load: Load) -> None:
        if config.unsloth:
            raise UserError("plan does not know what the layers of --unsloth keep; leave it out")
        self.config, self.shape, self.load = config, shape, load
        self.cuda, self.e = backend == "cuda", BYTES[dtype]
        self.layout = layout_for(config, shape, backend)
        self.linears = shape.linears()
        self.packed4 = config.load_in_4bit or shape.quantization is not None
        self.mode = checkpointing(config, shape.parameters)
        assert config.lora_r and config.target_modules
        self.rank = config.lora_r
        shapes = {name: (linear.outputs, linear.inputs) for name, linear in self.linears.items()}
        self.targets = select_targets(shapes, config.target_modules)
        self.tokens = load.tokens(self.layout, FLEX_BLOCK if self.cuda else 1)
        self.adapter_layer = sum(self.rank * (out + into) for out, into in self.targets.values()) * FLOAT32
        self.adapter = self.adapter_layer * shape.layers

    def frozen(self, linear: Linear) -> int:
        """Return the bytes that a linear layer of the base takes: NF4 with its scales, or whole."""
        if not self.packed4:
            return linear.parameters * self.e
        blocks = linear.weight // NF4_BLOCK
        scales = blocks + blocks // NF4_GROUP * FLOAT32 + NF4_TABLES
        return linear.weight // 2 + scales + (linear.parameters - linear.weight) * self.e

    def unpacked(self, linear: Linear) -> int:
        """Return the bytes of a packed weight while it is used, its scales among them."""
        return linear.weight * self.e + linear.weight // NF4_BLOCK * FLOAT32 if self.packed4 else 0

    def weights(self) -> dict[str, int]:
        """Return the frozen model's bytes by component."""
        s, table = self.shape, self.shape.table * self.e
        linears = s.layers * sum(map(self.frozen, self.linears.values()))
        side = sum(map(self.frozen, s.side)) + s.side_rest * self.e
        head = 0 if s.tied else table
        if bits := self.config.head_bits:
            head = s.table * bits // 8 + s.table // NF4_BLOCK * FLOAT32
        return {"linears": linears, "embeddings": table, "head": head, "norms": s.norm_parameters * self.e + side}

    def optimizer(self) -> int:
        """Return the bytes of AdamW's state: two float32 a number, or two bytes and their scales."""
        name = self.config.optim
        if name == "adamw" or (name == "auto" and not self.packed4):
            return 2 * self.adapter
        total = 0
        for out, into in self.targets.values():
            for size in (self.rank * into, self.rank * out):
                total += 2 * (size + -(-size // 256) * FLOAT32) if size >= 4096 else 2 * size * FLOAT32
        return total * self.shape.layers

    def estimate(self) -> Estimate:
        """Return the peak over the phases."""
        fixed = {**self.weights(), "adapter": self.adapter, "optimizer": self.optimizer()}
        if self.config.reference == "initial-adapter":
            fixed["reference"] = self.adapter
        found = [replace(Estimate(phase), **fixed, **parts) for phase, parts in self.phases().items()]
        best = max(found, key=lambda e: e.total)
        return replace(best, phases=tuple((e.phase, e.total) for e in found))

    def phases(self) -> dict[str, dict[str, int]]:
        """Return for each phase what it holds beside the weights, the adapter and the optimiser's state."""
        s, e, load, n = self.shape, self.e, self.load, self.load.answer_tokens
        last_rows = load.read_positions if self.layout == "packed" else self.tokens
        layer, last = Layer(self, self.tokens, self.tokens), Layer(self, self.tokens, last_rows)
        tables = 2 * self.tokens * s.head_width * e
        several = self.config.gradient_accumulation_steps > 1
        full = self.mode == "full"
        each = layer.stream if full else sum(op.keeps for op in layer.ops())
        top = layer.stream if full else sum(op.keeps for op in last.ops())

        kept = (s.layers - 1) * each + top + tables
        final = n * s.hidden * e
        chunk = min(n, chunk_tokens(s.vocabulary, CHUNK["cuda" if self.cuda else "cpu"])) * s.vocabulary
        largest = 2 * FLOAT32 * max(self.rank * max(shape) for shape in self.targets.values())
        found = {
            "head": {
                "activations": kept + 3 * final,
                "logits": chunk * FLOAT32,
                "temporaries": chunk * e,
                "gradients": self.adapter if several else 0,
            },
            "optimiser": {
                "gradients": self.adapter,
                "temporaries": 2 * max(self.rank * max(x) for x in self.targets.values()),
            },
        }
        for name, number in (("last layer", s.layers - 1), ("last layer but one", s.layers - 2), ("first layer", 0)):
            here = last if number == s.layers - 1 else layer
            worst = peak(here.ops())
            below = number * each + tables + (layer.stream if full else 0)
            found[f"backward, {name}"] = {
                "activations": below + worst.keeps,
                "temporaries": worst.backward + (2 * layer.stream if full else 0),
                "gradients": self.adapter if several else (s.layers - 1 - number) * self.adapter_layer,
            }
        return found
