"""ONNX and weights -> the plan of an engine. Needs no torch: worker processes stay small."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inlay.backends.tensorrt.library import AUTO, Library
from inlay.errors import BuildError

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""Input name -> its least, usual and largest shape."""


@dataclass(frozen=True)
class Plan:
    """A serialized engine, and what the builder said of it.

    layers: the engine's over all profiles, each with its name, type, the ONNX nodes that were fused
    into it, and the types of its inputs and constants. num_nodes: layers of the network before
    fusion. activation_bytes: scratch memory that it needs to run.
    """

    data: Any
    layers: list[dict[str, Any]]
    num_nodes: int
    activation_bytes: int
    seconds: float


@dataclass
class Log:
    """What the library says, by severity, kept."""

    errors: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def make_logger(library: Library, log: Log) -> Any:
    """An `ILogger` that keeps all it is told."""
    severity = library.module.ILogger

    class Logger(library.module.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            severity.__init__(self)

        def log(self, level: Any, message: str) -> None:
            (log.errors if level <= severity.ERROR else log.lines).append(message)

    return Logger()


class Weights:
    """Bytes of files, mapped, for as long as this lives."""

    def __init__(self) -> None:
        self._maps: dict[str, np.ndarray] = {}

    def bytes_at(self, file: str, begin: int, end: int, is_int4: bool = False) -> np.ndarray:
        """is_int4: of numbers that are stored as 0..15, where 8 stands for 0; INT4 is signed."""
        if file not in self._maps:
            self._maps[file] = np.memmap(file, dtype=np.uint8, mode="r")
        found = self._maps[file][begin:end]
        return found ^ np.uint8(0x88) if is_int4 else found


def parse(
    library: Library, logger: Any, builder: Any, model: bytes, weights: Mapping[str, np.ndarray]
) -> tuple[Any, Any, list[dict[str, str]]]:
    """Network, parser (whose life the network needs) and what the parser refuses, a node each.

    weights: bytes of the initializers that the model itself does not hold.
    """
    network = builder.create_network(0)
    parser = library.module.OnnxParser(network, logger)
    loaded = parser.load_model_proto(model)
    for name, data in weights.items():
        loaded = loaded and parser.load_initializer(name, data.ctypes.data, data.nbytes)
    if loaded and parser.parse_model_proto():
        return network, parser, []
    refusals = [_refusal(parser.get_error(index)) for index in range(parser.num_errors)]
    return network, parser, refusals or [{"node": "", "operator": "", "why": "no reason given"}]


def _refusal(error: Any) -> dict[str, str]:
    # The library also complains that there is no driver, which it needs for nothing here.
    lines = [line for line in error.desc().splitlines() if "Cuda Runtime" not in line]
    why = " ".join(lines).strip()
    return {"node": error.node_name(), "operator": error.node_operator(), "why": why}


def build_plan(
    library: Library,
    model: bytes,
    weights: Mapping[str, np.ndarray],
    profiles: Sequence[Profile],
    target: str,
) -> Plan:
    """Raises BuildError with the library's own words."""
    begin = time.perf_counter()
    log = Log()
    logger = make_logger(library, log)
    builder = library.module.Builder(logger)
    network, parser, refusals = parse(library, logger, builder, model, weights)
    if refusals:
        raise BuildError(
            "; ".join(f"{one['operator']} {one['node']}: {one['why']}" for one in refusals)
        )
    config = make_config(library, builder, profiles, target)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise BuildError("; ".join(log.errors) or "the builder gave no reason")
    del parser
    layers, activation_bytes = told_of(log.lines)
    return Plan(data, layers, network.num_layers, activation_bytes, time.perf_counter() - begin)


def make_config(library: Library, builder: Any, profiles: Sequence[Profile], target: str) -> Any:
    module = library.module
    config = builder.create_builder_config()
    # 10-bit mantissas in a float32 model would be a quantization that nobody asked for.
    config.clear_flag(module.BuilderFlag.TF32)
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (least, usual, largest) in shapes.items():
            profile.set_shape(name, least, usual, largest)
        config.add_optimization_profile(profile)
    if library.is_rtx:
        # An engine that would allocate while it runs could not be held by a CUDA graph.
        config.set_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if library.is_rtx and target != AUTO:
        config.num_compute_capabilities = 1
        config.set_compute_capability(library.compute_capability(target), 0)
    if not library.is_rtx and target == AUTO:
        levels = module.HardwareCompatibilityLevel
        config.hardware_compatibility_level = levels.AMPERE_PLUS
    return config


_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]*),")
_PARTS = re.compile(r"Inputs: \[(.*?)\], Constants: \[(.*?)\], Outputs: .* Metadata: (.*)$")
_TYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")


def told_of(lines: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """The engine's layers and its scratch memory, from the builder's log: the engine itself can
    be asked on a GPU only."""
    layers: list[dict[str, Any]] = []
    activation_bytes = 0
    for line in "\n".join(lines).splitlines():
        if match := _ACTIVATIONS.search(line):
            activation_bytes = max(activation_bytes, int(match[1]))
        elif match := _LAYER.match(line.removeprefix("Layers:").strip()):
            layers.append({"name": match["name"], "type": match["type"], **_parts(line)})
    return layers, activation_bytes


def _parts(line: str) -> dict[str, list[str]]:
    found = _PARTS.search(line)
    inputs, constants, nodes = found.groups() if found else ("", "", "")
    return {
        "nodes": _NODE.findall(nodes),
        "inputs": _TYPE.findall(inputs),
        "constants": _TYPE.findall(constants),
    }
