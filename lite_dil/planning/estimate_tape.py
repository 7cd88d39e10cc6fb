"""MLX's arrays without their numbers: which a step makes, in which order, and how many bytes of them are live at once.

A `Tape` records operations and differentiates them as MLX does; `Tape.peak` evaluates them as MLX does: what nothing needs is
not computed, an array goes when its last reader is done, and work is queued ahead of its execution.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

FLOAT32 = 4
WIDTH = 20  # mlx/utils.h: MLX_BFS_MAX_WIDTH
ACTIVE_TASKS = 10  # mlx/transforms.cpp: tasks that are queued before the next is
CPU_DISPATCHES = 10  # mlx/backend/cpu/encoder.h: dispatches in a task; an operation is one, what it holds is another
METAL_OPS, METAL_BYTES = 40, 40 * 2**20  # mlx/backend/metal/device.cpp: operations and bytes read, in a command buffer


class Array:
    """An array: how many numbers of how many bytes each, whether a gradient is wanted of it, and where it lies.

    `buffer` is None for what is there all the time, as weights are.
    """

    __slots__ = ("buffer", "each", "numbers", "wanted")

    def __init__(self, numbers: int, each: int, buffer: int | None, wanted: bool) -> None:
        self.numbers, self.each, self.buffer, self.wanted = numbers, each, buffer, wanted

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.numbers * self.each


Gradients = Iterator[tuple[Array, Array]]
Pull = Callable[[Array], Gradients]  # from the gradient of a result to those of the arguments


@dataclass(frozen=True)
class Op:
    """An operation.

    Attributes:
        reads: numbers of buffers.
        makes: the number of the result's.
        bytes: of the result.
        inplace: it may write over an argument that nothing else needs.
        dispatches: tasks that MLX queues for it on a CPU.
        kind: what the result is for.
        phase: when it is made.
        fixed: bytes that it reads of what is there all the time.
        alias: the result is the first argument, not before the others are there.
    """

    reads: tuple[int, ...]
    makes: int
    bytes: int
    inplace: bool
    dispatches: int
    kind: str
    phase: str
    fixed: int = 0
    alias: bool = False


@dataclass(frozen=True)
class Peak:
    """The moment when the most bytes are live: its phase, the bytes by kind, and the most in every phase."""

    phase: str
    kinds: dict[str, int]
    phases: dict[str, int]

    def total(self) -> int:
        """The bytes."""
        return sum(self.kinds.values())


class Tape:
    """The operations of a step."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.pulls: list[tuple[Array, Pull]] = []
        self.held: set[int] = set()  # buffers that Python holds until the end
        self.kind, self.phase = "activations", "forward"
        self.outputs: list[int] = []  # what is evaluated, in order
        self.gradients: dict[Array, Array] = {}
        self._record, self._buffers = True, 0

    def weight(self, numbers: int, each: int = FLOAT32, wanted: bool = False) -> Array:
        """Return an array that is there all the time."""
        return Array(numbers, each, None, wanted)

    def make(
        self,
        reads: Sequence[Array],
        numbers: int,
        each: int,
        pull: Pull | None = None,
        inplace: bool = False,
        dispatches: int = 2,
    ) -> Array:
        """Record an operation; without `pull` no gradient goes through it. Views beside it are part of `dispatches`."""
        wanted = pull is not None and any(x.wanted for x in reads)
        out = Array(numbers, each, self._buffers, wanted)
        self._buffers += 1
        found = tuple(dict.fromkeys(x.buffer for x in reads if x.buffer is not None))
        assert out.buffer is not None
        fixed = sum(x.bytes for x in reads if x.buffer is None)
        self.ops.append(Op(found, out.buffer, out.bytes, inplace, dispatches, self.kind, self.phase, fixed))
        if wanted and pull and self._record:
            self.pulls.append((out, pull))
        return out

    def view(self, x: Array, numbers: int, pull: Pull) -> Array:
        """Record a part of an array, or the array in another shape, that shares its bytes."""
        out = Array(numbers, x.each, x.buffer, x.wanted)
        if out.wanted and self._record:
            self.pulls.append((out, pull))
        return out

    def depends(self, x: Array, other: Array) -> Array:
        """Return `x`, not before `other` is there."""
        assert x.buffer is not None and other.buffer is not None
        self.ops.append(Op((x.buffer, other.buffer), self._buffers, 0, False, 1, self.kind, self.phase, alias=True))
        self._buffers += 1
        return Array(x.numbers, x.each, self._buffers - 1, x.wanted)

    def slice(self, x: Array, numbers: int) -> Array:
        """Take a part; its gradient is written into zeros of the whole."""
        if numbers == x.numbers:
            return x

        def pull(g: Array) -> Gradients:
            zeros = self.make([], x.numbers, x.each, dispatches=3)
            yield x, self.make([zeros, g], x.numbers, x.each, inplace=True)

        return self.view(x, numbers, pull)

    def gather(self, x: Array, numbers: int) -> Array:
        """Take rows by their numbers; the gradient is scattered into zeros."""

        def pull(g: Array) -> Gradients:
            zeros = self.make([], x.numbers, x.each, dispatches=3)
            yield x, self.make([zeros, g], x.numbers, x.each, inplace=True)

        return self.make([x], numbers, x.each, pull, dispatches=3)

    def concatenate(self, parts: Sequence[Array]) -> Array:
        """Join arrays; the parts of the gradient are views of it."""

        def pull(g: Array) -> Gradients:
            for part in parts:
                if part.wanted:
                    yield part, Array(part.numbers, g.each, g.buffer, False)

        return self.make(parts, sum(part.numbers for part in parts), parts[0].each, pull)

    def elementwise(self, x: Array, pull: Pull | None = None) -> Array:
        """Apply a function to each number; without `pull` its gradient is a product with a number, or with a small array."""

        def scaled(g: Array) -> Gradients:
            yield x, self.elementwise(g)

        return self.make([x], x.numbers, x.each, pull or scaled, inplace=True)

    def cast(self, x: Array, each: int) -> Array:
        """Change the type."""

        def pull(g: Array) -> Gradients:
            yield x, self.cast(g, x.each)

        return x if x.each == each else self.make([x], x.numbers, each, pull)

    def add(self, a: Array, b: Array) -> Array:
        """Add two arrays of a size; one gradient serves both."""

        def pull(g: Array) -> Gradients:
            yield a, g
            yield b, g

        return self.make([a, b], a.numbers, a.each, pull, inplace=True)

    def multiply(self, a: Array, b: Array) -> Array:
        """Multiply two arrays of a size: each is kept for the other's gradient."""

        def pull(g: Array) -> Gradients:
            for x, other in ((a, b), (b, a)):
                if x.wanted:
                    yield x, self.make([g, other], x.numbers, x.each, inplace=True)

        return self.make([a, b], a.numbers, a.each, pull, inplace=True)

    def matmul(self, a: Array, b: Array, numbers: int) -> Array:
        """Multiply matrices: each is kept for the other's gradient, if that is wanted."""

        def pull(g: Array) -> Gradients:
            if a.wanted:
                yield a, self.matmul(g, Array(b.numbers, b.each, b.buffer, False), a.numbers)
            if b.wanted:
                yield b, self.matmul(Array(a.numbers, a.each, a.buffer, False), g, b.numbers)

        return self.make([a, b], numbers, max(a.each, b.each), pull, dispatches=5)

    def checkpoint(self, function: Callable[[Array], Array], x: Array) -> Array:
        """Apply a function of which nothing is kept but `x`; the backward pass computes it again."""
        with self._recording(False):
            out = function(x)

        def pull(g: Array) -> Gradients:
            leaf, start = self.depends(x, out), len(self.pulls)
            kind, self.kind = self.kind, "activations"
            with self._recording(True):
                again = function(leaf)
            self.kind = kind
            found = self._backward(start, again, g)
            if leaf in found:
                yield x, found[leaf]

        made = Array(out.numbers, out.each, out.buffer, True)
        if self._record:
            self.pulls.append((made, pull))
        return made

    def backward(self, result: Array, gradient: Array) -> None:
        """Record the backward pass; the gradients of weights are held until the end."""
        self._backward(0, result, gradient)
        made = [g.buffer for g in self.gradients.values() if g.buffer is not None]
        assert result.buffer is not None
        self.outputs = [result.buffer, *made[::-1]]
        self.held.update(made)
        self.ops = [replace(op, kind="gradients") if op.makes in made else op for op in self.ops]

    def _backward(self, start: int, result: Array, gradient: Array) -> dict[Array, Array]:
        found = {result: gradient}
        pulls, self.pulls = self.pulls[start:], self.pulls[:start]
        record, self._record = self._record, False
        for out, pull in reversed(pulls):
            if out not in found:
                continue
            for x, g in pull(found.pop(out)):
                if not x.wanted:
                    continue
                into = self.gradients if x.buffer is None else found
                into[x] = self.add(into[x], g) if x in into else g
        self._record = record
        return found

    @contextmanager
    def _recording(self, on: bool) -> Iterator[None]:
        before, self._record = self._record, on
        yield
        self._record = before

    def peak(self, metal: bool) -> Peak:
        """Evaluate, and return when the most bytes are live.

        MLX's order follows every view and every small array, which are not all here: it is taken once as its rule gives it
        for this tape and once as recorded, and the larger peak is returned.
        """
        order = self._breadth_first()
        return max((self._evaluate(ops, metal) for ops in (order, sorted(order, key=lambda op: op.makes))), key=Peak.total)

    def _evaluate(self, ops: list[Op], metal: bool) -> Peak:
        left = Counter(buffer for op in ops for buffer in op.reads)  # readers to come, by where their argument lies
        left.update(self.held)
        sizes, kinds = {op.makes: op.bytes for op in ops}, {op.makes: op.kind for op in ops}
        live: Counter[str] = Counter()
        phases: dict[str, int] = defaultdict(int)
        best, at = Counter[str](), ""
        queued: deque[tuple[int, int]] = deque()  # when a buffer's last reader was queued
        busy: dict[int, int] = {}  # when a buffer's latest reader was queued
        owner: dict[int, int] = {}  # results that lie in the buffer of an argument
        clock = _Clock(metal)
        for op in ops:
            clock.tick(op, sizes)
            while queued and clock.done(queued[0][0]):
                _, buffer = queued.popleft()
                live[kinds[buffer]] -= sizes[buffer]
            reads = list(dict.fromkeys(owner.get(buffer, buffer) for buffer in op.reads))
            place = reads[0] if op.alias else None
            if op.inplace:
                place = next((b for b in reads if left[b] == 1 and sizes[b] == op.bytes and clock.done(busy.get(b, -1))), None)
            if place is None:
                place = op.makes
                live[op.kind] += op.bytes
            else:
                owner[op.makes] = place
                left[place] += left[op.makes]
            for buffer in op.reads:
                buffer = owner.get(buffer, buffer)
                left[buffer] -= 1
                busy[buffer] = clock.now
                if not left[buffer]:
                    queued.append((clock.now, buffer))
            total = sum(live.values())
            phases[op.phase] = max(phases[op.phase], total)
            if total > sum(best.values()):
                best, at = live.copy(), op.phase
        return Peak(at, dict(best), dict(phases))

    def _breadth_first(self) -> list[Op]:
        """Return the operations that what is held depends on, in MLX's order: breadth first from the end, WIDTH at most."""
        made = {op.makes: op for op in self.ops}
        readers: Counter[int] = Counter()
        stack, seen = list(self.outputs), set(self.outputs)
        readers.update(self.outputs)
        while stack:
            reads = made[stack.pop()].reads
            readers.update(reads)
            stack += [buffer for buffer in reads if buffer not in seen]
            seen.update(reads)
        found: list[int] = []
        pending: list[tuple[tuple[int, ...], int]] = []
        reads, start, at = tuple(self.outputs), 0, 0
        while True:
            for i in range(start, len(reads)):
                if len(found) - at >= WIDTH:
                    pending.append((reads, i))
                    break
                readers[reads[i]] -= 1
                if not readers[reads[i]]:
                    found.append(reads[i])
            if at < len(found):
                reads, start, at = made[found[at]].reads, 0, at + 1
            elif pending:
                reads, start = pending.pop()
            else:
                return [made[buffer] for buffer in reversed(found)]


class _Clock:
    """How far MLX's queue is ahead of its execution: ten tasks. A task is some operations; on Metal fewer that read much."""

    def __init__(self, metal: bool) -> None:
        self.metal, self.now, self._ops, self._bytes = metal, 0, 0, 0
        self._read: set[int] = set()

    def tick(self, op: Op, sizes: dict[int, int]) -> None:
        """Queue an operation."""
        if not self.metal:
            self.now += op.dispatches
            return
        new = set(op.reads) - self._read
        self._read |= new
        self._ops += -(-op.dispatches // 2)
        self._bytes += op.fixed + sum(sizes[buffer] for buffer in new)
        if self._ops > METAL_OPS or self._bytes > METAL_BYTES:
            self.now, self._ops, self._bytes, self._read = self.now + 1, 0, 0, set()

    def done(self, when: int) -> bool:
        """Return whether what was queued at a time has been executed by now, at the latest."""
        return when < 0 or when + ACTIVE_TASKS * (1 if self.metal else CPU_DISPATCHES) < self.now
