"""Prints which Triton kernels Inductor makes of our pointwise ops, or of a whole segment, for an
H200 that is not here.

Run as a script, since it makes the process believe that it has a GPU: one JSON line,
{name: [number of kernels, number of launches]}, for the given setting of split_reductions (0, 1)
and the names that follow it (none: all), which may also be files with a segment's graph.
A graph is exported on the CPU, its tensors are replaced by fake CUDA ones, and compilation stops
once the code is written.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch
import torch._dynamo.device_interface as device_interface
import triton
from torch._inductor import compile_fx, config, graph
from torch._inductor.decomposition import select_decomp_table
from triton.backends.compiler import GPUTarget

from inlay.backends.graph_json import graph_from_json
from inlay.backends.inductor.compile import _Dispatched
from inlay.backends.segment_arguments import example_arguments
from inlay.passes import ops, quantized_ops

H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    warp_size=32,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=60 << 20,
    total_memory=141 << 30,
    gcnArchName="",
)


class Pretended(device_interface.DeviceInterface):
    """CUDA's interface, of one H200."""

    class Worker:
        set_device = staticmethod(lambda device: None)
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: H200)

    current_device = staticmethod(lambda: 0)
    set_device = staticmethod(lambda device: None)
    device_count = staticmethod(lambda: 1)
    is_available = staticmethod(lambda: True)
    get_device_properties = staticmethod(lambda device=None: H200)
    get_compute_capability = staticmethod(lambda device=None: 90)
    get_raw_stream = staticmethod(lambda index: 0)
    synchronize = staticmethod(lambda device=None: None)
    exchange_device = staticmethod(lambda device: 0)
    maybe_exchange_device = staticmethod(lambda device: 0)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)
    memory_allocated = staticmethod(lambda device=None: 0)


class Written(BaseException):
    """Ends a compilation: here is the code. Inductor would wrap an Exception."""


class OnCuda(torch.fx.Interpreter):
    """Notes each value's fake tensor."""

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = value
        return value


class Module(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


def dynamic_tokens(arguments: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """The first dimension where it is 77."""
    tokens = torch.export.Dim("tokens", min=2, max=8192)
    return tuple({0: tokens} if len(one) == 77 else None for one in arguments)


def generate(
    module: torch.nn.Module, arguments: Sequence[torch.Tensor], dynamic: Sequence[Any]
) -> str:
    """Inductor's code."""
    program = torch.export.export(
        module,
        tuple(arguments),
        dynamic_shapes=(tuple(dynamic),),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    gm = program.run_decompositions(select_decomp_table()).graph_module
    for node in list(gm.graph.nodes):
        if "_assert_tensor_metadata" in str(node.target):
            gm.graph.erase_node(node)
        elif "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda")}
    values = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    with values[0].fake_mode, torch.no_grad():
        fakes = [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
            for value in values
        ]
        OnCuda(gm).run(*fakes)

    def stop(self: Any) -> None:
        code = self.codegen_with_cpp_wrapper() if self.cpp_wrapper else self.codegen()
        raise Written(getattr(code[0], "value", code[0]))

    with (
        torch.no_grad(),
        mock.patch.object(graph.GraphLowering, "compile_to_module", stop),
        mock.patch("torch.cuda.get_device_properties", return_value=H200),
        mock.patch("torch.cuda.current_device", return_value=0),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        config.patch(fx_graph_cache=False, split_reductions=sys.argv[1] == "1"),
    ):
        try:
            compile_fx.compile_fx_inner(gm, fakes)
        except Written as written:
            return str(written)
    raise AssertionError("Inductor wrote no code")


def pretend() -> None:
    device_interface.get_interface_for_device("cpu")
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, Pretended)
    driver: Any = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_device_interface=lambda: Pretended,
        is_active=lambda: True,
        get_device_capability=lambda device=0: (9, 0),
        utils=SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": 232448,
                "multiprocessor_count": 132,
            }
        ),
    )
    triton.runtime.driver.set_active(driver)


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def cases() -> dict[str, tuple[Any, ...]]:
    """An 8B Llama's sizes."""
    x, weight, wide = bf16(77, 4096), bf16(4096), bf16(77, 28672)

    def gate(gate_up: torch.Tensor) -> torch.Tensor:
        return ops.gated(gate_up[:, :14336], gate_up[:, 14336:], "silu")

    def added(quantize: Any) -> Any:
        def layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
            normed, total = ops.add_rms_norm(x, residual, weight, 1e-6)
            return quantize(normed), total

        return layer

    def rope(interleaved: bool) -> Any:
        return lambda q, cos, sin: ops.rope(q, cos[:, None], sin[:, None], interleaved)

    angles = bf16(77, 64), bf16(77, 64)
    table = torch.zeros(32000, 4096, dtype=torch.int8), torch.zeros(1, 32000)
    scale = torch.ones(1)
    return {
        "add_norm": (added(lambda x: x), x, x, weight),
        "add_norm_int8": (added(quantized_ops.quantize_int8), x, x, weight),
        "add_norm_int8_asymmetric": (added(quantized_ops.quantize_int8_asymmetric), x, x, weight),
        "add_norm_fp8": (added(quantized_ops.quantize_fp8), x, x, weight),
        "add_norm_fp8_groups": (added(lambda x: quantized_ops.quantize_fp8(x, 128)), x, x, weight),
        "norm_static": (
            lambda x, w, s: quantized_ops.quantize_static(ops.rms_norm(x, w, 1e-6), s, None, "fp8"),
            *(x, weight, scale),
        ),
        "gated": (gate, wide),
        "gated_int8": (lambda gate_up: quantized_ops.quantize_int8(gate(gate_up)), wide),
        "gated_fp8": (lambda gate_up: quantized_ops.quantize_fp8(gate(gate_up)), wide),
        "quantize_int8": (quantized_ops.quantize_int8, x),
        "rope": (rope(False), bf16(77, 32, 128), *angles),
        "rope_interleaved": (rope(True), bf16(77, 32, 128), *angles),
        "embedding": (
            lambda ids, w, s: quantized_ops.quantized_embedding(ids, w, s, torch.bfloat16),
            *(torch.zeros(77, dtype=torch.int64), *table),
        ),
    }


if __name__ == "__main__":
    pretend()
    found = {}
    known = cases()
    for name in sys.argv[2:] or known:
        if name in known:
            function, *arguments = known[name]
            code = generate(Module(function), arguments, dynamic_tokens(arguments))
        else:
            gm = graph_from_json(json.loads(Path(name).read_text()))
            code = generate(_Dispatched(gm), *example_arguments(gm))
        found[name] = [code.count("@triton.jit"), len(re.findall(r"\.run\(", code))]
    print(json.dumps(found))
