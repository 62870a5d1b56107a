"""The Triton attention kernels without a GPU: interpreted, compiled ahead of time, planned."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: the kernels cannot be compiled")

from inlay.backends import device_attention
from inlay.backends.device_attention import attention_for
from inlay.backends.gathered_attention import GatheredAttention
from inlay.backends.kernels.triton import paged_attention
from inlay.backends.kernels.triton.attention_configs import MAX_HEAD, shared_bytes, tiles_for
from inlay.backends.kernels.triton.attention_plan import Batch, plan_attention, unsupported
from inlay.backends.kernels.triton.cache_write import plan_write
from inlay.backends.kernels.triton.launch import Launch, Target, target_of
from inlay.backends.kernels.triton.paged_attention import TritonAttention
from inlay.backends.program import AttentionStep
from tests.kernels.triton_aot import compile_launch

ROOT = Path(__file__).parents[2]
BF16, FP8, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8
META = torch.device("meta")


def interpret(*options: str) -> None:
    """Those tests, in a process whose Triton interprets."""
    where = ROOT / "tests/kernels/interpreted_attention.py"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(where)]
    done = subprocess.run(
        [*command, *options],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_in_the_interpreter() -> None:
    interpret()


@pytest.mark.slow
def test_in_the_interpreter_at_length() -> None:
    interpret("-m", "slow")


def step_of(head: int, v_head: int, kv_heads: int, group: int, **options: Any) -> AttentionStep:
    return AttentionStep(
        layer=0, group=0, cache=0, query="q", key="k", value="v", output="o",
        num_heads=kv_heads * group, num_kv_heads=kv_heads, head_dim=head, v_head_dim=v_head,
        scale=0.1, **options,
    )  # fmt: skip


def plan(
    capability: int,
    head: int = 128,
    v_head: int | None = None,
    dtype: torch.dtype = BF16,
    kv: torch.dtype | None = None,
    tokens: int = 4096,
    requests: int = 4,
    group: int = 4,
    extras: bool = False,
    max_blocks: int = 256,
    **options: Any,
) -> dict[str, Launch]:
    """By the kernel's name, what a call of these shapes launches; on the meta device there is no
    number to ask for."""
    step = step_of(head, v_head or head, 8, group, **options)
    kv = kv or dtype
    cache = GatheredAttention(META).allocate(step, 100, 32, kv)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=META)

    ints = {"dtype": torch.int32}
    weights = empty(step.num_heads) if extras else None
    batch = Batch(
        step, empty(tokens, step.num_heads, head), cache, empty(requests, max_blocks, **ints),
        empty(requests, **ints), empty(requests + 1, **ints), weights,
        None if weights is None else weights.float(),
    )  # fmt: skip
    out = empty(tokens, step.num_heads, step.v_head_dim)
    k, v = empty(tokens, 8, head), empty(tokens, 8, step.v_head_dim)
    slots = empty(tokens, dtype=torch.int64)
    launches = [
        plan_write(k, v, cache, slots),
        *plan_attention(batch, out, Target(capability, 132)),
    ]
    return {launch.kernel.fn.__name__: launch for launch in launches}


ALL = {"softcap": 30.0, "window": 1024, "chunk": 8192, "extras": True}
COMPILED = [
    (90, {}),
    (90, {"kv": FP8}),
    (90, {"kv": INT8}),
    (90, ALL),
    (80, {}),
    (80, {"kv": FP8}),
    (100, {}),
]
COMPILED_AT_LENGTH = [
    *((capability, {"kv": INT8}) for capability in (80, 86, 100)),
    *((capability, {"kv": FP8}) for capability in (86, 100)),
    *((capability, {"head": head}) for capability in (80, 90) for head in (64, 80, 96, 256)),
    *((capability, {"head": 192, "v_head": 128}) for capability in (80, 90)),
    *((90, {"head": 256, "kv": kv}) for kv in (FP8, INT8)),
    *((90, {"head": head, "group": 1}) for head in (64, 128)),
    *((capability, {"head": 256, **ALL}) for capability in (80, 90)),
    *((capability, {"kv": FP8, **ALL}) for capability in (80, 90)),
    (80, ALL),
    (90, {"causal": False, "window": 512}),
    (90, {"dtype": torch.float16}),
    *((capability, {"dtype": torch.float32}) for capability in (80, 90)),
]


def spill_limit(capability: int, options: dict[str, Any]) -> int:
    """None, but where every option meets a wide head or a converted cache: a few values, put away
    before a loop and fetched in it; on Blackwell one or two in other kernels."""
    if "softcap" in options and ("kv" in options or options.get("head", 128) > 128):
        return 192
    return 8 if capability == 100 else 0


def assert_compiles(capability: int, options: dict[str, Any]) -> None:
    """Nothing is spilled, shared memory suffices, and products run on tensor cores: on Hopper those
    of prefill as warp-group ones (HGMMA), on Blackwell as UTCHMMA."""
    launches = plan(capability, **options)
    assert set(launches) == {"write_kernel", "decode_kernel", "combine_kernel", "prefill_kernel"}
    wide = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[capability]
    for name, launch in launches.items():
        compiled = compile_launch(launch, capability)
        assert compiled.spills <= spill_limit(capability, options), (name, compiled.spills)
        assert compiled.shared <= shared_bytes(capability), name
        if options.get("dtype") == torch.float32:
            assert "HMMA" not in compiled.tensor_cores, f"{name}: TF32 in place of float32"
        elif name in ("decode_kernel", "prefill_kernel"):
            expected = wide if name == "prefill_kernel" else "HMMA"
            assert expected in compiled.tensor_cores, (name, compiled.tensor_cores)
            # Three programs of decode fit a multiprocessor: some load while another computes.
            is_light = name == "decode_kernel" and options.get("head", 128) == 128
            assert compiled.registers <= (168 if is_light else 255), (name, compiled.registers)
        else:
            assert compiled.registers <= 64, name


@pytest.mark.parametrize(("capability", "options"), COMPILED, ids=str)
def test_compiled_ahead_of_time(capability: int, options: dict[str, Any]) -> None:
    assert_compiles(capability, options)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "options"), COMPILED_AT_LENGTH, ids=str)
def test_compiled_ahead_of_time_at_length(capability: int, options: dict[str, Any]) -> None:
    assert_compiles(capability, options)


def test_which_kernels_run() -> None:
    """One kernel where tokens may each be a decode; splits only where programs are few."""
    assert set(plan(90, tokens=2, requests=1)) == {
        "write_kernel", "decode_kernel", "combine_kernel",
    }  # fmt: skip
    many = plan(90, tokens=256, requests=256)
    assert set(many) == {"write_kernel", "decode_kernel"}
    assert not many["decode_kernel"].args["SPLIT"]
    assert "prefill_kernel" in plan(90, tokens=257, requests=256)
    short = plan(90, tokens=2, requests=1, max_blocks=4)["decode_kernel"]
    assert short.args["num_splits"] == 2  # 128 tokens are two tiles
    window = plan(90, tokens=2, requests=1, window=100)["decode_kernel"]
    assert window.args["num_splits"] == 3  # 164 keys at most
    lone = plan(90, tokens=2, requests=1)["decode_kernel"]
    assert lone.grid == (2, 8, 66)  # 16 programs without splits, 8 wanted on each of 132


def test_the_grid_has_a_program_for_every_tile() -> None:
    """Requests of any lengths: each one's tiles lie before the next one's programs."""
    block, group = tiles_for("prefill", 90, 16, 128).block_m, 4
    for _ in range(200):
        lengths = torch.randint(0, 90, (int(torch.randint(1, 9, ())),))
        starts = [0, *lengths.cumsum(0).tolist()]
        firsts = [start * group // block + b for b, start in enumerate(starts)]
        tiles = [-(-int(n) * group // block) for n in lengths]
        for b, count in enumerate(tiles):
            assert firsts[b] + count <= firsts[b + 1]
        launch = plan(90, tokens=max(starts[-1], 3), requests=len(lengths)).get("prefill_kernel")
        if launch is not None:
            assert launch.grid[0] > firsts[-1]


def test_every_head_size_has_tiles() -> None:
    for kind in ("prefill", "decode"):
        for capability in (80, 86, 89, 90, 100, 120):
            for bits in (8, 16, 32):
                for head in (16, 32, 64, 128, 256, MAX_HEAD):
                    tiles = tiles_for(kind, capability, bits, head)
                    assert tiles.block_n % tiles.masked_n == 0


@pytest.mark.parametrize(
    ("step", "dtype", "capability", "said"),
    [
        (step_of(64, 64, 1, 1), BF16, 75, "compute capability 7.5 is below 8.0"),
        (step_of(64, 64, 1, 1), torch.float64, 90, "float64 has no kernel"),
        (step_of(576, 512, 1, 1), BF16, 90, "heads of 576 and 512 are larger than 512"),
    ],
)
def test_what_the_kernels_do_not_serve(
    step: AttentionStep, dtype: torch.dtype, capability: int, said: str
) -> None:
    assert unsupported(step, dtype, dtype, Target(capability, 132)) == said


def test_the_rest_is_gathered_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    step, cpu = step_of(16, 16, 1, 2), torch.device("cpu")
    op = TritonAttention(cpu, Target(75, 40))
    cache = op.allocate(step, 2, 16, torch.float32)
    one = torch.ones(1, dtype=torch.int32)
    q, k = torch.randn(1, 2, 16), torch.randn(1, 1, 16)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out = op(
                step, q, k, k, cache, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1).int(),
                one, torch.tensor([0, 1], dtype=torch.int32), None, None,
            )  # fmt: skip
    assert torch.equal(out, k.expand(1, 2, 16))
    assert [record.getMessage() for record in caplog.records] == [
        "layer 0: attention as plain tensor operations, slow: compute capability 7.5 is below 8.0"
    ]


def test_which_attention_a_device_gets(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(attention_for(torch.device("cpu")), GatheredAttention)
    monkeypatch.setattr(paged_attention, "target_of", lambda device: Target(90, 132))
    gpu = torch.device("cuda", 0)
    assert isinstance(attention_for(gpu), TritonAttention)
    for name in list(sys.modules):
        if name.startswith("inlay.backends.kernels.triton.") or name == "triton":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with caplog.at_level(logging.WARNING, logger=device_attention.__name__):
        assert isinstance(attention_for(gpu), GatheredAttention)
    assert "triton is not installed" in caplog.text


def test_the_interpreters_device() -> None:
    assert target_of(torch.device("cpu")) == Target(90, 132)
