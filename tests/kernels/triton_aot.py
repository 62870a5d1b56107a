"""Compile a kernel launch for a GPU that is not here, and look at the machine code.

`compile_launch(launch, 90)` takes what `plan` gave for tensors on any device, "meta" too, and
returns what ptxas reports: registers, spills, shared memory, and which tensor-core instructions the
code has. sm_80 has HMMA and IMMA; sm_90 also HGMMA, QGMMA and IGMMA (warp groups); sm_100's are
UTC...MMA. ptxas and the disassembler come with Triton.
"""

from __future__ import annotations

import collections
import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TENSOR_CORES = r"\b(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)\b"
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes that one program can have; Triton refuses more only where it launches."""

_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Code:
    """tensor_cores: instruction -> how often it stands in the code. spills: bytes stored."""

    registers: int
    spills: int
    shared: int
    tensor_cores: dict[str, int]
    sass: str


def compile_launch(launch: Any, capability: int) -> Code:
    """launch: of `backends/kernels/triton`, see its Launch. capability: 80, 86, 90, 100."""
    kernel = launch.kernel
    signature, constants, attrs = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, launch.args[parameter.name]
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[name], constants[(place,)] = "constexpr", value
            continue
        signature[name] = _type(value)
        aligned = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
        loose = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if aligned and not loose:
            attrs[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _look_at(compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared)


def check_code(code: Code, capability: int, *tensor_cores: str) -> None:
    """No spills, shared memory that exists, and each of these instructions (patterns)."""
    assert code.spills == 0, f"{code.spills} bytes spilled at {code.registers} registers"
    assert code.shared <= SHARED_MEMORY[capability], f"{code.shared} bytes of shared memory"
    for pattern in tensor_cores:
        found = [name for name in code.tensor_cores if re.fullmatch(pattern, name)]
        assert found, f"no {pattern} among {code.tensor_cores}"


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _look_at(ptx: str, cubin: bytes, shared: int) -> Code:
    (arch,) = re.findall(r"\.target\s+(\w+)", ptx)
    with tempfile.TemporaryDirectory() as directory:
        binary, text = Path(directory, "kernel.cubin"), Path(directory, "kernel.ptx")
        binary.write_bytes(cubin)
        text.write_text(ptx)
        command = [_ptxas(arch), "-v", f"--gpu-name={arch}", str(text), "-o", f"{binary}.again"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run(
            [TOOLS / "nvdisasm", "-c", str(binary)], capture_output=True, text=True, check=True
        ).stdout
    registers = max(int(count) for count in re.findall(r"Used (\d+) registers", said))
    spills = sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", said))
    found = collections.Counter(re.findall(TENSOR_CORES, sass))
    return Code(registers, spills, shared, dict(found), sass)


@functools.cache
def _ptxas(arch: str) -> str:
    """Blackwell has its own in Triton's wheel."""
    newer = TOOLS / "ptxas-blackwell"
    return str(newer if "_1" in arch and newer.exists() else TOOLS / "ptxas")
