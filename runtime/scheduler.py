"""Who runs in the next step, and with how many tokens.

Decodes come first: they are one token each and somebody waits for every one of them. What is left
of the token budget goes to prompts, the running ones before the waiting ones, cut into chunks
where they do not fit. A request is admitted when blocks for all it may ever need are free
(TensorRT-LLM's guaranteed_no_evict), so that nothing running ever has to give way.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from inlay.runtime.kv_cache import KVCache
from inlay.runtime.request import Request, RequestState


@dataclass(frozen=True)
class ScheduledRequest:
    """A request and how many of its uncomputed tokens the step runs."""

    request: Request
    num_tokens: int

    @property
    def needs_logits(self) -> bool:
        """Whether the step reaches the request's last token, so that the next can be sampled."""
        return self.num_tokens == self.request.num_uncomputed_tokens


class Scheduler:
    """The waiting and the running requests; gives out slots and KV blocks."""

    def __init__(self, kv_cache: KVCache, max_num_seqs: int, max_num_tokens: int) -> None:
        self.kv_cache = kv_cache
        self.max_num_tokens = max_num_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._num_slots = max_num_seqs

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request, behind those that came before it."""
        self.waiting.append(request)

    def schedule(self) -> tuple[list[ScheduledRequest], list[Request]]:
        """The next step's requests, and those among them that were admitted for it."""
        budget = self.max_num_tokens
        scheduled = []
        for request in sorted(self.running, key=lambda r: not r.is_decoding):
            if count := min(request.num_uncomputed_tokens, budget):
                scheduled.append(ScheduledRequest(request, count))
                budget -= count
        admitted = []
        while budget and self.waiting and self._admit(self.waiting[0]):
            request = self.waiting.popleft()
            count = min(request.num_uncomputed_tokens, budget)
            scheduled.append(ScheduledRequest(request, count))
            admitted.append(request)
            budget -= count
        return scheduled, admitted

    def finish(self, request: Request) -> None:
        """Take a request out, whatever its state, and free what it holds."""
        if request.state is RequestState.WAITING:
            self.waiting.remove(request)
        elif request.state is RequestState.RUNNING:
            self.running.remove(request)
            self.kv_cache.free(request.slot)
            self._free_slots.append(request.slot)
            request.slot = -1
        request.state = RequestState.FINISHED

    def check(self) -> None:
        """Assert that slots and blocks are free, or one running request's each."""
        self.kv_cache.check()
        slots = [request.slot for request in self.running]
        assert sorted(slots + self._free_slots) == list(range(self._num_slots)), (
            f"slots {slots} run and {self._free_slots} are free, of {self._num_slots}"
        )
        needed = sum(self.kv_cache.num_blocks_for(r.max_total_tokens) for r in self.running)
        assert needed == self.kv_cache.num_used_blocks, (
            f"running requests reserved {needed} blocks, {self.kv_cache.num_used_blocks} are used"
        )

    def _admit(self, request: Request) -> bool:
        """Give a waiting request a slot and its blocks, if there are enough of both."""
        if not self._free_slots:
            return False
        if not self.kv_cache.allocate(self._free_slots[-1], request.max_total_tokens):
            return False
        request.slot = self._free_slots.pop()
        request.state = RequestState.RUNNING
        self.running.append(request)
        return True
