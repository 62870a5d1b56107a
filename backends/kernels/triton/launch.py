"""One kernel launch as a value: what runs on a GPU is what tests compile ahead of time."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from triton import knobs


class Target(NamedTuple):
    """The GPU that a launch is planned for: compute capability (90 for 9.0) and multiprocessors."""

    capability: int
    num_sms: int


@dataclass(frozen=True)
class Launch:
    """args: every argument of the kernel by name, constexprs and None too, and maybe others."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        args = {name: self.args[name] for name in self.kernel.arg_names}
        self.kernel[self.grid](**args, num_warps=self.num_warps, num_stages=self.num_stages)


@functools.cache
def target_of(device: torch.device) -> Target:
    """A CUDA device's; what the interpreter on a CPU pretends to be."""
    if device.type != "cuda":
        return Target(90, 132)
    properties = torch.cuda.get_device_properties(device)
    return Target(properties.major * 10 + properties.minor, properties.multi_processor_count)


def is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, whose products of bfloat16 are wrong."""
    return bool(knobs.runtime.interpret)


def next_power_of_2(value: int) -> int:
    return 1 << (value - 1).bit_length()
