"""Paged attention on a GPU beside SDPA, FlexAttention and FlashInfer (where it is installed).

    python -m inlay.bench.attention_gpu [--output FILE] [--seconds 300]

Llama-3.1-8B's heads: 32 of queries, 8 of keys and values, 128 wide. Decode in GB/s of keys and
values that must be read, and its share of the read probe; prefill in TFLOP/s of the causal half.
The others get keys and values without pages, in one dense batch: the most that they can be given.
Outputs are compared before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.backends.device_attention import attention_for
from inlay.backends.program import AttentionStep
from inlay.bench import gpu
from inlay.passes.check import relative_rms

HEADS, KV_HEADS, SIZE, BLOCK = 32, 8, 128, 32
DECODE = ((1, 8192), (16, 2048), (64, 2048), (64, 8192), (256, 1024))
PREFILL = ((1, 1024), (1, 8192), (4, 2048), (16, 512))
PEERS = ("sdpa", "flex", "flashinfer")
TOLERANCE = 0.02
"""Relative RMS of bfloat16 results whose sums have other orders; int8 and fp8 caches round keys and
values to 2^-8 and 2^-4 of their size: five times as much."""


class Case:
    """Batch requests of `length` tokens in the cache, of which the last `new` are queries."""

    def __init__(self, batch: int, length: int, new: int, cache: torch.dtype, device: str) -> None:
        self.batch, self.length, self.new, self.device = batch, length, new, device
        torch.manual_seed(0)
        self.dtype = dtype = torch.bfloat16

        def random(heads: int, tokens: int) -> Tensor:
            return torch.randn(batch, heads, tokens, SIZE, device=device).to(dtype)

        self.q = random(HEADS, new)
        self.k, self.v = random(KV_HEADS, length), random(KV_HEADS, length)
        self.op = attention_for(
            torch.device(device, 0) if device == "cuda" else torch.device("cpu")
        )
        self.step = AttentionStep(
            layer=0, group=0, cache=0, query="q", key="k", value="v", output="o", num_heads=HEADS,
            num_kv_heads=KV_HEADS, head_dim=SIZE, v_head_dim=SIZE, scale=SIZE**-0.5,
        )  # fmt: skip
        blocks = -(-length // BLOCK)
        self.cache = self.op.allocate(self.step, batch * blocks, BLOCK, cache)
        # Pages in an order of their own, as after some time of serving.
        order = torch.randperm(batch * blocks).view(batch, blocks).to(device)
        self.tables = order.int()
        self._fill(order)

    def _fill(self, order: Tensor) -> None:
        """Keys and values of all tokens through the op itself, and the queries' inputs."""
        positions = torch.arange(self.length, device=self.device)
        slots = order[:, positions // BLOCK] * BLOCK + positions % BLOCK
        self.slots = slots[:, -self.new :].reshape(-1)
        self.run(self.length, slots.reshape(-1))

    def run(self, new: int, slots: Tensor) -> Tensor:
        def rows(x: Tensor, count: int) -> Tensor:
            return x[:, :, -count:].transpose(1, 2).reshape(-1, x.shape[1], SIZE)

        q = self.q if new == self.new else self.q[:, :, -1:].expand(-1, -1, new, -1)
        return self._call(rows(q, new), rows(self.k, new), rows(self.v, new), slots, new)()

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, new: int
    ) -> Callable[[], Tensor]:
        ints = {"dtype": torch.int32, "device": self.device}
        lens = torch.full((self.batch,), self.length, **ints)
        starts = torch.arange(0, self.batch * new + 1, new, **ints)
        return partial(
            self.op, self.step, q, k, v, self.cache, slots, self.tables, lens, starts, None, None
        )

    def ours(self) -> Callable[[], Tensor]:
        """Timed: the new tokens' keys and values are written, too."""
        count = self.batch * self.new
        q, k, v = (
            x[:, :, -self.new :].transpose(1, 2).reshape(count, -1, SIZE).contiguous()
            for x in (self.q, self.k, self.v)
        )
        return self._call(q, k, v, self.slots, self.new)

    def sdpa(self) -> Callable[[], Tensor]:
        causal = self.new > 1
        return lambda: F.scaled_dot_product_attention(
            self.q, self.k, self.v, is_causal=causal, enable_gqa=True
        )

    def flex(self) -> Callable[[], Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._dynamo.reset()  # it gives up after a few shapes
        compiled = torch.compile(flex_attention)
        mask = None
        if self.new > 1:
            mask = create_block_mask(
                lambda b, h, i, j: i >= j, None, None, self.new, self.length, self.device
            )
        return lambda: compiled(self.q, self.k, self.v, block_mask=mask, enable_gqa=True)

    def flashinfer(self) -> Callable[[], Tensor]:
        import flashinfer  # type: ignore[import-not-found]

        if self.new > 1:
            assert self.batch == 1, "one request alone, without its planner"
            q, k, v = (x[0].transpose(0, 1).contiguous() for x in (self.q, self.k, self.v))
            return lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True)[None]
        pages = self.length // BLOCK
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=self.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
        cache = torch.stack((self.k, self.v), 1).unflatten(3, (pages, BLOCK))
        cache = cache.permute(0, 3, 1, 2, 4, 5).reshape(-1, 2, KV_HEADS, BLOCK, SIZE).contiguous()
        ints = {"dtype": torch.int32, "device": self.device}
        wrapper.plan(
            torch.arange(0, self.batch * pages + 1, pages, **ints),
            torch.arange(self.batch * pages, **ints),
            torch.full((self.batch,), BLOCK, **ints),
            HEADS, KV_HEADS, SIZE, BLOCK, q_data_type=self.dtype, kv_data_type=self.dtype,
        )  # fmt: skip
        q = self.q[:, :, 0].contiguous()
        return lambda: wrapper.run(q, cache)[:, :, None]


