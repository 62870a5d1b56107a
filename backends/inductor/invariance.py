"""What `batch_invariant=True` asks of this backend: bits that do not depend on the batch.

Most of it is so anyway. Attention goes through a request's keys in tiles that begin at fixed
positions, whatever the chunk, the batch or the thread; compiled pointwise code and norms treat each
token alike; the runtime never gives a matrix product one row, for which oneDNN sums in an order of
its own. What is left is how a matrix product of more rows sums, and that depends on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.fx import GraphModule, Node

from inlay.backends.inductor.compile import LINEARS, packed_weights
from inlay.backends.program import Program
from inlay.errors import OptionError
from inlay.passes.graph import bind, is_call

FIXED_ROWS = 16
"""Rows of each product on CPUs where their number matters. Of a [2048, 8192] bfloat16 weight, two
rows then take 1.7 times as long, 512 rows 1.4 times; with 32 rows 2.8 and 1.2 times."""

_aten = torch.ops.aten
PRODUCTS = (
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten.baddbmm.default,
    _aten.matmul.default,
    _aten.einsum.default,
    _aten.linear.default,
    _aten.convolution.default,
    *LINEARS,
)
"""What Inductor leaves to libraries that choose the order of a sum by all sizes."""


def make_batch_invariant(
    program: Program,
    graphs: Mapping[str, GraphModule],
    weights: Sequence[Sequence[torch.Tensor]],
    cpu_flags: Sequence[str],
) -> None:
    """Fix the number of rows of a model's products where this CPU makes it necessary.

    graphs: of each segment; weights: as they were loaded, for each segment step.
    Raises OptionError where a product is not one of ours.
    """
    for key, gm in graphs.items():
        for node in _foreign_products(gm):
            raise OptionError(
                f"batch_invariant=True is not possible for this model: segment {key} multiplies "
                f"matrices in {node.name} ({node.target}), which are not packed weights, so that "
                "their sums may depend on the batch; leave it out"
            )
    for step, tensors in zip(program.segment_steps, weights, strict=True):
        gm = graphs[step.segment]
        nodes = [n for n in gm.graph.find_nodes(op="placeholder") if n.meta["kind"] == "weight"]
        for index, packing in packed_weights(gm).items():
            if packing.kind not in ("linear", "experts"):  # narrow weights have one order anyway
                continue
            # Its own: routers may be float32 among bfloat16.
            dtype = str(nodes[index].meta["spec"][1]).removeprefix("torch.")
            if not rows_are_alike(dtype, cpu_flags):
                fix_rows(tensors[index], FIXED_ROWS)


def fix_rows(handle: torch.Tensor, rows: int) -> None:
    torch.ops.inlay_cpu.fix_rows(handle, rows)


def rows_are_alike(dtype: str, cpu_flags: Sequence[str]) -> bool:
    """Whether oneDNN, and our kernels, sum alike for any rows from 2 on.

    Measured with AVX-512 and its bfloat16, for all sizes up to 1024 rows; AMX does not. Without
    AVX-512 all products with bfloat16 weights are our own, which sum each row in one order. Other
    CPUs may do, but nobody has looked.
    """
    if any(flag.startswith("amx") for flag in cpu_flags) and dtype != "float32":
        return False
    if dtype == "bfloat16" and "avx512f" not in cpu_flags:
        return {"avx2", "fma", "f16c"} <= set(cpu_flags)
    return {"float32": "avx512f", "bfloat16": "avx512_bf16"}.get(dtype) in cpu_flags


def _foreign_products(gm: GraphModule) -> Iterator[Node]:
    weights = [n for n in gm.graph.find_nodes(op="placeholder") if n.meta["kind"] == "weight"]
    packed = {weights[index] for index in packed_weights(gm)}
    for node in gm.graph.nodes:
        is_ours = is_call(node, *LINEARS) and bind(node)["weight"] in packed
        if not is_ours and any(is_call(node, product) for product in PRODUCTS):
            yield node
