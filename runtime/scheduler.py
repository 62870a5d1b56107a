"""Who runs in the next step, and with how many tokens.

Decodes come first: they are one token each and somebody waits for every one of them. What is left
of the token budget goes to prompts, the running ones before the waiting ones, cut into chunks
where they do not fit. Two policies, TensorRT-LLM's, say when a request may begin:

- guaranteed_no_evict: when blocks for all that it may ever need can be promised to it.
- max_utilization: when there are blocks for its next chunk. Where a running one then finds no
  block, the running one whose turn came last gives its own up and is computed again later; most of
  them are still in the prefix cache then. Beams are promised theirs under either policy.
"""

from __future__ import annotations

import logging
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from inlay.backends.base import ModelLimits
from inlay.runtime.kv_cache import KVCache, most_held
from inlay.runtime.request import Request, RequestState

logger = logging.getLogger(__name__)

Policy = Literal["guaranteed_no_evict", "max_utilization"]

LOOKAHEAD = 16
"""Waiting requests of equal priority among which the one with the longest cached prefix goes
first."""

AGING_STEPS = 1000
"""Steps after which a waiting request goes before all others, and keeps its place to its end, so
that none waits for ever."""


@dataclass(frozen=True)
class ScheduledRequest:
    """A sequence and how many of its uncomputed tokens the step runs, from `start` on.

    all_logits: logits of every one of these tokens are wanted, not of the last alone.
    """

    request: Request
    start: int
    num_tokens: int
    epoch: int
    needs_logits: bool
    all_logits: bool = False

    @property
    def end(self) -> int:
        """Where the tokens that it runs end."""
        return self.start + self.num_tokens

    @property
    def num_logits(self) -> int:
        """Rows of logits that it has."""
        return self.num_tokens if self.all_logits else int(self.needs_logits)

    @property
    def is_current(self) -> bool:
        """Whether the sequence still has the place that it was scheduled in."""
        return self.request.state is RequestState.RUNNING and self.request.epoch == self.epoch


@dataclass
class Schedule:
    """A step to be: its sequences, and those among them that came in for it."""

    items: list[ScheduledRequest] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    num_preempted: int = 0


@dataclass
class _Budget:
    """What a step still has room for: tokens, and rows of logits."""

    tokens: int
    rows: int