def compare(
    batch: int, length: int, new: int, cache: str, device: str, peers: tuple[str, ...] = ()
) -> dict[str, Any]:
    case = Case(batch, length, new, getattr(torch, cache), device)
    expected = case.sdpa()()
    shape = (batch, new, HEADS, SIZE)
    found = case.ours()().view(shape).transpose(1, 2)
    error = relative_rms(expected, found)
    assert error < TOLERANCE * (1 if cache == "bfloat16" else 5), f"ours is off by {error:.3f}"
    facts: dict[str, Any] = {"batch": batch, "length": length, "new": new, "kv": cache,
                             "error": error}  # fmt: skip
    seconds = {"ours": gpu.seconds_of(case.ours(), device)}
    for name in peers:
        try:
            call = getattr(case, name)()
            off = relative_rms(expected, call())
            assert off < TOLERANCE, f"{name} is off by {off:.3f}"
            seconds[name] = gpu.seconds_of(call, device)
        except Exception as error_of_peer:  # whatever it raises: ours is told all the same
            facts[f"{name}_failed"] = f"{type(error_of_peer).__name__}: {error_of_peer}"[:200]
    for name, value in seconds.items():
        facts[f"{name}_us"] = value * 1e6
        if new == 1:
            size = case.cache.k.element_size() if name == "ours" else 2
            facts[f"{name}_gb_s"] = 2 * batch * length * KV_HEADS * SIZE * size / value / 1e9
        else:
            facts[f"{name}_tflop_s"] = 2 * batch * length**2 * HEADS * SIZE / value / 1e12
    return facts


def items(arguments: argparse.Namespace) -> Iterator[gpu.Item]:
    device = arguments.device
    yield "read probe", lambda: {"read_gb_s": gpu.read_bandwidth(device) / 1e9}
    decode, prefill = (DECODE, PREFILL) if device == "cuda" else (((2, 96),), ((2, 64),))
    cases = [(batch, length, 1) for batch, length in decode]
    cases += [(batch, length, length) for batch, length in prefill]
    for batch, length, new in cases:
        for cache in ("bfloat16", "float8_e4m3fn", "int8"):
            peers = ("sdpa",) if cache == "bfloat16" else ()
            name = f"{'decode' if new == 1 else 'prefill'} {batch} x {length} {cache}"
            yield name, partial(compare, batch, length, new, cache, device, peers)
    if device != "cuda":
        return
    for batch, length, new in cases:  # last: one of them is compiled for each shape
        name = f"{'decode' if new == 1 else 'prefill'} {batch} x {length} beside others"
        yield name, partial(compare, batch, length, new, "bfloat16", device, PEERS)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    gpu.add_arguments(parser, seconds=300)
    arguments = parser.parse_args()
    return gpu.run_items("attention_gpu", items(arguments), arguments)


if __name__ == "__main__":
    gpu.exit_with(main)
