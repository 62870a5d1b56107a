"""How a step is run: from a graph captured for its padded size, in pieces, or as it is.

Nobody else decides. Decode steps (a token for each request, logits for each) have sizes that can be
captured whole: the number of requests is padded up a ladder. Of mixed steps that are not too large
the parts between attention calls are captured, for each padded number of tokens. Padding belongs to
no request: its cache slot is -1, its request has no tokens, its rows of logits are never read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from inlay.backends.base import LoadedModel, ModelLimits
from inlay.backends.device import needing_memory
from inlay.backends.static_call import StaticCall, graph_pool
from inlay.backends.step import PADDING_SLOT, SMALLEST, StepInputs, ladder_up_to, round_up
from inlay.runtime.sampler import Draws, Sampler, to_device

MAX_PIECES_TOKENS = 512
"""Mixed steps of more tokens are run as they are: launching them takes less than running them."""

LESS_GRAPHS = "lower max_num_seqs, or give cuda_graphs=False"

Run = tuple[torch.Tensor, torch.Tensor | None]
"""A step's logits, and its tokens where it was sampled from too."""

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
    """Runs a model's steps; with graphs, decode steps of the captured sizes from those.

    Where the sampler is one kernel, the graphs hold it too.
    """

    def __init__(
        self, model: LoadedModel, limits: ModelLimits, sampler: Sampler | None = None
    ) -> None:
        self._model = model
        self._sampler = sampler if sampler is not None and sampler.is_one_call else None
        self._sizes = ladder_up_to(limits.max_num_seqs)
        self._piece_sizes = ladder_up_to(min(limits.max_num_tokens, MAX_PIECES_TOKENS))
        self._width = -(-limits.max_seq_len // limits.block_size)
        self._max_num_tokens = limits.max_num_tokens
        self._graphs: dict[int, StaticCall[Run]] = {}
        self.num_replayed = 0
        self.num_in_pieces = 0

    def capture(self) -> int:
        """Capture all sizes, the largest first; bytes of the device that those of decode steps
        took, which `drop` gives back."""
        device = self._model.device
        before, pool = _memory_used(device), graph_pool(device)
        for size in reversed(self._sizes):
            with needing_memory(f"the CUDA graph of {size} decoding requests", LESS_GRAPHS):
                self._graphs[size] = self._captured(size, pool)
        taken = _memory_used(device) - before
        for size in reversed(self._piece_sizes):
            with needing_memory(f"CUDA graphs of steps of {size} tokens", LESS_GRAPHS):
                self._model.forward_pieces(self._blank(size, SMALLEST))
        return taken

    def _captured(self, size: int, pool: Any) -> StaticCall[Run]:
        blank, device, sampler = self._blank(size), self._model.device, self._sampler

        def call(tensors: Sequence[torch.Tensor]) -> Run:
            *given, slots, positions = tensors
            logits = self._model.forward(replace(blank, **dict(zip(TENSORS, given, strict=True))))
            return logits, sampler and sampler.launch_all(logits, slots, positions)

        unused = 0 if sampler is None else sampler.padding_slot
        places = torch.full((2, size), unused, dtype=torch.int64, device=device)
        inputs = [*(getattr(blank, name) for name in TENSORS), *places.unbind(0)]
        return StaticCall(call, inputs, pool)

    def warm_up(self, num_logits: int) -> int:
        """Run a step of every kind that no graph has, so that nothing is compiled or set up while
        serving; the device's bytes that one of them needed at most, beside weights and cache.

        num_logits: rows of logits that a step may ask for.
        """
        most = 0
        for step in self._kinds_of_steps(num_logits):
            what = f"a step of {len(step.input_ids)} tokens"
            with needing_memory(what, "lower max_num_tokens or max_num_seqs"):
                most = max(most, peak_of(self._model.device, partial(self._run, step)))
        return most

    def _kinds_of_steps(self, num_logits: int) -> Iterator[StepInputs]:
        """Every padded size, the largest first; then what kernels are chosen for otherwise: tables
        of one block, as many requests as there may be, every number of rows of logits."""
        largest, *others = reversed(ladder_up_to(self._max_num_tokens))
        graphs = self._piece_sizes if self._graphs else []
        for size in [largest, *(one for one in others if one not in graphs)]:
            yield self._asking(self._blank(size, SMALLEST), min(size, num_logits))
        short, many = self._blank(2 * SMALLEST, SMALLEST), self._sizes[-1]
        for step in (short, self._blank(SMALLEST)):
            yield replace(step, block_tables=step.block_tables[:, :, :1])
        for size in (many, 2 * many):
            if size <= self._max_num_tokens:
                yield self._blank(size, many)
        for count in ladder_up_to(num_logits):
            yield self._asking(short, count)

    def _asking(self, step: StepInputs, count: int) -> StepInputs:
        rows = torch.zeros(count, dtype=torch.int64, device=self._model.device)
        return replace(step, logits_indices=rows)

    def _run(self, step: StepInputs) -> None:
        """With all that may be asked of its rows."""
        logits = self._model.forward(step)
        wide = logits.float()
        wide.log_softmax(-1)
        if self._sampler is not None:
            slots = torch.full_like(step.logits_indices, self._sampler.padding_slot)
            for rows in (logits, wide):
                self._sampler.launch_all(rows, slots, torch.zeros_like(slots))

    def drop(self) -> None:
        """Forget the graphs: the addresses that they were captured with are no longer good."""
        self._graphs.clear()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()  # what they held is free memory again

    def forward(self, step: StepInputs) -> torch.Tensor:
        """Logits [R, vocab]; rows beyond step.num_logits are not to be read."""
        graph = self._graph_for(step)
        if graph is not None:
            return self._replay(graph, step, None)[0]
        if self._graphs and step.input_ids.shape[0] in self._piece_sizes:
            self.num_in_pieces += 1
            return self._model.forward_pieces(step)
        return self._model.forward(step)

    def forward_sampled(self, step: StepInputs, draws: Draws) -> Run:
        """The same, and the tokens of a plain plan [>= N], written to the sampler's last_tokens;
        None where the graph does not sample."""
        graph = self._graph_for(step)
        if graph is None or len(draws.slots) != step.num_requests:
            return self.forward(step), None
        return self._replay(graph, step, draws)

    def _replay(self, graph: StaticCall[Run], step: StepInputs, draws: Draws | None) -> Run:
        """Without draws the graph's tokens go to nobody."""
        self.num_replayed += 1
        size = graph.inputs[0].shape[0]
        places = np.zeros((2, size), dtype=np.int64)
        if self._sampler is not None:
            places[0] = self._sampler.padding_slot
        if draws is not None:
            places[:, : len(draws.slots)] = draws.slots, draws.positions
        own = to_device(places, self._model.device).unbind(0)
        logits, tokens = graph([*self._padded(step, size), *own])
        return logits, None if draws is None else tokens

    def _graph_for(self, step: StepInputs) -> StaticCall[Run] | None:
        is_decode = step.num_tokens == step.num_requests == step.num_logits
        if not self._graphs or not is_decode:
            return None
        return self._graphs.get(round_up(step.num_tokens, self._sizes))

    def _padded(self, step: StepInputs, size: int) -> Sequence[torch.Tensor]:
        """The step's tensors in the graph's sizes; tables keep their width, the rest is stale."""
        shortest = min(map(len, (step.seq_lens, step.input_ids, step.logits_indices)))
        if shortest >= size:  # the host has padded it already
            sizes = {name: size + (name == "query_start_loc") for name in TENSORS}
            cut = {name: getattr(step, name)[: sizes[name]] for name in TENSORS}
            cut["slot_mapping"] = step.slot_mapping[:, :size]
            cut["block_tables"] = step.block_tables[:, :size]
            return list(cut.values())
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


def peak_of(device: torch.device, call: Callable[[], Any]) -> int:
    """Bytes that a call has allocated on a GPU at most, over what there was; 0 elsewhere."""
    if device.type != "cuda":
        call()
        return 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _memory_used(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free
