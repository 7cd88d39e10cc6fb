"""A dense decoder layer on torch: what each operation keeps and needs, with the code that it describes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lite_dil.backends.limits import NORM_TILE, TORCH_QUERIES
from lite_dil.planning.estimate import FLOAT32


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
        step: the step that it is part of.
        tokens: the number of tokens computed.
        read: the tokens that the last layer's MLP computes in a packed row; None for all.
    """

    def __init__(self, step: Any, tokens: int, read: int | None = None) -> None:
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
