"""Whole engines on a GPU: the CPU's tokens, with CUDA graphs and overlap or without, preempted or
from shared prefixes; nothing waits for the device in the loop, nothing compiles while serving."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from inlay import Engine, compile_model
from inlay.errors import OptionError
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.executor import Executor
from inlay.runtime.request import NewRequest
from inlay.runtime.sampling_params import SamplingParams
from tests.quantizable import build_quantizable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

OPTIONS: dict[str, Any] = {"max_seq_len": 256, "max_num_tokens": 64, "max_num_seqs": 8,
                           "block_size": 16}  # fmt: skip
LENGTHS = (1, 7, 40, 100, 33, 64, 2, 18, 90, 5)
MODELS = ("llama", "gemma2", "qwen3_moe", "gpt_oss")


def requests(**options: Any) -> list[NewRequest]:
    return [
        NewRequest(
            str(number),
            [(7 * number + 3 * i) % 120 for i in range(length)],
            SamplingParams(max_tokens=24, ignore_eos=True, **{"temperature": 0, **options}),
        )
        for number, length in enumerate(LENGTHS)
    ]


def run(engine: Engine, given: list[NewRequest] | None = None, **options: Any) -> Any:
    """Each request's tokens, and what the executor counted."""
    executor = Executor(engine.load_model(), ExecutorConfig(debug=True, **options))
    for request in given or requests():
        executor.add_request(request)
    tokens: dict[str, list[int]] = {}
    while executor.has_unfinished:
        for output in executor.step():
            assert output.error is None
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    stats = executor.get_stats()
    executor.shutdown()
    return tokens, stats


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def on_cpu(name: str) -> Any:
    return run(compile_model(build_quantizable(name), "eager", dtype="float32", **OPTIONS))[0]


@pytest.fixture(scope="module")
def compiled(name: str) -> Engine:
    return compile_model(
        build_quantizable(name), "inductor", device="cuda", dtype="float32", **OPTIONS
    )


def test_eager_gives_the_cpus_tokens(name: str, on_cpu: Any) -> None:
    engine = compile_model(
        build_quantizable(name), "eager", device="cuda", dtype="float32", **OPTIONS
    )
    assert run(engine)[0] == on_cpu


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_compiled_code_gives_the_cpus_tokens(
    compiled: Engine, on_cpu: Any, cuda_graphs: bool, overlap: bool
) -> None:
    found, stats = run(compiled, cuda_graphs=cuda_graphs, overlap=overlap)
    assert found == on_cpu
    assert bool(stats["num_graph_steps"]) is cuda_graphs


def test_preemption(compiled: Engine, on_cpu: Any) -> None:
    found, stats = run(compiled, kv_cache_tokens=320, scheduler_policy="max_utilization")
    assert found == on_cpu
    assert stats["num_preemptions"] > 0


def test_prefix_reuse(compiled: Engine) -> None:
    given = [
        NewRequest(str(i), [*range(80), i], SamplingParams(temperature=0, max_tokens=8))
        for i in range(6)
    ]
    plain, _ = run(compiled, given, enable_prefix_caching=False)
    reused, stats = run(compiled, given)
    assert reused == plain
    assert stats["num_cached_tokens"] > 0


def test_seeded_sampling_does_not_depend_on_graphs(compiled: Engine) -> None:
    given = requests(temperature=0.9, top_p=0.9, seed=3)
    assert run(compiled, given)[0] == run(compiled, given, cuda_graphs=False, overlap=False)[0]


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("waiting_is_an_error")
def test_the_loop_waits_for_nothing_but_results(compiled: Engine) -> None:
    """Results are waited for by an event, which this mode does not count."""
    executor = Executor(compiled.load_model(), ExecutorConfig(overlap=True))
    for request in requests(temperature=0.8, top_k=5, seed=1):
        executor.add_request(request)
    executor.step()
    torch.cuda.set_sync_debug_mode("error")
    count = 0
    while executor.has_unfinished:
        assert all(output.error is None for output in executor.step())
        count += 1
    assert count > 20


def test_nothing_is_compiled_while_serving(compiled: Engine) -> None:
    from inlay.backends.kernels.triton.compile_monitor import compilations

    executor = Executor(compiled.load_model(), ExecutorConfig())
    with compilations() as seen:
        for request in requests():
            executor.add_request(request)
        while executor.has_unfinished:
            executor.step()
    assert not seen


@pytest.mark.parametrize("quantization", ["fp8", "w8a8", "w8a16", "w4a16"])
def test_quantized_engines_pass_their_own_check(quantization: str) -> None:
    """A build compares itself with Hugging Face and the quantized graph."""
    model = build_quantizable("llama", torch.bfloat16)
    engine = compile_model(model, "inductor", device="cuda", quantization=quantization, **OPTIONS)
    assert all(len(tokens) == 24 for tokens in run(engine)[0].values())


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "int8"])
def test_narrow_caches(kv_cache_dtype: str) -> None:
    engine = compile_model(
        build_quantizable("llama"), "inductor", device="cuda", dtype="float32", **OPTIONS
    )
    on_cpu = compile_model(build_quantizable("llama"), "eager", dtype="float32", **OPTIONS)
    expected = run(on_cpu, kv_cache_dtype=kv_cache_dtype)[0]
    found = run(engine, kv_cache_dtype=kv_cache_dtype)[0]
    # A key on the other side of a tie changes a token now and then, and then all behind it.
    equal = sum(found[name] == tokens for name, tokens in expected.items())
    assert equal >= len(expected) - 2


def test_a_pool_that_finds_no_room_says_what_to_lower(compiled: Engine) -> None:
    with pytest.raises(OptionError, match=r"no room for the KV cache: CUDA out of memory.*lower"):
        Executor(compiled.load_model(), ExecutorConfig(kv_cache_tokens=1 << 36))
