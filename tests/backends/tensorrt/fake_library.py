"""A stand-in for `tensorrt` that has no more names than TensorRT 11's recorded API.

Plans are JSON that says which step of which artifact they are of; engines interpret its graph.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from inlay.backends.artifact import Artifact, WeightReader
from inlay.backends.eager.backend import interpret
from inlay.backends.graph_json import graph_from_json
from inlay.backends.program import SegmentStep
from inlay.backends.tensorrt.engines import plan_name
from inlay.backends.tensorrt.execution import DTYPES
from inlay.backends.tensorrt.library import Library

RECORDED = Path(__file__).with_name("tensorrt_11_api.txt")
DECODE_TOKENS, PREFILL_TOKENS = 4, 64
ARTIFACTS: dict[str, Artifact] = {}
"""Those that plans were written for, by path."""


def recorded_names() -> set[str]:
    lines = RECORDED.read_text().splitlines()
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}


class ILogger:
    ERROR = 1

    def __init__(self) -> None:
        """As the library's: subclasses must call it."""


class IRuntimeConfig:
    strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class IExecutionContext:
    """profiles_run: which profile each run was of, for tests."""

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._profile, self._scratch = engine, 0, 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, int] = {}
        self._results: list[torch.Tensor] = []

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile = profile
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        assert size >= self._engine.get_device_memory_size_for_profile_v2(self._profile)
        self._scratch = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        fits = all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        assert fits, f"{name} {shape} is not in profile {self._profile}: {least} to {most}"
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._places[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name == "o0":
            inputs = [
                at(self._places[n], self._shapes[n], dtype) for n, dtype in self._engine.inputs
            ]
            self._results = [
                r.contiguous() for r in self._engine.call([*self._engine.weights, *inputs])
            ]
        return tuple(self._results[int(name[1:])].shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert self._scratch, "no scratch memory"
        self._engine.runs.append(self._profile)
        for index, result in enumerate(self._results):
            at(self._places[f"o{index}"], tuple(result.shape), result.dtype).copy_(result)
        return True


def at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that lies at an address of this process."""
    count = torch.Size(shape).numel()
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)


class ICudaEngine:
    def __init__(self, plan: dict[str, Any]) -> None:
        artifact = ARTIFACTS[plan["artifact"]]
        step = artifact.program.steps[plan["step"]]
        assert isinstance(step, SegmentStep)
        graph = graph_from_json(artifact.json(f"segments/{step.segment}/graph.json"))
        nodes = [n for n in graph.graph.nodes if n.meta.get("kind") == "input"]
        self._specs = {node.name: node.meta["spec"] for node in nodes}
        self.inputs = [(name, spec[1]) for name, spec in self._specs.items()]
        self.call, reader = interpret(graph), WeightReader(artifact)
        self.weights = [reader.get(name) for name in step.weights]
        if plan["wrong"]:
            self.weights = [w * 1.1 if w.is_floating_point() else w for w in self.weights]
        self.runs: list[int] = []
        self._outputs = {f"o{i}": t.dtype for i, t in enumerate(self._example())}

    def _example(self) -> Any:
        shapes = [
            ([2 if isinstance(s, str) else s for s in shape], d)
            for shape, d in self._specs.values()
        ]
        return self.call([*self.weights, *(torch.zeros(s, dtype=d) for s, d in shapes)])

    @property
    def num_io_tensors(self) -> int:
        return len(self._specs) + len(self._outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*reversed(self._outputs), *self._specs][index]  # in no order of the model's

    def get_tensor_dtype(self, name: str) -> Any:
        dtype = self._outputs[name]
        return SimpleNamespace(name=next(word for word, one in DTYPES.items() if one == dtype))

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        most = (DECODE_TOKENS, PREFILL_TOKENS)[profile]
        return [
            tuple(size if isinstance(s, str) else s for s in self._specs[name][0])
            for size in (2, most, most)
        ]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 1000 + profile

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, config: IRuntimeConfig) -> IExecutionContext:
        assert config.strategy == "user managed"
        return IExecutionContext(self)


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> ICudaEngine | None:
        return ICudaEngine(json.loads(data)) if data.startswith(b"{") else None


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, name: str, least: Any, usual: Any, most: Any) -> None:
        assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
        self._shapes[name] = most


class IBuilderConfig:
    hardware_compatibility_level: Any = None
    profiling_verbosity: Any = None

    def __init__(self) -> None:
        self._profiles: list[IOptimizationProfile] = []
        self._cleared: list[str] = []

    def clear_flag(self, flag: str) -> None:
        self._cleared.append(flag)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1


class INetworkDefinition:
    num_layers = 3


class OnnxParser:
    num_errors = 0

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._loaded: dict[str, int] = {}

    def load_model_proto(self, model: bytes) -> bool:
        return True

    def load_initializer(self, name: str, address: int, size: int) -> bool:
        self._loaded[name] = size
        return True

    def parse_model_proto(self) -> bool:
        return True

    def get_error(self, index: int) -> Any:
        raise AssertionError("there are none")


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> INetworkDefinition:
        assert flags == 0
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: IBuilderConfig) -> Any:
        assert config._cleared == ["tf32"]
        return json.dumps(
            {
                "profiles": [profile._shapes for profile in config._profiles],
                "compatibility": config.hardware_compatibility_level,
            }
        ).encode()


CLASSES = (
    Builder, IBuilderConfig, ICudaEngine, IExecutionContext, ILogger, INetworkDefinition,
    IOptimizationProfile, IRuntimeConfig, OnnxParser, Runtime,
)  # fmt: skip
OWN = {"ICudaEngine": {"inputs", "call", "weights", "runs"}, "IRuntimeConfig": {"strategy"}}
"""What only the fake has, for itself."""


def fake_module() -> SimpleNamespace:
    return SimpleNamespace(
        __version__="11.4.0",
        BuilderFlag=SimpleNamespace(TF32="tf32"),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="ampere plus"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        **{cls.__name__: cls for cls in CLASSES},
    )


def fake_library() -> Library:
    return Library("tensorrt", fake_module())


def write_plans(artifact: Artifact, wrong: int | None = None) -> None:
    """Plans for the fake beside an opened artifact's graphs; that of one step computes wrongly."""
    ARTIFACTS[str(artifact.path)] = artifact
    for index, step in enumerate(artifact.program.steps):
        if isinstance(step, SegmentStep):
            plan = {"artifact": str(artifact.path), "step": index, "wrong": index == wrong}
            artifact.segment_file(step.segment, plan_name(index)).write_text(json.dumps(plan))
