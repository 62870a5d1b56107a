"""What an executor is asked beside requests: statistics, the prefix cache, traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inlay.runtime.block_pool import block_names
from inlay.runtime.dispatch import Dispatcher
from inlay.runtime.kv_cache import KVCache
from inlay.runtime.scheduler import Scheduler
from inlay.runtime.stats import Stats


class ExecutorControl:
    """The executor's control methods; called between steps."""

    kv_cache: KVCache
    scheduler: Scheduler
    dispatcher: Dispatcher
    stats: Stats

    def get_stats(self) -> dict[str, Any]:
        """Counters since the beginning, and how full everything is now; times in seconds."""
        cache, counters = self.kv_cache, self.stats.counters
        total = sum(pool.num_blocks for pool in cache.pools)
        return {
            "num_running": len(self.scheduler.running),
            "num_waiting": len(self.scheduler.waiting),
            "batch_occupancy": len(self.scheduler.running) / self.scheduler.limits.max_num_seqs,
            "kv_cache_usage": cache.num_used_blocks / total,
            "num_cached_blocks": sum(pool.num_cached for pool in cache.pools),
            "num_host_blocks": sum(map(len, cache.hosts)),
            "prefix_hit_rate": counters.num_cached_tokens / max(counters.num_prompt_tokens, 1),
            "num_graph_steps": self.dispatcher.num_replayed,
            "num_piecewise_steps": self.dispatcher.num_in_pieces,
            **self.stats.summary(),
        }

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix, pinned ones too; requests that run go on."""
        self.kv_cache.reset()
        return True

    def pin_prefix(self, token_ids: Sequence[int], cache_salt: str | None = None) -> int:
        """Keep a prefix that has been run in the cache; how many of its tokens are kept."""
        return self.kv_cache.pin(self._names(token_ids, cache_salt)) * self.kv_cache.block_size

    def unpin_prefix(self, token_ids: Sequence[int], cache_salt: str | None = None) -> int:
        """Undo `pin_prefix`; how many tokens were kept."""
        return self.kv_cache.unpin(self._names(token_ids, cache_salt)) * self.kv_cache.block_size

    def get_kv_events(self) -> list[dict[str, Any]]:
        """Blocks stored, offloaded and removed since the last call; [] unless kv_events is on."""
        return self.kv_cache.take_events()

    def start_trace(self) -> None:
        """Record the phases of each step from now on."""
        self.stats.start_trace()

    def stop_trace(self) -> dict[str, Any]:
        """The trace, in the Chrome trace event format."""
        return self.stats.stop_trace()

    def _names(self, token_ids: Sequence[int], cache_salt: str | None) -> list[bytes]:
        """Hashes of a prefix's full blocks."""
        return block_names([], token_ids, self.kv_cache.block_size, cache_salt)
