"""The memory of a step on MLX: the step's operations on arrays without numbers, evaluated as MLX does.

MLX is lazy: which arrays are live together depends on the order of evaluation and on how far its queue is ahead of it, which
for short rows is a whole layer. So `_Pass` writes the model's forward pass down once more, as mlx-lm, mlx_prefix, mlx_lora and
mlx_head compute it, and `lite_dil.planning.estimate_tape` differentiates and evaluates that.

Measured against `mx.get_peak_memory` on MLX 0.32.4 for Linux, without a GPU, over random Llamas of 2 to 8 layers, width 256
and 512, rows of 190 to 1000 tokens, compiled or not: the estimate is 0.96 to 1.04 of the peak with --gradient-checkpointing
off and selective, 1.00 to 1.02 where the head's chunks decide, and 0.92 to 1.15 with full, where MLX mixes what is computed
again with other work in an order that follows details of its graph.

On Metal nothing was measured. There norms and rope are taken as one operation each, attention as its scores written out
(which MLX does wherever a gradient is wanted), the queue as ten command buffers, all by MLX's source. The estimate is of live
arrays: the cache of freed ones (see mlx_load.memory_limits) comes on top of it. Where they reach MLX's memory limit it stops
to queue ahead, so that somewhat less may do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from lite_dil.backends.limits import checkpointing, chunk_tokens
from lite_dil.base.errors import UserError
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.models.shape import Linear, ModelShape
from lite_dil.planning.estimate import BYTES, Estimate, Load, adapter_tensors, layout_for
from lite_dil.planning.estimate_tape import FLOAT32, Array, Gradients, Tape

GROUP, BITS = 64, 4  # mlx_load.GROUP_SIZE, mlx_load.BITS
QUERIES = 256  # mlx_prefix.QUERIES
CHUNK_ELEMENTS = 2**22  # mlx_head.CHUNK_ELEMENTS
CRITERION = 120  # dispatches of the small operations between log-probs and their gradient
MULTIPLE = 64  # mlx.COMPILED_MULTIPLE


Keys = tuple[Array, Array]  # keys and values


class MLXStep:
    """A training step of the MLX backend; see `lite_dil.planning.peak.estimate` for the arguments.

    Args:
        metal: on Apple silicon, and not on a CPU, where attention sees no padding and norms and rope are made of many
            operations.
    """

    def __init__(self, config: ResolvedConfig, shape: ModelShape, dtype: str, load: Load, metal: bool = True) -> None:
        self.config, self.shape, self.load, self.metal = config, shape, load, metal
        self.e, self.pads_attention = BYTES[dtype], metal  # as MLXBackend.pads_attention
        self.layout = layout_for(config, shape, "mlx")
        self.linears = shape.linears()
        self.mode = checkpointing(config, shape.parameters)
        compiled = metal if config.compile is None else config.compile
        if (own := shape.quantization) and own.library != "mlx":
            raise UserError(f"weights packed by {own.library} are for CUDA; give the 16-bit model, with --4bit")
        self.bits, self.group = (own.bits, own.group) if own else (BITS if config.load_in_4bit else 0, GROUP)
        self.multiple = MULTIPLE if compiled else 1
        tensors = adapter_tensors(config, shape)
        self.rank = next(iter(tensors.values()))[0][0]
        names = {".".join(name.split(".")[-2:]) for name in tensors}
        self.targets = {name: (linear.outputs, linear.inputs) for name, linear in self.linears.items() if name in names}
        self.adapter = sum(rows * columns for pair in tensors.values() for rows, columns in pair) * FLOAT32

    def frozen(self, linear: Linear, bits: int | None = None) -> int:
        """Return the bytes of a linear layer of the base: whole, or in groups with a scale and a bias each."""
        bits = self.bits if bits is None else bits
        if not bits or linear.inputs % self.group:  # mlx-lm leaves what it cannot group
            return linear.parameters * self.e
        groups = linear.weight // self.group
        return linear.weight * bits // 8 + 2 * groups * self.e + (linear.parameters - linear.weight) * self.e

    def weights(self) -> dict[str, int]:
        """Return the frozen model's bytes by component."""
        s, e = self.shape, self.e
        table = Linear(s.vocabulary, s.hidden)
        head_bits = self.bits if s.quantization else self.config.head_bits or self.bits
        linears = s.layers * sum(map(self.frozen, self.linears.values()))
        head = 0 if s.tied else self.frozen(table, head_bits)
        embeddings = self.frozen(table, head_bits if s.tied else None)
        return {"linears": linears, "embeddings": embeddings, "head": head, "norms": s.norm_parameters * e}

    def estimate(self) -> Estimate:
        """Return the peak."""
        tape = self.record()
        peak = tape.peak(self.metal)
        several = self.adapter if self.config.gradient_accumulation_steps > 1 else 0
        fixed = {**self.weights(), "adapter": self.adapter, "optimizer": 2 * self.adapter}
        if self.config.reference == "initial-adapter":
            fixed["reference"] = self.adapter
        found = dict(peak.kinds)
        found["gradients"] = found.get("gradients", 0) + several
        known = sum(fixed.values()) + several
        phases = tuple((phase, known + size) for phase, size in peak.phases.items())
        return Estimate(peak.phase, **fixed, **found, phases=phases)

    def record(self) -> Tape:
        """Return the operations of a pass, forward and backward."""
        return _Pass(self).tape


