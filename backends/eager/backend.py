"""The eager reference: the graph as it is, the reference ops, no compiler. The truth for others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter

import inlay.passes.ops  # noqa: F401  (defines torch.ops.inlay)
from inlay.backends.artifact import Artifact, WeightReader
from inlay.backends.base import Backend, BackendOptions, BuildSettings, Known, ModelLimits
from inlay.backends.device import AUTO, CPU, choose_device, load_weights
from inlay.backends.device_attention import attention_for
from inlay.backends.graph_json import graph_from_json
from inlay.backends.kv_caches import LayerCache
from inlay.backends.model import AttentionOp, ProgramModel, SegmentCall
from inlay.backends.program import AttentionStep, Program
from inlay.errors import ArtifactError, BuildError, OptionError
from inlay.passes.kv_formats import make_scales


class ReferenceAttention:
    """`inlay::paged_attention` over caches [blocks, Hk, block_size, D] of any dtype."""

    def allocate(
        self, step: AttentionStep, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> LayerCache:
        shape = (num_blocks, step.num_kv_heads, block_size)
        return LayerCache(
            torch.empty(*shape, step.head_dim, dtype=dtype),
            torch.empty(*shape, step.v_head_dim, dtype=dtype),
            make_scales(dtype, *shape),
            make_scales(dtype, *shape),
        )

    def __call__(
        self,
        step: AttentionStep,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: LayerCache,
        slot_mapping: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        sinks: torch.Tensor | None,
        slopes: torch.Tensor | None,
    ) -> torch.Tensor:
        return torch.ops.inlay.paged_attention(
            q, k, v, cache.k, cache.v, slot_mapping, block_table, seq_lens, query_start_loc,
            step.layer, step.scale, step.window, step.softcap, sinks, step.causal,
            step.chunk, slopes, cache.k_scales, cache.v_scales,
        )  # fmt: skip


def interpret(gm: GraphModule) -> SegmentCall:
    """A callable that runs a segment's graph op by op."""
    interpreter = Interpreter(gm)

    def call(args: list[torch.Tensor]) -> Any:
        return interpreter.run(*args)

    return call


class EagerBackend(Backend):
    name = "eager"

    def check_early(self, known: Known) -> None:
        """Raises BuildError where there is no device as was asked for."""
        choose_device(known.device, CPU)

    def prepare(self, options: BackendOptions) -> None:
        """Nothing is needed."""

    def check(
        self, program: Program, segments: Mapping[str, GraphModule], settings: BuildSettings
    ) -> None:
        """Anything that was captured can be interpreted."""

    def build(
        self,
        program: Program,
        segments: Mapping[str, GraphModule],
        directory: Path,
        settings: BuildSettings,
    ) -> dict[str, Any]:
        """Nothing to compile: the artifact's own graphs are what runs."""
        return {}

    def load(self, artifact: Artifact) -> ProgramModel:
        """On a CPU weights stay memory-mapped, and nothing is copied. On a GPU the same graph runs
        op by op, with attention and narrow products by our kernels."""
        program, device = artifact.program, _device_of(artifact)
        attention: AttentionOp = ReferenceAttention()
        if device.type != CPU:
            from inlay.backends.kernels.triton.register import register_cuda_kernels

            register_cuda_kernels()
            attention = attention_for(device)
        weights, attention_weights = load_weights(program, WeightReader(artifact), device)
        graphs = {
            key: graph_from_json(artifact.json(f"segments/{key}/graph.json"))
            for key in program.segment_keys
        }
        return ProgramModel(
            program,
            ModelLimits(**artifact.manifest["limits"]),
            {key: interpret(gm) for key, gm in graphs.items()},
            weights,
            attention_weights,
            attention,
            device,
            refuse_batch_invariance,
        )


def _device_of(artifact: Artifact) -> torch.device:
    """What it was built for; graphs of other backends' artifacts run on the CPU."""
    built = artifact.manifest
    asked = built["options"].get("device", AUTO) if built["backend"] == "eager" else CPU
    try:
        return choose_device(asked, CPU)
    except BuildError as error:
        raise ArtifactError(
            f"artifact {artifact.path} was built for device {asked!r}: {error}"
        ) from error


def refuse_batch_invariance() -> None:
    """Library calls on whatever rows there are: their sums depend on how many."""
    raise OptionError(
        "batch_invariant=True is not possible with backend 'eager', whose sums depend on how many "
        "tokens a step and a chunk have; build the engine with backend='inductor', or leave it out"
    )
