"""--offload-activations: keep full checkpointing's activations in the computer's memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lite_dil.backends.limits import OFFLOAD_CHUNK
from lite_dil.backends.torch.out_of_memory import ERRORS, HostMemoryError, ran_out
from lite_dil.base.errors import first_line


class Span(NamedTuple):
    """An array's place in an `Arena`: its first byte, shape, type and size."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    bytes: int


def _chunk(pinned: bool) -> Tensor:
    try:
        return torch.empty(OFFLOAD_CHUNK, dtype=torch.uint8, pin_memory=pinned)
    except ERRORS as error:
        if not ran_out(error):
            raise
        raise HostMemoryError(f"offloading activations: {first_line(error)}") from None


class Arena:
    """Consecutive arrays in chunks of the computer's memory, which grow in number and are reused.

    Each allocation of pinned memory is rounded up to a power of two, an array of 313 MiB to 512; chunks are such a power
    already, and an array may span several.
    """

    def __init__(self, pinned: bool = True) -> None:
        self.pinned, self.chunks = pinned, list[Tensor]()

    def put(self, x: Tensor, start: int) -> Span:
        """Copy `x` to the bytes from `start` on, asynchronously if the memory is pinned."""
        flat = x.contiguous().view(-1).view(torch.uint8)
        span = Span(start, x.shape, x.dtype, flat.numel())
        while len(self.chunks) * OFFLOAD_CHUNK < start + span.bytes:
            self.chunks.append(_chunk(self.pinned))
        for here, there in self._pieces(span):
            here.copy_(flat[there], non_blocking=True)
        return span

    def get(self, span: Span, out: Tensor) -> None:
        """Copy a stored array to `out`, in the same way."""
        flat = out.view(-1).view(torch.uint8)
        for here, there in self._pieces(span):
            flat[there].copy_(here, non_blocking=True)

    def _pieces(self, span: Span) -> Iterator[tuple[Tensor, slice]]:
        """Yield the parts of chunks that a span covers, each with its slice of the array's bytes."""
        done = 0
        while done < span.bytes:
            number, at = divmod(span.start + done, OFFLOAD_CHUNK)
            size = min(OFFLOAD_CHUNK - at, span.bytes - done)
            yield self.chunks[number][at : at + size], slice(done, done + size)
            done += size


class ActivationOffload:
    """Keeps activations in pinned memory, copied on a separate stream while the GPU computes.

    The last array in is the first out. All copies are on one stream, so that none overwrites what another still reads.
    """

    def __init__(self) -> None:
        self.stream, self.arena = torch.cuda.Stream(), Arena()
        self.kept: list[Span] = []
        self.leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()  # arrays being copied to the computer's memory
        self.fetched: dict[int, Tensor] = {}

    @property
    def chunks(self) -> int:
        """The number of chunks of pinned memory."""
        return len(self.arena.chunks)

    def put(self, x: Tensor) -> int:
        """Copy `x` to the computer's memory; return the number to get it by."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        end = self.kept[-1].start + self.kept[-1].bytes if self.kept else 0
        with torch.cuda.stream(self.stream):
            self.kept.append(self.arena.put(x.detach(), end))
        # At most two arrays are still on the GPU: it waits for the previous copy, whose array may then be overwritten.
        # With `record_stream` they would stay as long as Python runs ahead of the GPU.
        self.leaving.append((x.detach(), self.stream.record_event()))
        if len(self.leaving) > 1:
            current.wait_event(self.leaving.popleft()[1])
        return len(self.kept) - 1

    def get(self, number: int) -> Tensor:
        """Return the last array, back on the GPU, and start fetching the one before it, which comes next."""
        current = torch.cuda.current_stream()
        x = self.fetched.pop(number) if number in self.fetched else self._fetch(number)
        current.wait_stream(self.stream)
        self.leaving.clear()
        del self.kept[number:]
        if number > 0:
            self.fetched[number - 1] = self._fetch(number - 1)
        return x

    def clear(self, chunks: int) -> None:
        """Forget arrays that were never fetched, and free all but the first `chunks` of the memory."""
        self.stream.synchronize()
        self.kept.clear()
        self.leaving.clear()
        self.fetched.clear()
        del self.arena.chunks[chunks:]

    def _fetch(self, number: int) -> Tensor:
        span = self.kept[number]
        # Allocated on the current stream: each stream that allocates has its own blocks, which no other can use.
        x = torch.empty(span.shape, dtype=span.dtype, device="cuda")
        self.stream.wait_stream(torch.cuda.current_stream())  # which may still read the old content
        with torch.cuda.stream(self.stream):
            self.arena.get(span, x)
        return x
