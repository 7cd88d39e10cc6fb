"""Estimate the memory of a step on MLX: what each stage of a layer keeps, what it makes, and how much of that is queued.

MLX is lazy. It walks the graph in its own order and queues work ahead of execution, and an array lives until the last
operation that reads it has run. So at any moment there are, besides the weights:

* arrays kept for the backward pass and not yet used: `Stage.keeps`;
* arrays made by the stages in the queue, needed or not: `Work.made`;
* arrays that the adapters' gradients wait for: `Stage.waits`.

The estimate is an upper bound: a stage partly in the queue counts fully. Compared with `mx.get_peak_memory` on MLX 0.32.4 for
Linux, without a GPU, over random models of 2 to 8 layers, width 256 and 512, rows of 190 to 2100 tokens, compiled or not, it
is 1.00 to 1.11 of the peak with --gradient-checkpointing off, 1.01 to 1.17 with selective, and 0.99 to 1.20 with full, except
for two cases with full and a vocabulary of 8192 over few layers, 1.23 and 1.32, where execution had caught up with the queue.

Nothing was measured on Metal. There, by MLX's source, norms and rope count as one operation each, attention with its whole
score matrix (as MLX computes it when it needs a gradient), and the queue as ten command buffers. The estimate is of live
arrays: the cache of freed arrays (see `lite_dil.backends.mlx.load.limit_memory`) comes on top. At its memory limit MLX stops
queueing ahead, so somewhat less memory may be enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

from lite_dil.backends.limits import BITS, COMPILED_MULTIPLE, GROUP_SIZE, MLX_CHUNK, MLX_QUERIES, checkpointing, chunk_tokens
from lite_dil.base.errors import UserError
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.models.shape import Linear, ModelShape
from lite_dil.planning.drawing import Drawing
from lite_dil.planning.estimate import BYTES, FLOAT32, Estimate, Load, adapter_tensors, head_tensors, layout_for
from lite_dil.planning.reward_models import reward_bytes

WIDTH = 20  # mlx/utils.h: MLX_BFS_MAX_WIDTH
TASKS = 10  # mlx/transforms.cpp: queued before the next one waits
CPU_DISPATCHES = 10  # mlx/backend/cpu/encoder.h: dispatches in a task: one per operation, one per array it holds, one per view
METAL_OPS, METAL_BYTES = 40, 40 * 2**20  # mlx/backend/metal/device.cpp: operations and bytes in a command buffer, the task
CRITERION = 120  # dispatches of the small operations between log-probs and their gradient


class Work(NamedTuple):
    """Operations: bytes of the arrays that they make without keeping, dispatches, and bytes of weights read."""

    made: int
    dispatches: int
    weights: int = 0


class Stage(NamedTuple):
    """A part of a layer.

    Attributes:
        keeps: bytes that the forward pass keeps for the backward pass.
        waits: bytes that the backward pass leaves behind. MLX works breadth first, so the gradients of A and B come late: each
            reads a float32 copy of its layer's input or of its output's gradient. mx.checkpoint recomputes a layer as soon as
            its result exists, and does not wait for the gradients of the next layer either.
        mlp: whether it is in the module that "selective" recomputes.
    """

    keeps: int
    forward: Work
    backward: Work
    waits: int = 0
    mlp: bool = False


def joined(*stages: Stage, calls: int = 1) -> Stage:
    """Return several stages as one, each operation split into `calls` smaller ones."""

    def work(parts: Sequence[Work]) -> Work:
        dispatches = sum(part.dispatches for part in parts) * calls
        return Work(sum(part.made for part in parts), dispatches, sum(part.weights for part in parts))

    keeps, waits = sum(stage.keeps for stage in stages), sum(stage.waits for stage in stages)
    return Stage(keeps, work([stage.forward for stage in stages]), work([stage.backward for stage in stages]), waits)


class Moment(NamedTuple):
    """A stage's turn: bytes that stay after it, bytes freed once it has run, and its work."""

    phase: str
    stays: int
    goes: int
    work: Work
    gradients: int = 0


class Block(NamedTuple):
    """Tokens that a layer processes at once: how many, and the queries and keys of each attention call."""

    tokens: int
    scores: list[tuple[int, int]]
    calls: int  # number of calls; those of a batch count once


NO_WORK = Work(0, 0)


