"""A call whose inputs and outputs stay at fixed addresses, so that a CUDA graph can hold it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


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

    def __call__(self, inputs: Sequence[torch.Tensor]) -> T:
        """Inputs may be smaller than the static ones: what lies beyond stays as it was.

        On CUDA the next call overwrites what this one gave.
        """
        for own, given in zip(self.inputs, inputs, strict=True):
            if own is not given:
                own[tuple(slice(size) for size in given.shape)].copy_(given, non_blocking=True)
        if self._graph is None:
            return self._call(self.inputs)
        self._graph.replay()
        return self.output

    def _capture(self, pool: Any) -> None:
        # What a first call sets up (handles, workspaces, kernels loaded late) cannot be captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._call(self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self.output = self._call(self.inputs)
