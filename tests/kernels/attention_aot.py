"""Launches compiled ahead of time, for GPUs that need not be here: what ptxas says of them."""

from __future__ import annotations

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

from inlay.backends.kernels.triton.launch import Launch

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    """registers: of each thread; spills: bytes of its stack, where it keeps what they do not hold;
    shared: bytes of a program; sass: how often each machine instruction occurs."""

    registers: int
    spills: int
    shared: int
    sass: dict[str, int]

    def count(self, prefix: str) -> int:
        return sum(n for name, n in self.sass.items() if name.startswith(prefix))


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """What the launcher's first call would compile on such a device, pointers aligned."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.args[parameter.name]
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name] = _type_of(value)
        aligned = torch.is_tensor(value) or (type(value) is int and value % 16 == 0)
        loose = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if aligned and not loose:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    return _read(compiled)


def _type_of(value: Any) -> str:
    if torch.is_tensor(value):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"


def _read(compiled: Any) -> Compiled:
    """From the tables and the code of the cubin that a driver would load."""
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", cubin)
        code = _run("nvdisasm", cubin)
    sass: dict[str, int] = {}
    for name in re.findall(
        r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.M
    ):
        sass[name] = sass.get(name, 0) + 1
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    return Compiled(registers, stack, compiled.metadata.shared, sass)


def _run(tool: str, *arguments: object) -> str:
    command = [str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
