"""Engines as segments: contexts, their memory, and a call.

Each engine has two optimization profiles, for decode and for prefill, and a context for each, so
that nothing is switched between steps. All contexts work in one scratch buffer, since engines run
one after the other on one stream. A call allocates its outputs in torch's pool: within a CUDA
graph these are addresses that stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from inlay.backends.tensorrt import kept
from inlay.backends.tensorrt.library import Library
from inlay.backends.tensorrt.network import Log, make_logger
from inlay.errors import ArtifactError

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
"""The library's names of types that go in and out of engines."""

DECODE, PREFILL = 0, 1
"""Optimization profiles, as `backend.profiles` makes them."""

ALIGNMENT = 256
"""Of scratch memory, as the library asks."""


class Session:
    """What all engines of a model share: the runtime, the scratch buffer, compiled kernels.

    device: a CUDA device; tests give another, and a library that runs on it.
    """

    def __init__(self, library: Library, device: torch.device, kernels: Path) -> None:
        self.library, self.device = library, device
        self.log = Log()
        self._logger = make_logger(library, self.log)
        self._runtime = library.module.Runtime(self._logger)
        self._kernels = kernels
        self._cache: Any = None
        self._engines: list[Any] = []
        self._contexts: list[Any] = []
        self._scratch = torch.empty(0, dtype=torch.uint8, device=device)

    def load(self, plan: Path, inputs: Sequence[str]) -> EngineCall:
        """Raises ArtifactError where the runtime refuses the plan, with its reason."""
        data = plan.read_bytes()
        if self.library.is_rtx:
            validity, reasons = self._runtime.get_engine_validity(data)
            if validity == self.library.module.EngineValidity.INVALID:
                raise ArtifactError(
                    f"{self.library.name} {self.library.version} does not accept {plan} on "
                    f"{_name(self.device)} (diagnostics {reasons}): {'; '.join(self.log.errors)}"
                )
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise ArtifactError(f"{plan} cannot be loaded: {'; '.join(self.log.errors)}")
        self._engines.append(engine)  # contexts need it alive
        contexts = [self._context(engine, profile) for profile in (DECODE, PREFILL)]
        return EngineCall(engine, contexts, inputs, self.device)

    def _context(self, engine: Any, profile: int) -> Any:
        module = self.library.module
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            module.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self.library.is_rtx:
            # Decode steps are captured: the kernels must be the final ones by then. Prefill has as
            # many sizes as prompts: a kernel for any size runs until a better one is made.
            strategies = module.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = (
                strategies.EAGER if profile == DECODE else strategies.LAZY
            )
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                if (kernels := kept.read(self._kernels)) is not None:
                    self._cache.deserialize(kernels)  # False: starts empty
            config.set_runtime_cache(self._cache)
        context = engine.create_execution_context(config)
        if context is None or not context.set_optimization_profile_async(
            profile, stream_of(self.device)
        ):
            raise ArtifactError(f"no context for an engine: {'; '.join(self.log.errors)}")
        self._contexts.append(context)
        return context

    def share_scratch(self) -> None:
        """Once all engines are loaded: one buffer, as large as the largest of them needs."""
        sizes = [
            engine.get_device_memory_size_for_profile_v2(profile)
            for engine in self._engines
            for profile in (DECODE, PREFILL)
        ]
        size = max(sizes, default=0)
        self._scratch = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=self.device)
        address = -(-self._scratch.data_ptr() // ALIGNMENT) * ALIGNMENT
        for context in self._contexts:
            context.set_device_memory(address, size)

    def keep_kernels(self) -> None:
        """Write what was compiled for this device into the user's cache."""
        if self._cache is not None:
            kept.write(self._kernels, bytes(self._cache.serialize()))


class EngineCall:
    """A segment step's engine: inputs to outputs, in the segment's own order."""

    def __init__(
        self, engine: Any, contexts: Sequence[Any], inputs: Sequence[str], device: torch.device
    ) -> None:
        """inputs: names of the segment's inputs, of which an engine may need fewer."""
        self._contexts, self._device = contexts, device
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._inputs = [(index, name) for index, name in enumerate(inputs) if name in names]
        produced = sorted((n for n in names if n not in inputs), key=lambda n: int(n[1:]))
        self._outputs = [(n, DTYPES[engine.get_tensor_dtype(n).name]) for n in produced]
        self._largest = {
            name: engine.get_tensor_profile_shape(name, DECODE)[2] for _, name in self._inputs
        }

    def __call__(self, args: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        fits_decode = all(
            size <= most
            for index, name in self._inputs
            for size, most in zip(args[index].shape, self._largest[name], strict=True)
        )
        context = self._contexts[DECODE if fits_decode else PREFILL]
        for index, name in self._inputs:
            assert args[index].is_contiguous(), f"{name} of an engine has gaps"
            context.set_input_shape(name, tuple(args[index].shape))
            context.set_tensor_address(name, args[index].data_ptr())
        outputs = []
        for name, dtype in self._outputs:
            shape = tuple(context.get_tensor_shape(name))
            outputs.append(torch.empty(shape, dtype=dtype, device=self._device))
            context.set_tensor_address(name, outputs[-1].data_ptr())
        done = context.execute_async_v3(stream_of(self._device))
        assert done, "an engine did not run; the library's log says why"
        return outputs


def stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
