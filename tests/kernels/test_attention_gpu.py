"""The Triton attention kernels on a GPU, beside float64: bfloat16, FP8, CUDA graphs, no waiting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: the kernels cannot be compiled")

from inlay.backends.kernels.triton.attention_decode import combine_kernel, decode_kernel
from inlay.backends.kernels.triton.attention_prefill import prefill_kernel
from inlay.backends.kernels.triton.cache_write import write_kernel
from inlay.backends.kernels.triton.paged_attention import TritonAttention
from tests.backends.test_cpu_attention_masks import alibi
from tests.backends.test_cpu_ops import Attention, attention
from tests.kernels.attention_cases import FP8, INT8, check, step_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# (tokens in the cache after the step, new tokens): decodes beyond many splits, prompts, chunks.
MIXED = ((700, 700), (4000, 1), (1, 1), (2100, 300), (0, 0), (64, 64), (129, 2))
DECODE = ((4000, 1), (1, 1), (129, 1), (640, 1), (33, 1))
WHOLE = ((1, 1), (64, 64), (300, 300), (700, 700))
SHAPES = [  # head_dim, v_head_dim, num_kv_heads, group, block_size
    (64, 64, 2, 7, 16),
    (80, 80, 4, 1, 32),
    (96, 96, 2, 4, 64),
    (128, 128, 8, 4, 32),
    (128, 128, 2, 8, 128),
    (192, 128, 2, 3, 32),
    (256, 256, 1, 4, 32),
    (128, 128, 1, 71, 16),
    (512, 512, 1, 2, 32),
]


def check_on_gpu(dtype: torch.dtype, cache: torch.dtype, *shape: int, **options: object) -> None:
    requests = options.pop("requests", None)
    for chosen in (MIXED, DECODE) if requests is None else (requests,):
        padding = 5 if chosen is not DECODE else 0
        call = attention(dtype, *shape, requests=chosen, padding=padding, **options)  # type: ignore[arg-type]
        check(call, cache, device="cuda")


@pytest.mark.parametrize("cache", [BF16, FP8, INT8], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], cache: torch.dtype) -> None:
    check_on_gpu(BF16, cache, *shape, scale=shape[0] ** -0.5)


@pytest.mark.parametrize(
    ("dtype", "cache"), [(F16, F16), (F32, F32), (F32, FP8), (F16, INT8), (BF16, F16), (F32, BF16)]
)
def test_types(dtype: torch.dtype, cache: torch.dtype) -> None:
    check_on_gpu(dtype, cache, 128, 128, 2, 4, 32, scale=0.09)


@pytest.mark.parametrize("cache", [BF16, FP8, INT8], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"window": 100},
        {"window": 1},
        {"chunk": 300},
        {"chunk": 300, "window": 37},
        {"softcap": 20.0},
        {"sinks": torch.linspace(-2, 9, 8)},
        {"slopes": alibi(8)},
        {"slopes": alibi(8).bfloat16()},
        {"causal": False, "requests": WHOLE},
        {"causal": False, "window": 70, "requests": WHOLE},
        {"slopes": alibi(8), "softcap": 20.0, "window": 400, "sinks": torch.ones(8)},
    ],
    ids=str,
)
def test_options(options: dict[str, object], cache: torch.dtype) -> None:
    check_on_gpu(BF16, cache, 128, 128, 2, 4, 32, scale=0.09, **options)


def test_wrong_twins_are_seen() -> None:
    def call(**options: object) -> Attention:
        return attention(BF16, 128, None, 2, 4, 32, WHOLE, scale=0.09, **options)  # type: ignore[arg-type]

    for right, wrong in (({"window": 20}, {"window": 21}), ({"softcap": 5.0}, {"softcap": 5.3})):
        with pytest.raises(AssertionError, match="not close"):
            check(call(**wrong), device="cuda", expected_of=call(**right))


class OnDevice:
    """A call whose tensors lie on the GPU."""

    def __init__(self, call: Attention) -> None:
        gpu = torch.device("cuda")
        self.step, self.op = step_of(call), TritonAttention(gpu)
        blocks, _, size, _ = call.k_cache.shape
        self.cache = self.op.allocate(self.step, blocks, size, call.k_cache.dtype)
        self.cache.k.copy_(call.k_cache)
        self.cache.v.copy_(call.v_cache)
        names = "q", "k", "v", "slot_mapping", "block_table", "seq_lens", "query_start_loc"
        self.tensors = {name: getattr(call, name).to(gpu) for name in names}

    def run(self) -> torch.Tensor:
        t = self.tensors
        return self.op(
            self.step, t["q"], t["k"], t["v"], self.cache, t["slot_mapping"], t["block_table"],
            t["seq_lens"], t["query_start_loc"], None, None,
        )  # fmt: skip


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.usefixtures("waiting_is_an_error")
def test_nobody_waits_for_the_device() -> None:
    for requests in (MIXED, DECODE):
        device = OnDevice(attention(BF16, 128, None, 2, 4, 32, requests))
        device.run()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        device.run()
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_serves_other_lengths_than_it_was_captured_with() -> None:
    call = attention(BF16, 128, None, 2, 4, 32, DECODE, padding=0)
    device, count = OnDevice(call), len(DECODE)
    expected = device.run().clone()
    short = dict(device.tensors)
    device.tensors = {name: x.clone() for name, x in short.items()}
    device.tensors["seq_lens"].fill_(1)
    device.tensors["slot_mapping"].fill_(-1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        device.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = device.run()
    for name, x in short.items():
        device.tensors[name].copy_(x)
    graph.replay()
    assert torch.equal(out, expected)
    # Three requests of five: the other tokens are padding.
    device.tensors["query_start_loc"].clamp_(max=3)
    device.tensors["seq_lens"][3:] = 0
    device.tensors["slot_mapping"][3:] = -1
    graph.replay()
    assert torch.equal(out[:3], expected[:3])
    assert torch.equal(out[3:], torch.zeros_like(out[3:]))
    assert count == 5


def test_other_lengths_and_tokens_compile_nothing_anew() -> None:
    """One kernel for mixed steps whatever their sizes, multiples of 16 or not."""

    def num_kernels() -> int:
        kernels = (write_kernel, decode_kernel, combine_kernel, prefill_kernel)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    OnDevice(attention(BF16, 64, None, 2, 2, 32, ((300, 300), (512, 1)))).run()
    before = num_kernels()
    for requests in (((301, 300), (512, 1)), ((288, 288), (1, 1)), ((17, 16), (500, 80))):
        OnDevice(attention(BF16, 64, None, 2, 2, 32, requests, padding=0)).run()
    assert num_kernels() == before


def test_pages_far_apart() -> None:
    """Offsets beyond 2^31 elements."""
    call = attention(BF16, 128, None, 8, 4, 32, DECODE, padding=0)
    near = OnDevice(call)
    expected = near.run()
    shift = 70_000  # blocks of 32768 elements
    far = OnDevice(replace(call, block_table=call.block_table + shift))
    blocks = call.k_cache.shape[0]
    far.cache = far.op.allocate(far.step, shift + blocks, 32, BF16)
    far.cache.k[shift:].copy_(near.cache.k)
    far.cache.v[shift:].copy_(near.cache.v)
    far.tensors["slot_mapping"] += shift * 32
    assert torch.equal(far.run(), expected)
