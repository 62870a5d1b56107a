"""A call whose inputs and outputs stay at fixed addresses, so that a CUDA graph can hold it."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: libraries keep a workspace for each stream that they ever saw."""
    return torch.cuda.Stream(device)


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage is collected meanwhile: memory that is freed within a capture ends it."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def graph_pool(device: torch.device) -> Any:
    """Memory that several graphs of a device share; None where there are none."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class StaticCall(Generic[T]):
    """`call` with inputs of one size; replayed from a graph on CUDA, called plainly elsewhere."""

    def __init__(
        self,
        call: Callable[[Sequence[torch.Tensor]], T],
        inputs: Sequence[torch.Tensor],
        pool: Any = None,
    ) -> None:
        """Capture it; inputs become its own, and their sizes are the only ones that it takes.

        pool: where memory comes from, `graph_pool()`: graphs that share one run one after the
            other, and none reads what another left but its output.
        """
        self.inputs = list(inputs)
        self._call = call
        self._graph: torch.cuda.CUDAGraph | None = None
        if self.inputs[0].device.type == "cuda":
            with torch.cuda.device(self.inputs[0].device):
                self._capture(pool)

    @property
    def fixed(self) -> T | tuple[()]:
        """What every call gives in the same memory: nothing without a graph."""
        return () if self._graph is None else self.output

    def __call__(self, inputs: Sequence[torch.Tensor]) -> T:
        """Inputs may be smaller than the static ones: what lies beyond stays as it was.

        On CUDA the next call overwrites what this one gave.
        """
        copies: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for own, given in zip(self.inputs, inputs, strict=True):
            if own is not given:
                to, of = copies.setdefault(own.dtype, ([], []))
                to.append(own[tuple(slice(size) for size in given.shape)])
                of.append(given)
        for to, of in copies.values():  # tensors of a type in one kernel, where they are dense
            torch._foreach_copy_(to, of, non_blocking=True)
        if self._graph is None:
            return self._call(self.inputs)
        self._graph.replay()
        return self.output

    def _capture(self, pool: Any) -> None:
        # What a first call sets up (handles, workspaces, kernels loaded late) cannot be captured.
        stream = _side_stream(self.inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._call(self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self.output = self._call(self.inputs)
