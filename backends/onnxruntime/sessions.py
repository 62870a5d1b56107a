"""ONNX Runtime's sessions as segments: one for each segment step, over its weights.

In an executor's process all of them share one pool of threads and one arena for intermediate
values; elsewhere each has its own, so that a user's sessions are not touched. What a segment takes
and gives is bound where it lies, in torch's memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from inlay.backends.base import PROCESS
from inlay.backends.onnx.packages import require
from inlay.errors import ArtifactError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
EXTRAS = {CPU: "onnxruntime", CUDA: "onnxruntime-gpu"}
DTYPES = {
    "tensor(float)": (1, torch.float32),
    "tensor(float16)": (10, torch.float16),
    "tensor(bfloat16)": (16, torch.bfloat16),
    "tensor(int64)": (7, torch.int64),
    "tensor(int32)": (6, torch.int32),
    "tensor(int8)": (3, torch.int8),
    "tensor(uint8)": (2, torch.uint8),
    "tensor(bool)": (9, torch.bool),
}
"""ONNX Runtime's name of a type -> ONNX's number, torch's dtype."""

_NUMPY_LACKS = {torch.bfloat16: (16, torch.uint16), torch.float8_e4m3fn: (17, torch.uint8)}


def offered_providers(error: type[Exception]) -> list[str]:
    """What the onnxruntime that is installed offers and this machine can use; the best first."""
    (ort,) = require("onnxruntime", extra="onnxruntime", error=error)
    usable = {CPU: True, CUDA: torch.cuda.is_available()}
    offered = ort.get_available_providers()
    return [name for name in (CUDA, CPU) if name in offered and usable[name]]


class SegmentSession:
    """A segment with its weights: inputs -> outputs, on one device."""

    def __init__(
        self,
        model: bytes,
        weights: Mapping[str, torch.Tensor],
        provider: str,
        device: torch.device,
        entries: Mapping[str, str] | None = None,
    ) -> None:
        """weights: by their names in the model. ONNX Runtime takes a copy of each, packed where
        products read it: they may be a mapped file's, and let go of afterwards. entries: more of
        its settings."""
        import onnxruntime as ort

        self._device, self._index = device.type, device.index or 0
        options = _options(ort)
        for name, value in (entries or {}).items():
            options.add_session_config_entry(name, value)
        names = list(weights)
        options.add_external_initializers(names, [_ort_value(ort, weights[n]) for n in names])
        choice: Any = (provider, {"device_id": self._index}) if provider == CUDA else provider
        self._session = ort.InferenceSession(model, options, providers=[choice])
        self._inputs = [(v.name, *DTYPES[v.type]) for v in self._session.get_inputs()]
        self._shapes = [v.shape for v in self._session.get_inputs()]
        self._outputs = [(v.name, *DTYPES[v.type], v.shape) for v in self._session.get_outputs()]

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs are new tensors."""
        binding = self._session.io_binding()
        sizes: dict[str, int] = {}
        kept = [value.contiguous() for value in inputs]
        for (name, number, dtype), shape, value in zip(
            self._inputs, self._shapes, kept, strict=True
        ):
            assert value.dtype == dtype, f"{name} is {value.dtype}, the segment takes {dtype}"
            sizes.update(zip(shape, value.shape, strict=True))
            self._bind(binding.bind_input, name, number, value)
        outputs = []
        for name, number, dtype, shape in self._outputs:
            extents = [sizes[size] if isinstance(size, str) else size for size in shape]
            outputs.append(torch.empty(extents, dtype=dtype, device=self._device))
            self._bind(binding.bind_output, name, number, outputs[-1])
        if self._device == "cuda":
            torch.cuda.current_stream().synchronize()  # the session has a stream of its own
        self._session.run_with_iobinding(binding)
        return outputs

    def _bind(self, bind: Callable[..., None], name: str, number: int, value: torch.Tensor) -> None:
        bind(name, self._device, self._index, number, tuple(value.shape), value.data_ptr())


def unresolved_outputs(model: Any) -> list[str]:
    """Outputs whose shapes say something else than numbers and letters of the inputs' shapes."""
    letters = {dim.dim_param for value in model.graph.input for dim in _dims(value)}
    return [
        value.name
        for value in model.graph.output
        if any(
            not dim.HasField("dim_value") and dim.dim_param not in letters for dim in _dims(value)
        )
    ]


def _dims(value: Any) -> Sequence[Any]:
    return value.type.tensor_type.shape.dim


def _options(ort: Any) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors: what is unusual about a graph is no user's matter
    if PROCESS.is_executor:
        _share_pool(ort)
        options.use_per_session_threads = False
        options.add_session_config_entry("session.use_env_allocators", "1")
    else:
        options.intra_op_num_threads = torch.get_num_threads()
    # Idle threads would spin on the cores that attention needs next, which are torch's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


@functools.cache
def _share_pool(ort: Any) -> None:
    """One pool of threads for the process, of as many as torch has, and one arena. From then on
    every session of the process must use the pool: a user's own would be refused."""
    ort.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(memory, None)


def _ort_value(ort: Any, tensor: torch.Tensor) -> Any:
    """The same memory."""
    if tensor.dtype in _NUMPY_LACKS:
        number, same_size = _NUMPY_LACKS[tensor.dtype]
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            tensor.view(same_size).numpy(), number
        )
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())


def check_version(built: str) -> None:
    """Raises ArtifactError where the onnxruntime here is older than the one that was built with."""
    (ort,) = require("onnxruntime", extra="onnxruntime", error=ArtifactError)
    if _numbers(ort.__version__) < _numbers(built):
        raise ArtifactError(
            f"the artifact was built with onnxruntime {built}, here is {ort.__version__}, which "
            f"may lack what it needs; run `pip install 'onnxruntime>={built}'`"
        )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2]]