class MLXStep:
    """A training step of the MLX backend; see `lite_dil.planning.peak.estimate` for the arguments.

    Args:
        metal: whether it runs on Apple silicon rather than a CPU, where attention skips padding, and norms and rope consist of
            many operations.
    """

    def __init__(self, config: ResolvedConfig, shape: ModelShape, dtype: str, load: Load, metal: bool = True) -> None:
        self.config, self.shape, self.load, self.metal = config, shape, load, metal
        self.e = BYTES[dtype]
        self.layout = layout_for(config, shape, "mlx")
        self.linears = shape.linears()
        self.mode = checkpointing(config, shape.parameters)
        compiled = metal if config.compile is None else config.compile
        self.pads_attention = metal or compiled  # as in MLXBackend._arrays
        if (own := shape.quantization) and own.library != "mlx":
            raise UserError(f"weights quantised by {own.library} are for CUDA; give the 16-bit model, with --4bit")
        self.bits, self.group = (own.bits, own.group) if own else (BITS if config.load_in_4bit else 0, GROUP_SIZE)
        self.multiple = COMPILED_MULTIPLE if compiled else 1
        tensors = adapter_tensors(config, shape)
        self.rank = next(iter(tensors.values()))[0][0]
        self.targets = {".".join(name.split(".")[-2:]) for name in tensors}
        self.head = head_tensors(config, shape)
        self.adapter = sum(a * b for pair in (*tensors.values(), self.head) for a, b in pair) * FLOAT32

    def frozen(self, linear: Linear, bits: int | None = None) -> int:
        """Return the bytes of a linear layer of the base: unquantised, or in groups with a scale and a bias each."""
        bits = self.bits if bits is None else bits
        if not bits or linear.inputs % self.group:  # mlx-lm leaves layers that it cannot group
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
        """Return the peak over all moments of what is kept plus what the queued work has made."""
        several = self.adapter if self.config.gradient_accumulation_steps > 1 else 0
        fixed: dict[str, Any] = {**self.weights(), "adapter": self.adapter, "optimizer": 2 * self.adapter}
        if self.config.reference == "initial-adapter":
            fixed["reference"] = self.adapter
        fixed["rewards"] = reward_bytes(self.config, self.e)
        worst: dict[str, dict[str, Any]] = {}  # the parts, at the worst moment of each phase
        queue: deque[tuple[float, Moment]] = deque()
        kept, gradients = 0, several
        for moment in self._moments():
            kept, gradients = kept + moment.stays, gradients + moment.gradients
            queue.append((self._share(moment.work), moment))
            while sum(share for share, _ in queue) - queue[0][0] >= 1:  # full even without the oldest
                kept -= queue.popleft()[1].goes
            made = sum(queued.work.made for _, queued in queue)
            here = {"activations": kept, "gradients": gradients, "logits" if moment.phase == "head" else "temporaries": made}
            if sum(here.values()) > sum(worst.get(moment.phase, {}).values()):
                worst[moment.phase] = here
        if self.config.online:
            worst["drawing answers"] = Drawing.of(self.config).on_mlx(self.shape, self.e)
        found = [Estimate(phase, **{**fixed, **parts}) for phase, parts in worst.items()]
        return replace(max(found, key=lambda e: e.total), phases=tuple((e.phase, e.total) for e in found))

    def _share(self, work: Work) -> float:
        """Return the share of the queue that some work fills; on Metal a large operation fills a command buffer by itself."""
        if not self.metal:
            return work.dispatches / CPU_DISPATCHES / TASKS
        operations = work.dispatches / 3  # views and held arrays are not operations
        return min(operations, max(operations / METAL_OPS, (work.made + work.weights) / METAL_BYTES)) / TASKS

    def _moments(self) -> Iterator[Moment]:
        """Yield the moments of a forward and a backward pass."""
        blocks, full = self._blocks(), self.mode == "full"
        stream = sum(block.tokens for block in blocks) * self.shape.hidden * self.e
        layer = [stage for block in blocks for stage in self._stages(block)]
        # For prompts the last layer computes only keys and values, since nothing reads more.
        last = [stage for block in blocks[:-1] for stage in self._stages(block)[:1]] + self._stages(blocks[-1])
        layers = [layer] * (self.shape.layers - 1) + [last]
        yield Moment("forward", stream + self._masks(blocks), 0, NO_WORK)
        for stages in layers:
            for again, group in self._groups(stages):
                for stage in group:
                    made, dispatches, weights = stage.forward
                    work = Work(made + stage.keeps * again, dispatches, weights)
                    yield Moment("forward", stage.keeps * (not again), 0, work)
            yield Moment("forward", stream * full, 0, NO_WORK)  # its result, the next layer's input, is kept
        # An MLP is few operations, so it is recomputed as soon as its result exists: the last one next to the head.
        early = 0 if full else sum(stage.keeps for again, group in self._groups(last) for stage in group if again)
        yield Moment("head", early, 0, NO_WORK)
        yield from self._scores(blocks[-1].tokens) if self.head else self._head()
        late = 0  # what the next layer left waiting
        for stages in reversed(layers):
            for again, group in reversed(self._groups(stages)):
                if again:
                    yield from (Moment("backward", stage.keeps * (not early), 0, stage.forward) for stage in group)
                    early = 0
                yield Moment("backward", 0, late, NO_WORK)
                yield from (Moment("backward", stage.waits, stage.keeps, stage.backward) for stage in reversed(group))
                late = 0
            late = sum(stage.waits for stage in stages)
            yield Moment("backward", 0, stream * full, NO_WORK, self.adapter // len(layers))

    def _groups(self, stages: Sequence[Stage]) -> list[tuple[bool, list[Stage]]]:
        """Return stages in order, grouped by whether they are recomputed for the backward pass."""
        if self.mode != "selective":
            return [(self.mode == "full", list(stages))]
        return [(again, list(group)) for again, group in groupby(stages, key=lambda stage: stage.mlp)]

    def _blocks(self) -> list[Block]:
        """Return the blocks of prompts and responses, or of rows."""
        load, rows = self.load, sum(map(len, self.load.responses))
        if self.layout == "plain":
            length = self._up(load.longest)
            return [Block(rows * length, [(length, length)] * rows, 1)]
        own = int(bool(self.head))  # a reward model's head reads the last token's own state
        prompts = self._up(max(1, sum(load.prompts) - len(load.prompts)))
        responses = self._up(load.answer_tokens + own * rows)
        if self.pads_attention:
            columns, width = max(1, self._up(max(load.prompts)) - 1), self._up(max(map(max, load.responses)) + own)
            alone, after = [(columns, columns)] * len(load.prompts), [(width, columns + width)] * rows
            return [Block(prompts, alone, 1), Block(responses, after, 1)]

        def cut(length: int, past: int) -> list[tuple[int, int]]:
            """Split queries into pieces, each of which sees all keys up to its own."""
            stops = [min(start + MLX_QUERIES, length) for start in range(0, length, MLX_QUERIES)]
            return [((stop - 1) % MLX_QUERIES + 1, past + stop) for stop in stops]

        answers = [
            (n + own, prompt - 1) for prompt, several in zip(load.prompts, load.responses, strict=True) for n in several
        ]
        alone = [call for prompt in load.prompts for call in cut(prompt - 1, 0)]
        after = [call for answer in answers for call in cut(*answer)]
        return [Block(prompts, alone, max(1, len(alone))), Block(responses, after, len(after))]

    def _up(self, length: int) -> int:
        return -(-length // self.multiple) * self.multiple

    def _masks(self, blocks: Sequence[Block]) -> int:
        """Return the bytes of the attention masks, which all layers share."""
        if self.layout == "plain":
            return 0
        calls = [call for block in blocks for call in block.scores]
        return sum(queries * keys for queries, keys in (calls if self.pads_attention else set(calls))) * self.e

    def _stages(self, block: Block) -> list[Stage]:
        """Return a layer's stages over the tokens of a block, in order."""
        s, e, tokens = self.shape, self.e, block.tokens
        attended = sum(queries for queries, _ in block.scores)  # more than the tokens in padded blocks
        names = list(self.linears)
        qkv, gate_up = names[: names.index("self_attn.o_proj")], [name for name in names if "gate" in name or "up_" in name]
        norm = self._norm(tokens * s.hidden)
        pre, post = [norm] * (not s.post_norms or s.norms == 4), [norm] * s.post_norms
        read = [self._input(qkv, attended), *(self._linear(name, attended) for name in qkv), self._rope(attended)]
        if s.joined:  # values are a view that keeps the whole; each part's gradient is written into zeros of full size
            whole = attended * (s.queries + 2 * s.keys) * e
            read.append(Stage(whole, NO_WORK, Work(3 * whole, 12)))
        if s.qk_norm:
            read.append(self._norm(attended * (s.queries + s.keys)))
        if self.layout != "plain":  # calls read slices, or padded blocks: gradients are written into zeros of full size
            read.append(Stage(0, NO_WORK, Work(block.calls * max(tokens, attended) * s.hidden * e, 0)))
        # Kept are gate, its sigmoid, silu and up. Each has a gradient, and the sigmoid's derivative needs one more array.
        numbers = tokens * s.intermediate * e
        active = Stage(4 * numbers, Work(0, 6), Work((5 + 4 * s.joined) * numbers, 16))
        wide = joined(*(self._linear(name, tokens) for name in gate_up))
        mlp = [wide, active, self._linear("mlp.down_proj", tokens, own=True)]
        return [
            joined(*pre, joined(*read, calls=block.calls)),
            self._attention(block),
            joined(self._linear("self_attn.o_proj", attended, own=True), *post, calls=block.calls),
            joined(*pre * (not s.parallel), self._input(gate_up, tokens, again=self.mode == "selective")),
            *(stage._replace(mlp=True) for stage in mlp),
            joined(*post),
        ]

    def _norm(self, numbers: int) -> Stage:
        """Norm: one operation on Metal; on a CPU its parts in float32, of which the input is kept."""
        own, wide = numbers * self.e, numbers * FLOAT32
        if self.metal:
            return Stage(own, Work(own, 2), Work(2 * own, 4))
        cast = own * (self.e != FLOAT32)
        return Stage(wide, Work(2 * wide + cast, 20), Work(4 * wide + 2 * cast, 26))

    def _input(self, names: Sequence[str], tokens: int, again: bool = False) -> Stage:
        """Return the stage of linear layers' input: their adapters keep it once, and so does a recomputed MLP."""
        kept = again or any(name in self.targets for name in names)
        return Stage(kept * tokens * self.linears[names[0]].inputs * self.e, NO_WORK, NO_WORK)

    def _linear(self, name: str, tokens: int, own: bool = False) -> Stage:
        """W x + scale x A B; with its `own` input it keeps that."""
        linear, e = self.linears[name], self.e
        inputs, outputs, weight = tokens * linear.inputs, tokens * linear.outputs, self.frozen(linear)
        bare = Stage(0, Work(outputs * e, 5, weight), Work(inputs * e, 5, weight))
        if name not in self.targets:
            return bare
        # A, B and everything made from them are float32: other types are cast, forward and backward.
        cast = e * (e != FLOAT32)
        wide = FLOAT32 * (e != FLOAT32)
        forward, backward = Work(outputs * (FLOAT32 + cast) + inputs * wide, 14), Work(inputs * (FLOAT32 + cast), 26)
        adapter = Stage(tokens * self.rank * FLOAT32, forward, backward, (inputs + outputs) * FLOAT32)
        # The mask, and the masked input.
        dropout = Stage(2 * inputs * e, Work(inputs * (FLOAT32 + 1), 20), Work(inputs * e, 4))
        return joined(bare, adapter, *[dropout] * bool(self.config.lora_dropout), *[self._input([name], tokens)] * own)

    def _rope(self, tokens: int) -> Stage:
        """Rotate queries and keys: one operation on Metal; on a CPU products of halves with tables, twice, and sums."""
        made = tokens * (self.shape.queries + self.shape.keys) * self.e
        return Stage(0, Work(made, 2), Work(made, 2)) if self.metal else Stage(0, Work(4 * made, 36), Work(4 * made, 48))

    def _attention(self, block: Block) -> Stage:
        """Attention with the whole score matrix, as MLX computes it when it needs a gradient."""
        s, e = self.shape, self.e
        queries, keys = (sum(call[i] for call in block.scores) for i in (0, 1))
        scores = sum(queries * keys for queries, keys in block.scores) * s.heads * e
        result, both = queries * s.queries * e, 2 * keys * s.keys * e
        cap = 2 * s.attention_cap  # a result and a derivative
        # The gradients of keys and values are made for every query head, then summed.
        every = 2 * keys * s.queries * e * (s.heads > s.kv_heads)
        # The softmax keeps its result and makes two gradients; a boolean mask, as plain rows have, is then kept as numbers.
        backward = scores * (2 + cap + (self.layout == "plain")) + 2 * result + every + both
        # Calls do not wait for each other, so MLX, breadth first, takes up to WIDTH of them at once.
        work = Work(backward, 34 * -(-block.calls // WIDTH))
        return Stage(result + both + scores * (1 + cap), Work(result + both, 24 * block.calls), work)

    def _scores(self, tokens: int) -> Iterator[Moment]:
        """Yield a reward model's head: the last norm of all states and its gradient, of which few are read."""
        norm = self._norm(tokens * self.shape.hidden)
        yield Moment("head", norm.keeps, 0, norm.forward)
        yield Moment("head", 0, norm.keeps, norm.backward)
        yield Moment("head", 0, 0, Work(0, CRITERION))

    def _head(self) -> Iterator[Moment]:
        """Yield the chunks of tokens whose logits are computed: shifted, exponentials and gradients in float32, and casts."""
        s, tokens, weights = self.shape, self._up(self.load.answer_tokens), self.weights()
        size = chunk_tokens(s.vocabulary, MLX_CHUNK)
        each = 4 * FLOAT32 + 2 * self.e * (self.e != FLOAT32) + 3 * FLOAT32 * bool(s.transform.cap)
        for start in range(0, tokens, size):
            count = min(size, tokens - start)
            work = Work(count * s.vocabulary * each, 48, 2 * (weights["head"] or weights["embeddings"]))
            yield Moment("head", 2 * count * s.hidden * self.e, 0, work)  # hidden states and their gradient
        yield Moment("head", 0, 0, Work(0, CRITERION))
