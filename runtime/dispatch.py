"""How a step is run: from a graph captured for its padded size, in pieces, or as it is.

Nobody else decides. Decode steps (a token for each request, logits for each) have sizes that can be
captured whole: the number of requests is padded up a ladder. Of mixed steps that are not too large
the parts between attention calls are captured, for each padded number of tokens. Padding belongs to
no request: its cache slot is -1, its request has no tokens, its rows of logits are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from inlay.backends.base import LoadedModel, ModelLimits
from inlay.backends.static_call import StaticCall
from inlay.backends.step import PADDING_SLOT, SMALLEST, StepInputs, ladder_up_to, round_up

MAX_PIECES_TOKENS = 512
"""Mixed steps of more tokens are run as they are: launching them takes less than running them."""

TENSORS = (
    "input_ids",
    "position_ids",
    "slot_mapping",
    "block_tables",
    "seq_lens",
    "query_start_loc",
    "logits_indices",
)


class Dispatcher:
    """Runs a model's steps; with graphs, decode steps of the captured sizes from those."""

    def __init__(self, model: LoadedModel, limits: ModelLimits) -> None:
        self._model = model
        self._sizes = ladder_up_to(limits.max_num_seqs)
        self._piece_sizes = ladder_up_to(min(limits.max_num_tokens, MAX_PIECES_TOKENS))
        self._width = -(-limits.max_seq_len // limits.block_size)
        self._graphs: dict[int, StaticCall[torch.Tensor]] = {}
        self.num_replayed = 0
        self.num_in_pieces = 0

    def capture(self) -> int:
        """Capture all sizes, the largest first; bytes of the device that this took."""
        before = _memory_used(self._model.device)
        for size in reversed(self._sizes):
            blank = self._blank(size)
            self._graphs[size] = StaticCall(
                lambda tensors, blank=blank: self._model.forward(  # type: ignore[misc]
                    replace(blank, **dict(zip(TENSORS, tensors, strict=True)))
                ),
                [getattr(blank, name) for name in TENSORS],
            )
        for size in reversed(self._piece_sizes):
            self._model.forward_pieces(self._blank(size, SMALLEST))
        return _memory_used(self._model.device) - before

    def drop(self) -> None:
        """Forget the graphs: the addresses that they were captured with are no longer good."""
        self._graphs.clear()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()  # what they held is free memory again

    def forward(self, step: StepInputs) -> torch.Tensor:
        """Logits [R, vocab]; rows beyond step.num_logits are not to be read."""
        graph = self._graph_for(step)
        if graph is not None:
            self.num_replayed += 1
            return graph(self._padded(step, graph.inputs[0].shape[0]))
        if self._graphs and step.input_ids.shape[0] in self._piece_sizes:
            self.num_in_pieces += 1
            return self._model.forward_pieces(step)
        return self._model.forward(step)

    def _graph_for(self, step: StepInputs) -> StaticCall[torch.Tensor] | None:
        is_decode = step.num_tokens == step.num_requests == step.num_logits
        if not self._graphs or not is_decode:
            return None
        return self._graphs.get(round_up(step.num_tokens, self._sizes))

    def _padded(self, step: StepInputs, size: int) -> Sequence[torch.Tensor]:
        """The step's tensors in the graph's sizes; tables keep their width, the rest is stale."""
        blank, count = self._blank(size), step.num_requests
        tensors = {name: getattr(blank, name) for name in TENSORS if name != "block_tables"}
        for name in ("input_ids", "position_ids", "logits_indices", "seq_lens"):
            tensors[name][:count] = getattr(step, name)[:count]
        tensors["slot_mapping"][:, :count] = step.slot_mapping[:, :count]
        tensors["query_start_loc"].fill_(count)
        tensors["query_start_loc"][: count + 1] = step.query_start_loc[: count + 1]
        tensors["block_tables"] = step.block_tables[:, :count]
        return [tensors[name] for name in TENSORS]

    def _blank(self, size: int, num_requests: int | None = None) -> StepInputs:
        """A step that is all padding: so many tokens, and as many requests unless told."""
        count = num_requests or size
        groups, device = len(self._model.kv_groups), self._model.device

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return StepInputs(
            input_ids=zeros(size, dtype=torch.int64),
            position_ids=zeros(size, dtype=torch.int64),
            slot_mapping=zeros(groups, size, dtype=torch.int64).fill_(PADDING_SLOT),
            block_tables=zeros(groups, count, self._width, dtype=torch.int32),
            seq_lens=zeros(count, dtype=torch.int32),
            query_start_loc=zeros(count + 1, dtype=torch.int32),
            logits_indices=zeros(count, dtype=torch.int64),
            num_tokens=size,
            num_requests=count,
            num_logits=count,
        )


def _memory_used(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free