class _Pass:
    """The forward and the backward pass of one batch."""

    def __init__(self, step: MLXStep) -> None:
        self.step, self.s, self.e, self.tape = step, step.shape, step.e, Tape()
        self.metal = step.metal
        load, tape, up = step.load, self.tape, partial(_rounded, multiple=step.multiple)
        self.per_prompt = [len(answers) for answers in load.responses]
        self.rows = sum(self.per_prompt)
        if step.layout == "plain":
            self.prompts, self.responses = 0, self.rows * up(load.longest)
        else:
            self.prompts = up(max(1, sum(load.prompts) - len(load.prompts)))
            self.responses = up(load.answer_tokens)
        tokens = self.prompts + self.responses
        self.columns, self.width = up(max(load.prompts)) - 1, up(max(max(a) for a in load.responses))
        self._masks: dict[tuple[int, int], Array] = {}

        x = tape.make([], tokens * self.s.hidden, self.e)
        for layer in range(self.s.layers):
            x = self.layer(x, last=layer == self.s.layers - 1)
        hidden = self.norm(x)
        if step.layout == "plain":
            hidden = tape.gather(hidden, up(load.answer_tokens) * self.s.hidden)
        loss = self.head(hidden)
        tape.kind, tape.phase = "temporaries", "backward"
        tape.backward(loss, tape.make([loss], loss.numbers, FLOAT32, dispatches=CRITERION))

    def layer(self, x: Array, last: bool) -> Array:
        """Run a decoder layer over all tokens; the last one returns those of the responses."""
        self.adapters = {
            name: (self.tape.weight(self.step.rank * into, wanted=True), self.tape.weight(self.step.rank * out, wanted=True))
            for name, (out, into) in self.step.targets.items()
        }
        run = partial(self._layer, adapters=self.adapters, last=last)
        return self.tape.checkpoint(run, x) if self.step.mode == "full" else run(x)

    def _layer(self, x: Array, adapters: dict[str, tuple[Array, Array]], last: bool) -> Array:
        self.adapters = adapters
        if self.step.layout == "plain":
            return self.block(x, self.plain_attention)
        parts: list[Array] = []
        self.kept: list[Keys | None] = []
        for tokens, attention in ((self.prompts, self.prompt_attention), (self.responses, self.response_attention)):
            parts.append(self.block(self.tape.slice(x, tokens * self.s.hidden), attention))
        return parts[1] if last else self.tape.concatenate(parts)

    def block(self, x: Array, attention: Callable[[Array], Array]) -> Array:
        """Run norms, attention and MLP over some tokens."""
        s, tape = self.s, self.tape
        pre, post = not s.post_norms or s.norms == 4, s.post_norms
        normed = self.norm(x) if pre else x
        r = attention(normed)
        if s.parallel:
            return tape.add(tape.add(x, r), self.mlp(normed))
        h = tape.add(x, self.norm(r) if post else r)
        r = self.mlp(self.norm(h) if pre else h)
        return tape.add(h, self.norm(r) if post else r)

    def norm(self, x: Array) -> Array:
        """Norm over the width: one operation on Metal; on a CPU its parts, in float32."""
        tape = self.tape
        if self.metal:

            def pull(g: Array) -> Gradients:
                tape.make([x, g], x.numbers, x.each)  # of the weight, which is frozen
                yield x, tape.make([x, g], x.numbers, x.each, inplace=True)

            return tape.make([x], x.numbers, x.each, pull)
        wide = tape.cast(x, FLOAT32)
        square = tape.make([wide], x.numbers, FLOAT32)
        root = tape.make([square], 1, FLOAT32, dispatches=10)

        def pull_cpu(g: Array) -> Gradients:
            by_x = tape.make([wide, g], x.numbers, FLOAT32)
            mean = tape.make([by_x, root], 1, FLOAT32, dispatches=12)
            scaled = tape.make([g, root], x.numbers, FLOAT32, inplace=True)
            yield wide, tape.make([tape.make([wide, mean], x.numbers, FLOAT32), scaled], x.numbers, FLOAT32, inplace=True)

        normed = tape.make([wide, root], x.numbers, FLOAT32, pull_cpu)
        return tape.elementwise(tape.cast(normed, x.each))

    def linear(self, x: Array, name: str) -> Array:
        """W x + scale x A B."""
        tape, linear = self.tape, self.step.linears[name]
        tokens = x.numbers // linear.inputs
        y = tape.matmul(x, tape.weight(self.step.frozen(linear), 1), tokens * linear.outputs)
        if linear.bias:
            y = tape.elementwise(y)
        if name not in self.adapters:
            return y
        a, b = self.adapters[name]
        low = self.product(self.dropped(x), a, tokens * self.step.rank)
        z = tape.elementwise(tape.matmul(low, b, y.numbers))
        return tape.add(y, tape.cast(z, self.e))

    def product(self, x: Array, a: Array, numbers: int) -> Array:
        """Multiply with A, which is float32; the copy of x that this takes is made again for the backward pass, not kept."""
        tape = self.tape
        if x.each == FLOAT32:
            return tape.matmul(x, a, numbers)

        def pull(g: Array) -> Gradients:
            late = tape.make([x, g], x.numbers, FLOAT32)
            if x.wanted:
                yield x, tape.cast(tape.make([g, a], x.numbers, FLOAT32, dispatches=5), x.each)
            yield a, tape.make([late, g], a.numbers, FLOAT32, dispatches=5)

        wide = tape.make([x], x.numbers, FLOAT32)
        return tape.make([wide, a], numbers, FLOAT32, pull, dispatches=5)

    def dropped(self, x: Array) -> Array:
        """Dropout keeps its mask, in the type of what it drops."""
        if not self.step.config.lora_dropout:
            return x
        tape = self.tape
        drawn = tape.elementwise(tape.make([], x.numbers, FLOAT32, dispatches=10))
        mask = tape.make([tape.make([drawn], x.numbers, 1)], x.numbers, x.each)

        def pull(g: Array) -> Gradients:
            yield x, tape.make([g, mask], x.numbers, x.each, inplace=True)

        return tape.elementwise(tape.make([x, mask], x.numbers, x.each, pull))

    def rope(self, x: Array) -> Array:
        """Rotate: one operation on Metal; on a CPU the products of halves with tables."""
        tape = self.tape
        if self.metal:
            return tape.elementwise(x)
        half = x.numbers // 2

        def pull(g: Array) -> Gradients:
            parts = [tape.make([g], half, x.each) for _ in range(4)]
            sums = [tape.make(parts[i : i + 2], half, x.each, inplace=True) for i in (0, 2)]
            wholes = [tape.make([part], x.numbers, x.each, dispatches=5) for part in sums]
            yield x, tape.make(wholes, x.numbers, x.each, inplace=True)

        products = [tape.make([x], half, x.each) for _ in range(4)]
        sums = [tape.make(products[i : i + 2], half, x.each, inplace=True) for i in (0, 2)]
        return tape.make([*sums, x], x.numbers, x.each, pull)

    def qkv(self, x: Array) -> list[Array]:
        """Return queries, keys and values, rotated."""
        s, tape = self.s, self.tape
        tokens = x.numbers // s.hidden
        if s.joined:
            whole = self.linear(x, "self_attn.qkv_proj")
            three = [tape.slice(whole, tokens * width) for width in (s.queries, s.keys, s.keys)]
        else:
            three = [self.linear(x, f"self_attn.{name}_proj") for name in "qkv"]
        if s.qk_norm:
            three[:2] = [self.norm(part) for part in three[:2]]
        return [self.rope(three[0]), self.rope(three[1]), three[2]]

    def attend(self, q: Array, k: Array, v: Array, scores: int, mask: Array) -> Array:
        """Attend with all scores written out, as MLX does wherever a gradient is wanted."""
        s, tape = self.s, self.tape
        repeats = s.heads // s.kv_heads
        q = tape.elementwise(q)

        def product(a: Array, b: Array, numbers: int) -> Array:
            """Multiply; the gradient of keys or values comes for every query's head, and is summed."""

            def pull(g: Array) -> Gradients:
                yield a, tape.make([g, b], a.numbers, a.each, dispatches=4)
                every = tape.make([g, a], b.numbers * repeats, b.each, dispatches=4)
                yield b, tape.make([every], b.numbers, b.each) if repeats > 1 else every

            return tape.make([a, b], numbers, a.each, pull, dispatches=5)

        raw = product(q, k, scores)
        if s.attention_cap:
            raw = self.saved(tape.elementwise(raw), 2)

        def masked(g: Array) -> Gradients:
            if mask.each != 1:
                yield raw, g
                return
            kept = tape.make([mask], scores, self.e)
            yield raw, tape.make([kept, g], scores, self.e, inplace=True)

        raw_masked = tape.make([raw, mask], scores, self.e, masked, inplace=True, dispatches=3)

        def softmax(g: Array) -> Gradients:
            by_p = tape.make([g, probs], scores, self.e, inplace=True)
            total = tape.make([by_p], 1, self.e, dispatches=3)
            other = tape.make([probs, total], scores, self.e)
            yield raw_masked, tape.make([by_p, other], scores, self.e, inplace=True)

        probs = tape.make([raw_masked], scores, self.e, softmax, inplace=True)
        return product(probs, v, q.numbers)

    def saved(self, x: Array, steps: int) -> Array:
        """Apply a function whose slope is computed from its result in some steps."""
        tape = self.tape

        def pull(g: Array) -> Gradients:
            slope = tape.make([out], out.numbers, out.each)
            for _ in range(steps - 1):
                slope = tape.make([slope, out], out.numbers, out.each, inplace=True)
            yield x, tape.make([slope, g], out.numbers, out.each, inplace=True)

        out = tape.make([x], x.numbers, x.each, pull)
        return out

    def plain_attention(self, x: Array) -> Array:
        """Attend within rows of one length."""
        tokens, s = x.numbers // self.s.hidden, self.s
        length = tokens // self.rows
        q, k, v = self.qkv(x)
        mask = self.tape.make([], length * length, 1, dispatches=8)
        return self.linear(self.attend(q, k, v, s.heads * tokens * length, mask), "self_attn.o_proj")

    def prompt_attention(self, x: Array) -> Array:
        """Attend within prompts, and keep their keys and values."""
        if not self.step.pads_attention:
            lengths = [length - 1 for length in self.step.load.prompts]
            return self.unpadded(x, lengths, [None] * len(lengths))
        s, count = self.s, len(self.step.load.prompts)
        columns = max(1, self.columns)
        q, k, v = self.qkv(self.tape.gather(x, count * columns * s.hidden))
        self.kept = [(k, v)]
        mask = self.mask(count * columns, columns)
        out = self.attend(q, k, v, s.heads * count * columns * columns, mask)
        return self.tape.gather(self.linear(out, "self_attn.o_proj"), x.numbers)

    def response_attention(self, x: Array) -> Array:
        """Attend within responses and to their prompts."""
        s, tape = self.s, self.tape
        if not self.step.pads_attention:
            before = [self.kept[i] for i, count in enumerate(self.per_prompt) for _ in range(count)]
            return self.unpadded(x, [n for answers in self.step.load.responses for n in answers], before)
        q, k, v = self.qkv(tape.gather(x, self.rows * self.width * s.hidden))
        past = self.rows * max(1, self.columns) * s.keys
        assert self.kept[0] is not None
        both = [tape.concatenate([tape.gather(of, past), own]) for of, own in zip(self.kept[0], (k, v), strict=True)]
        seen = max(1, self.columns) + self.width
        mask = self.mask(self.rows * self.width, seen)
        out = self.attend(q, both[0], both[1], s.heads * self.rows * self.width * seen, mask)
        return tape.gather(self.linear(out, "self_attn.o_proj"), x.numbers)

    def unpadded(self, x: Array, lengths: Sequence[int], before: Sequence[Keys | None]) -> Array:
        """Attend to each sequence by itself, some queries at a time."""
        s, tape = self.s, self.tape
        parts: list[Array] = []
        for length, past in zip(lengths, before, strict=True):
            seen = past
            for start in range(0, length, QUERIES):
                n = min(QUERIES, length - start)
                q, k, v = self.qkv(tape.slice(x, n * s.hidden))
                k, v = seen = (k, v) if seen is None else (tape.concatenate([seen[0], k]), tape.concatenate([seen[1], v]))
                keys = k.numbers // s.keys
                out = self.attend(q, k, v, s.heads * n * keys, self.mask(n, keys))
                parts.append(self.linear(out, "self_attn.o_proj"))
            self.kept.append(seen)
        return tape.concatenate(parts) if parts else x

    def mask(self, queries: int, keys: int) -> Array:
        """Return what is added to scores, which all layers share."""
        if (queries, keys) not in self._masks:
            made = self._masks[queries, keys] = self.tape.make([], queries * keys, self.e, dispatches=10)
            assert made.buffer is not None
            self.tape.held.add(made.buffer)
        return self._masks[queries, keys]

    def mlp(self, x: Array) -> Array:
        """Run the gated MLP."""
        run = partial(self._mlp, adapters=self.adapters)
        return self.tape.checkpoint(run, x) if self.step.mode == "selective" else run(x)

    def _mlp(self, x: Array, adapters: dict[str, tuple[Array, Array]]) -> Array:
        self.adapters, tape = adapters, self.tape
        if self.s.joined:
            both = self.linear(x, "mlp.gate_up_proj")
            gate, up = (tape.slice(both, both.numbers // 2) for _ in range(2))
        else:
            gate, up = self.linear(x, "mlp.gate_proj"), self.linear(x, "mlp.up_proj")
        active = tape.multiply(gate, self.saved(gate, 2))  # silu; the slope of gelu takes as many
        return self.linear(tape.multiply(active, up), "mlp.down_proj")

    def head(self, hidden: Array) -> Array:
        """Return the log-probs of the response tokens, a chunk of tokens at a time, with their slopes."""
        s, tape = self.s, self.tape
        tape.kind, tape.phase = "logits", "head"
        tokens, size = hidden.numbers // s.hidden, chunk_tokens(s.vocabulary, CHUNK_ELEMENTS)
        parts: list[Array] = []
        for start in range(0, tokens, size):
            n = min(size, tokens - start)
            parts.append(self._chunk(tape.slice(hidden, n * s.hidden), n, parts[-1:]))
        tape.kind = "activations"
        return tape.concatenate(parts)

    def _chunk(self, hidden: Array, n: int, before: list[Array]) -> Array:
        s, tape, e = self.s, self.tape, self.e
        numbers = n * s.vocabulary
        logits = tape.cast(tape.make([hidden, *before], numbers, e, dispatches=4), FLOAT32)
        for _ in range((s.transform.scale != 1) + 3 * bool(s.transform.cap)):
            logits = tape.elementwise(logits)
        top = tape.make([logits], n, FLOAT32)
        shifted = tape.make([logits, top], numbers, FLOAT32, inplace=True, dispatches=3)
        powers = tape.make([shifted], numbers, FLOAT32)
        total = tape.make([powers], n, FLOAT32)
        values = tape.make([shifted, total], n, FLOAT32, dispatches=8)
        slope = tape.make([powers, total], numbers, FLOAT32, inplace=True, dispatches=5)
        slope = tape.make([slope, values], numbers, FLOAT32, inplace=True, dispatches=6)
        slope = tape.make([tape.cast(slope, e)], n * s.hidden, e, dispatches=4)

        def pull(g: Array) -> Gradients:
            yield hidden, tape.cast(tape.make([g, slope], n * s.hidden, FLOAT32), e)

        return tape.make([values, slope, hidden], n, FLOAT32, pull, dispatches=1)


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
