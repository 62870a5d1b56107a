"""Backends on a small llama: the same requests through the runtime, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from inlay import LLM, SamplingParams, compile_model
from inlay.backends.select import BACKENDS
from inlay.errors import BuildError
from tests.toys import build_toy


@pytest.fixture(scope="module", params=list(BACKENDS))
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Every backend that can be built for here; the others are skipped with what they lack."""
    try:
        engine = compile_model(build_toy("llama"), request.param, verify="capture")
    except (BuildError, ImportError) as error:
        pytest.skip(f"{request.param}: {error}")
    with LLM(engine, in_process=True, enable_prefix_caching=False) as made:
        yield made


@pytest.mark.parametrize(
    ("num_requests", "num_input", "num_output"), [(1, 8, 16), (16, 8, 16), (1, 200, 1)], ids=str
)
def bench_generate(
    benchmark: Any, llm: LLM, num_requests: int, num_input: int, num_output: int
) -> None:
    benchmark.group = f"{num_requests} requests of {num_input} tokens, {num_output} new ones each"
    prompts = [[1 + (i + j) % 100 for j in range(num_input)] for i in range(num_requests)]
    params = SamplingParams(max_tokens=num_output, temperature=0, ignore_eos=True)
    outputs = benchmark(llm.generate, prompts, params, use_tqdm=False)
    assert all(output.error is None for output in outputs)
