"""batch_invariant=True: a request's logits, bit for bit, alone and in any batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from inlay import Engine, compile_model
from inlay.backends.base import LoadedModel
from inlay.backends.inductor import invariance
from inlay.backends.inductor.invariance import FIXED_ROWS, rows_are_alike
from inlay.backends.kernels.cpu_ops import load_ops
from inlay.backends.program import Program, SegmentStep
from inlay.errors import OptionError
from inlay.passes.check import relative_rms
from tests.runtime.driver import GREEDY, Driver
from tests.toys import build_toy

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(f"{count} {seed}").choices(range(3, 128), k=count)


TARGET = tokens(600, 0)
"""Longer than the pieces that attention deals out to threads."""
OTHERS = [tokens(random.Random(seed).choice([1, 3, 9, 20, 33, 90]), seed) for seed in range(63)]

_SLOW = (
    "llama",
    "gemma3_text",
    "qwen3_moe",
    "deepseek_v3",
    "llama w8a8",
    "llama w8a16",
    "qwen3_moe w8a8",
    "qwen3_moe w4a16",
    "qwen2 fp8",
)
MODELS = ["gpt_oss", *[pytest.param(name, marks=pytest.mark.slow) for name in _SLOW]]

_engines: dict[tuple[str, str, str], Engine] = {}


def engine_of(name: str, backend: str, dtype: str) -> Engine:
    """Built once for all tests of this process; float32 ones share their segments with the tests
    of architectures. name: a toy's, and what it is quantized to."""
    key = name, backend, dtype
    if key not in _engines:
        toy_name, _, quantization = name.partition(" ")
        toy = build_toy(toy_name, getattr(torch, dtype), max_position_embeddings=1024)
        options: dict[str, Any] = {"block_size": 16, "verify": "capture"}
        if quantization:
            options["quantization"] = quantization
        _engines[key] = compile_model(toy, backend, dtype=dtype, **options)
    return _engines[key]


def drive(
    model: LoadedModel, before: Sequence[Sequence[int]] = (), late: int = 0, **options: Any
) -> Driver:
    """The target behind requests that were sent before it, and with late ones behind it."""
    driver = Driver(model, **{"kv_cache_tokens": 1 << 15, "max_num_seqs": 64, **options})
    for index, prompt in enumerate(before):
        driver.add(f"before {index}", prompt)
        if index % 8 == 0:
            driver.step()
    driver.add("target", TARGET)
    driver.add("scored", TARGET[:50], prompt_logprobs=2, logprobs=2)
    for index in range(late):
        driver.step()
        driver.add(f"late {index}", OTHERS[index])
    driver.run()
    return driver


def alone(model: LoadedModel, **options: Any) -> Driver:
    driver = Driver(model, enable_prefix_caching=False, **options)
    driver.add("target", TARGET)
    driver.run()
    driver.add("scored", TARGET[:50], prompt_logprobs=2, logprobs=2)
    driver.run()
    return driver


def among_others(model: LoadedModel, **options: Any) -> Driver:
    return drive(model, OTHERS[:50], 13, **options)


def in_chunks(model: LoadedModel, **options: Any) -> Driver:
    return drive(model, max_num_tokens=29, max_num_seqs=3, **options)


def in_chunks_among_others(model: LoadedModel, **options: Any) -> Driver:
    return drive(model, OTHERS[10:30], 5, max_num_tokens=101, max_num_seqs=24, **options)


def behind_a_prefix(model: LoadedModel, **options: Any) -> Driver:
    driver = drive(model, [[*TARGET[:333], 5], *OTHERS[:5]], **options)
    assert driver.num_cached_tokens("target") == 320
    return driver


def preempted(model: LoadedModel, **options: Any) -> Driver:
    driver = Driver(model, enable_prefix_caching=False, max_num_tokens=200, **options)
    driver.add("scored", TARGET[:50], prompt_logprobs=2, logprobs=2)
    driver.add("target", TARGET)
    for _ in range(9):
        driver.step()
    (running,) = [r for r in driver.executor.scheduler.running if r.request_id == "target"]
    driver.executor.scheduler.preempt(running)
    driver.run()
    return driver


def padded(model: LoadedModel, **options: Any) -> Driver:
    return drive(model, OTHERS[:4], cuda_graphs=True, max_num_tokens=64, max_num_seqs=12, **options)


WAYS: list[Callable[..., Driver]] = [
    among_others,
    in_chunks,
    in_chunks_among_others,
    behind_a_prefix,
    preempted,
    padded,
]


def differing(one: Driver, other: Driver) -> int:
    """Rows of logits that are not the same bits; those of the prompt as their distances to the
    sum, in float64, where its likeliest tokens are concerned."""
    rows, others = one.rows("target"), other.rows("target")
    assert len(rows) == len(others) == GREEDY.max_tokens
    bits = BITS[rows.dtype]
    count = int((rows.view(bits) != others.view(bits)).any(1).sum())
    ours, theirs = (
        [place for output in driver.outputs["scored"] for place in places(output)]
        for driver in (one, other)
    )
    assert len(ours) == len(theirs) == 50 + (GREEDY.max_tokens or 0)
    return count + sum(a != b for a, b in zip(ours, theirs, strict=True))