class Scheduler:
    """The waiting and the running sequences; gives out slots and KV blocks."""

    def __init__(
        self,
        kv_cache: KVCache,
        limits: ModelLimits,
        *,
        max_logits: int,
        policy: Policy = "guaranteed_no_evict",
        prefix_caching: bool = False,
        whole_prompts: bool = False,
    ) -> None:
        """max_logits: rows of logits in a step. whole_prompts: never cut one into chunks."""
        self.kv_cache = kv_cache
        self.limits = limits
        self.policy = policy
        self.prefix_caching = prefix_caching
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._whole_prompts = whole_prompts
        self._max_logits = max_logits
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._by_age: deque[Request] = deque()
        self._num_steps = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a sequence by its priority, then by its arrival."""
        request.state, request.waiting_since = RequestState.WAITING, self._num_steps
        insort(self.waiting, request, key=lambda one: one.rank)
        self._by_age.append(request)

    def schedule(self) -> Schedule:
        """Who runs in the next step; gives them slots and blocks."""
        self._num_steps += 1
        schedule = Schedule()
        budget = _Budget(self.limits.max_num_tokens, self._max_logits)
        for request in sorted(self.running, key=lambda one: (not one.is_decoding, one.rank)):
            if request.state is not RequestState.RUNNING or not request.can_run:
                continue
            count = self._num_to_run(request, request.num_computed_tokens, budget)
            if count and self._make_room(request, request.num_computed_tokens + count, schedule):
                self._put(request, count, schedule, budget)
        while budget.tokens and budget.rows and not schedule.num_preempted:
            first = self._next_waiting()
            if first is None or not self._admit(first, budget, schedule):
                break
        return schedule

    def fork(self, request: Request) -> list[Request]:
        """The prompt is being run: its siblings run too from now on, and are returned."""
        siblings, request.siblings = request.siblings, []
        slots = [sibling.slot for sibling in siblings]
        self.kv_cache.fork(request.slot, slots, request.num_computed_tokens)
        for sibling in siblings:
            sibling.state = RequestState.RUNNING
            sibling.token_ids = list(request.token_ids)
            sibling.num_computed_tokens = request.num_computed_tokens
            sibling.num_pending = request.num_pending
            sibling.block_names = list(request.block_names)
            sibling.num_committed = request.num_committed
            self.running.append(sibling)
        return siblings

    def commit(self, request: Request, num_tokens: int) -> None:
        """The first num_tokens tokens were run: others may use their blocks, windows pass on."""
        block_size = self.kv_cache.block_size
        is_full = num_tokens // block_size > request.num_committed
        # Beams change places; what all of them share is the prompt.
        is_forked_beam = request.beams is not None and not request.siblings
        if is_full and self.prefix_caching and not is_forked_beam:
            names = request.name_blocks(block_size)
            end = min(num_tokens // block_size, len(names))
            if end > request.num_committed:
                priority = request.options.cache_priority
                self.kv_cache.commit(request.slot, names, request.num_committed, end, priority)
                request.num_committed = end
        self.kv_cache.release(request.slot, num_tokens)

    def preempt(self, request: Request) -> None:
        """Take a running sequence's place; it waits and is computed again. Beams begin anew."""
        if request.beams is not None:
            self._restart_beams(request)
            return
        self._leave(request)
        self.add(request)

    def part(self, leader: Request, request: Request) -> None:
        """Let the others of a family that is not forked yet go on without this sequence."""
        if request is not leader:
            leader.siblings.remove(request)
            if request.slot >= 0:
                self._give_back(request)
            return
        if leader.state is RequestState.RUNNING:
            self.preempt(leader)
        heir, *heir.siblings = leader.siblings
        leader.siblings = []
        heir.num_prompt_logprobs = leader.num_prompt_logprobs
        self.add(heir)

    def finish(self, request: Request) -> None:
        """Take a sequence out, whatever its state, and free what it holds."""
        if request.state is RequestState.WAITING:
            self.waiting.remove(request)
            self._by_age.remove(request)
        elif request.state is RequestState.RUNNING:
            self._leave(request)
        for sibling in request.siblings:
            sibling.state = RequestState.FINISHED
        request.state = RequestState.FINISHED

    def check(self) -> None:
        """Assert that slots and blocks are free, or one running sequence's each."""
        self.kv_cache.check()
        owners = [one for request in self.running for one in (request, *request.siblings)]
        slots = [request.slot for request in owners]
        assert sorted(slots + self._free_slots) == list(range(self.limits.max_num_seqs)), (
            f"slots {slots} run and {self._free_slots} are free, of {self.limits.max_num_seqs}"
        )
        if not owners:
            pinned = sum(map(len, self.kv_cache._pins.values()))
            assert self.kv_cache.num_used_blocks <= pinned, "blocks are held and nobody runs"
        assert sorted(map(id, self.waiting)) == sorted(map(id, self._by_age))
        assert all(request.state is RequestState.WAITING for request in self.waiting)
        assert all(request.state is RequestState.RUNNING for request in self.running)

    def _num_to_run(self, request: Request, start: int, budget: _Budget) -> int:
        """Tokens of a sequence that the step has room for; 0 for none."""
        wanted = len(request.token_ids) - start
        count = min(wanted, budget.tokens)
        if request.params.prompt_logprobs is not None and start < request.num_prompt_tokens:
            count = min(count, budget.rows)
        if not budget.rows or (self._whole_prompts and count < wanted):
            return 0
        return count

    def _put(self, request: Request, count: int, schedule: Schedule, budget: _Budget) -> None:
        start = request.num_computed_tokens
        self.kv_cache.allocate(request.slot, start + count)
        last = count == request.num_uncomputed_tokens
        every = request.wants_prompt_logits
        item = ScheduledRequest(request, start, count, request.epoch, last, every)
        schedule.items.append(item)
        budget.tokens -= count
        budget.rows -= count if every else last

    def _make_room(self, request: Request, end: int, schedule: Schedule) -> bool:
        """Whether the sequence can have its blocks, others having given way where need be."""
        if self.kv_cache.is_reserved(request.slot) or self.kv_cache.holds(request.slot, end):
            return True
        while (self.kv_cache.wanted(request.slot, end) > self.kv_cache.available()).any():
            others = [one for one in self.running if not self.kv_cache.is_reserved(one.slot)]
            last = max(others, key=lambda one: one.rank)
            if len(self.running) == 1 and self.kv_cache.has_pins:
                self._unpin()
                continue
            schedule.items[:] = [item for item in schedule.items if item.request is not last]
            self.preempt(last)
            schedule.num_preempted += 1
            if last is request:
                return False
        return True

    def _unpin(self) -> None:
        logger.warning("pinned prefixes leave no room for a request and are unpinned")
        self.kv_cache.unpin_all()

    def _next_waiting(self) -> Request | None:
        """Whose turn it is: the one that has waited too long, or the first with a cached prefix."""
        if not self.waiting or not self._free_slots:
            return None
        oldest, first = self._by_age[0], self.waiting[0]
        if self._is_aged(oldest):
            return oldest
        if not self.prefix_caching or len(self.waiting) == 1:
            return first
        priority = first.options.priority
        equal = [one for one in self.waiting[:LOOKAHEAD] if one.options.priority == priority]
        return max(equal, key=lambda one: len(self._match(one)))

    def _is_aged(self, request: Request) -> bool:
        return request.is_aged or self._num_steps - request.waiting_since > AGING_STEPS

    def _match(self, request: Request) -> Sequence[bytes]:
        """Names of the cached blocks that a waiting sequence can begin with."""
        if not self.prefix_caching or request.wants_all_rows:
            return ()
        names = request.name_blocks(self.kv_cache.block_size)
        # The last token is always run: its logits are wanted.
        most = (len(request.token_ids) - 1) // self.kv_cache.block_size
        return names[: self.kv_cache.match(names[:most])]

    def _admit(self, request: Request, budget: _Budget, schedule: Schedule) -> bool:
        """Give a waiting sequence its slots and blocks, if there are enough of both."""
        family, names = [request, *request.siblings], self._match(request)
        start = len(names) * self.kv_cache.block_size
        count = self._num_to_run(request, start, budget)
        if not count or len(self._free_slots) < len(family):
            return False
        if not self._has_room(request, names, start + count):
            if self.running or not self.kv_cache.has_pins:
                return False
            self._unpin()
            return self._admit(request, budget, schedule)
        self.waiting.remove(request)
        self._by_age.remove(request)
        for one in family:
            one.slot = self._free_slots.pop()
            one.is_aged = self._is_aged(request)
        self.kv_cache.attach(request.slot, names, request.options.cache_priority)
        if self._is_promised(request):
            for one, most in zip(family, self._most_held(request), strict=True):
                self.kv_cache.reserve(one.slot, most)
        request.state, request.num_computed_tokens = RequestState.RUNNING, start
        request.num_committed = len(names)
        if request.scheduled_time is None:
            request.num_cached_tokens = start
        self.running.append(request)
        schedule.admitted.append(request)
        self._put(request, count, schedule, budget)
        return True

    def _has_room(self, request: Request, names: Sequence[bytes], end: int) -> bool:
        """Whether a waiting sequence that begins with these cached blocks can come in."""
        cache = self.kv_cache
        if self._is_promised(request):
            needed = cache.needed(self._most_held(request), names)
        else:
            needed = cache.num_blocks_for(end) - len(names) + cache.taken(names)
        return bool((needed <= cache.available()).all())

    def _is_promised(self, request: Request) -> bool:
        return self.policy == "guaranteed_no_evict" or request.beams is not None

    def _most_held(self, request: Request) -> list[np.ndarray]:
        return most_held(
            self.kv_cache.windows,
            self.kv_cache.block_size,
            request.num_prompt_tokens,
            request.max_total_tokens,
            min(self.limits.max_num_tokens, request.max_total_tokens),
            1 + len(request.siblings),
        )

    def _leave(self, request: Request) -> None:
        """Give back the slot and the blocks of a running sequence."""
        self.running.remove(request)
        for one in (request, *request.siblings):
            self._give_back(one)
        request.drop_pending()
        request.num_computed_tokens = request.num_committed = 0
        request.epoch += 1

    def _give_back(self, request: Request) -> None:
        self.kv_cache.free(request.slot)
        self._free_slots.append(request.slot)
        request.slot = -1

    def _restart_beams(self, request: Request) -> None:
        assert request.beams is not None
        family = request.beams.family
        for one in family:
            if one.state is RequestState.RUNNING:
                self._leave(one)
            one.state = RequestState.UNFORKED
            del one.token_ids[one.num_prompt_tokens :]
        request.beams.restart()
        leader = family[0]
        leader.siblings = family[1:]
        self.add(leader)