def places(output: Any) -> list[Any]:
    return [*output.prompt_logprobs, *output.logprobs]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_bits_do_not_depend_on_the_batch(
    name: str, dtype: str, threads: Callable[[int], None]
) -> None:
    """Windows, sinks, experts. With two threads only what splits its work otherwise then."""
    model = engine_of(name, "inductor", dtype).load_model()
    for count, ways in ((1, WAYS), (2, [among_others])):
        threads(count)
        expected = alone(model, batch_invariant=True)
        for way in ways:
            assert differing(way(model, batch_invariant=True), expected) == 0, (way, count)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_fixed_sizes(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CPUs are given on which nobody has found sums to be alike."""
    engine = engine_of("gpt_oss", "inductor", dtype)
    usual = alone(engine.load_model())
    monkeypatch.setattr(invariance, "rows_are_alike", lambda dtype, flags: False)
    model = engine.load_model()
    expected = alone(model, batch_invariant=True)
    for way in (among_others, in_chunks):
        assert differing(way(model, batch_invariant=True), expected) == 0, way
    # The same numbers summed in another order, at most.
    error = relative_rms(usual.rows("target")[0].float(), expected.rows("target")[0].float())
    assert error < (1e-5 if dtype == "float32" else 5e-2)


def test_without_it_the_reference_differs() -> None:
    """So these tests can tell; and so the flag is refused there."""
    model = engine_of("gpt_oss", "eager", "float32").load_model()
    assert differing(in_chunks(model), alone(model)) > 0
    with pytest.raises(OptionError, match=r"'eager'.*backend='inductor'"):
        Driver(model, batch_invariant=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("experts", [False, True])
def test_rows_of_fixed_products(dtype: torch.dtype, experts: bool) -> None:
    """Any number of rows, one too, and at any place."""
    load_ops()
    torch.manual_seed(0)
    ops, size = torch.ops.inlay_cpu, (96, 2100)  # so many inputs that one row is summed otherwise
    x, weight = torch.randn(200, size[1]).to(dtype), (torch.randn(3, *size) / 46).to(dtype)
    bias = torch.randn(size[0]).to(dtype)
    up = ops.pack_experts(weight) if experts else ops.pack_linear(weight[0])
    down = ops.pack_experts(torch.randn(3, size[1], size[0] // 2).to(dtype))
    index, shares = torch.randint(0, 3, (200, 2)), torch.rand(200, 2)

    def run(begin: int, end: int) -> torch.Tensor:
        rows = x[begin:end]
        if experts:
            return ops.experts(
                rows, index[begin:end], shares[begin:end], up, down, None, None, None
            )
        return ops.linear(rows, up, bias, size[0])

    usual = run(0, 200)
    for handle in (up, down) if experts else (up,):
        ops.fix_rows(handle, FIXED_ROWS)
    whole = run(0, 200)
    for begin, end in ((0, 1), (7, 8), (3, 5), (0, 32), (1, 34), (100, 199), (199, 200)):
        assert torch.equal(run(begin, end), whole[begin:end]), (begin, end)
    # Sums of 2,100 products rounded once (bfloat16: to 1 in 256) in one order or another.
    assert relative_rms(usual.float(), whole.float()) < 1e-2
    with pytest.raises(RuntimeError, match=r"rows must be at least 0, got -1"):
        ops.fix_rows(up, -1)


def test_products_of_activations_are_refused() -> None:
    """As gemma3n has, which mixes its streams by a matrix that it computes for each token."""
    program = engine_of("gpt_oss", "eager", "float32").artifact.program
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["kind"] = "input"
    graph.output(graph.call_function(torch.ops.aten.matmul.default, (x, x)))
    graphs = {"middle": torch.fx.GraphModule({}, graph)}
    with pytest.raises(OptionError, match=r"segment middle multiplies matrices in .*aten.matmul"):
        invariance.make_batch_invariant(program, graphs, [], [])


def test_rows_are_fixed_by_the_type_of_each_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 model's router may be float32."""
    graph = torch.fx.Graph()
    x, narrow, wide = (graph.placeholder(name) for name in ("x", "narrow", "wide"))
    for node, kind, dtype in (
        (x, "input", torch.bfloat16),
        (narrow, "weight", torch.bfloat16),
        (wide, "weight", torch.float32),
    ):
        node.meta.update(kind=kind, spec=((32, 32), dtype))
    linear = torch.ops.inlay.linear.default
    graph.output([graph.call_function(linear, (x, narrow)), graph.call_function(linear, (x, wide))])
    step = SegmentStep("only", ("narrow", "wide"), ("x",), ("a", "b"))
    program = Program((step,), "a", "b", "bfloat16", 32)
    weights = [[torch.zeros(1), torch.ones(1)]]
    fixed: list[torch.Tensor] = []
    monkeypatch.setattr(invariance, "fix_rows", lambda handle, rows: fixed.append(handle))
    graphs = {"only": torch.fx.GraphModule({}, graph)}
    invariance.make_batch_invariant(program, graphs, weights, ["avx2", "fma", "f16c"])
    assert fixed == [weights[0][1]]


def test_which_cpus_sum_alike() -> None:
    assert rows_are_alike("float32", ["avx2", "avx512f", "amx_tile"])
    assert rows_are_alike("bfloat16", ["avx512f", "avx512_bf16"])
    assert not rows_are_alike("bfloat16", ["avx512f", "avx512_bf16", "amx_bf16"])
    assert not rows_are_alike("bfloat16", ["avx512f"])
    assert not rows_are_alike("bfloat16", ["avx512f", "avx2", "fma", "f16c"])
    assert rows_are_alike("bfloat16", ["avx2", "f16c", "fma"])
    assert not rows_are_alike("bfloat16", ["avx2", "fma"])
    assert not rows_are_alike("float32", ["avx2"])
    assert not rows_are_alike("float16", ["avx512f", "avx512_fp16"])
    assert not rows_are_alike("float32", [])
