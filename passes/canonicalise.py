"""One spelling for everything: what later passes match, and nothing that computes nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from inlay.passes.activations import activation_of
from inlay.passes.graph import (
    add_weight,
    bind,
    fake,
    insert_call,
    is_call,
    replace,
    same_shape,
    written_nodes,
)

aten = torch.ops.aten
LINEAR = torch.ops.inlay.linear.default

CASTS = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)
COPIES = (
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
)
RESHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
ALIASES = {
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.multiply.Scalar: aten.mul.Scalar,
    aten.divide.Tensor: aten.div.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
}
NAMED_ACTIVATIONS = {
    "silu": (aten.silu.default, {}),
    "gelu": (aten.gelu.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "mish": (aten.mish.default, {}),
}
"""Of those that models spell as a product, the ones that torch has an op for."""
PURE_PYTHON = (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv)


def canonicalise(gm: GraphModule) -> int:
    """Apply the rules below to every node, then merge common subexpressions.

    Before and after:
        _assert_tensor_metadata(x); to = x.to(x.dtype)        (gone)
        mul = x * 1.0; alias = alias(mul)                     (gone)
        view = x.view([1, sym_size, -1, 16])            ->    reshape(x, [1, -1, 4, 16])
        view(addmm(bias, view(x), weight), [1, T, N])   ->    inlay.linear(x, weight.t, bias)
        unsqueeze(cos), unsqueeze(cos)                  ->    one of them
        x * sigmoid(x)                                  ->    silu(x)
    """
    count, gm.meta["written"] = 0, written_nodes(gm)
    for node in list(gm.graph.nodes):
        if is_call(node, aten._assert_tensor_metadata.default):
            gm.graph.erase_node(node)
            count += 1
            continue
        for rule in RULES:
            replacement = rule(gm, node)
            if replacement is not None:
                replace(node, replacement)
                count += 1
                break
    return count + _merge_common_subexpressions(gm, gm.meta.pop("written"))


def _use_one_name(gm: GraphModule, node: Node) -> Node | None:
    if node.op != "call_function" or node.target not in ALIASES:
        return None
    return insert_call(gm.graph, node, ALIASES[node.target], *node.args, **node.kwargs)


def _drop_dropout(gm: GraphModule, node: Node) -> Node | None:
    if not is_call(node, aten.dropout.default) or bind(node)["train"]:
        return None
    return node.args[0]


def _simplify_cast(gm: GraphModule, node: Node) -> Node | None:
    """A cast is gone where it changes nothing, else it is `aten.to.dtype(x, dtype)`."""
    if not is_call(node, *CASTS):
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    before, after = fake(source), fake(node)
    if before.device != after.device:
        return None
    if before.dtype == after.dtype:
        return source
    if node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
        return None
    return insert_call(gm.graph, node, aten.to.dtype, source, after.dtype)


def _drop_identity(gm: GraphModule, node: Node) -> Node | None:
    """Copies, and slices, expansions and reshapes of everything to what it was."""
    shaped = (aten.slice.Tensor, aten.expand.default, *RESHAPES)
    if not is_call(node, *COPIES, *shaped):
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    unchanged = same_shape(fake(source), fake(node)) and fake(source).device == fake(node).device
    # A copy of what is written into, before or after, is not what it was copied from.
    written = gm.meta["written"]
    kept = is_call(node, *COPIES) and (node in written or source in written)
    return source if unchanged and not kept else None


def _drop_unit_scale(gm: GraphModule, node: Node) -> Node | None:
    if not is_call(node, aten.mul.Tensor, aten.div.Tensor) or not isinstance(node.args[0], Node):
        return None
    source, scale = node.args[:2]
    unit = isinstance(scale, int | float) and scale == 1 and not node.kwargs
    return source if unit and fake(source).dtype == fake(node).dtype else None


def _drop_empty_operands(gm: GraphModule, node: Node) -> Node | None:
    """A rotary embedding of the whole head still concatenates the empty rest (phi3)."""
    if not is_call(node, aten.cat.default):
        return None
    dim = bind(node)["dim"]
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    kept = [part for part in parts if not statically_known_true(fake(part).shape[dim] == 0)]
    if len(kept) == 1 and fake(kept[0]).dtype == fake(node).dtype:
        return kept[0]
    if len(kept) in (0, 1, len(parts)):
        return None
    return insert_call(gm.graph, node, aten.cat.default, kept, dim)


def _fix_shape(gm: GraphModule, node: Node) -> Node | None:
    """Static sizes, and -1 for the one that is not, so that no node has to compute it.

    Always a reshape: a view could depend on a copy that was dropped for computing nothing.
    """
    if not is_call(node, *RESHAPES):
        return None
    shape = [size if isinstance(size, int) else -1 for size in fake(node).shape]
    if shape.count(-1) > 1:
        arguments = bind(node)
        shape = list(arguments.get("size") or arguments.get("shape") or ())
    if not shape or (node.target is aten.reshape.default and list(node.args[1]) == shape):
        return None
    return insert_call(gm.graph, node, aten.reshape.default, node.args[0], shape)


def _name_linear(gm: GraphModule, node: Node) -> Node | None:
    if not is_call(node, aten.linear.default):
        return None
    return insert_call(gm.graph, node, LINEAR, *node.args, **node.kwargs)


def _matmul_to_linear(gm: GraphModule, node: Node) -> Node | None:
    """x [.., K] times a weight stored as [K, N]: the weight becomes a transposed one."""
    bias: tuple[Node, ...] = ()
    if is_call(node, aten.mm.default, aten.matmul.default):
        x, weight = node.args
    elif is_call(node, aten.addmm.default) and not node.kwargs:
        x, weight = node.args[1:]
        bias = (node.args[0],)
        if tuple(fake(bias[0]).shape) != (fake(node).shape[-1],):
            return None
    else:
        return None
    assert isinstance(weight, Node)
    transposes = is_call(weight, aten.t.default, aten.numpy_T.default) and fake(weight).dim() == 2
    if transposes and "weight" in weight.args[0].meta:
        return insert_call(gm.graph, node, LINEAR, x, weight.args[0], *bias)
    if "weight" not in weight.meta or fake(weight).dim() != 2:
        return None
    name = weight.meta["weight"]
    recipe = {"op": "transpose", "inputs": [name]}
    transposed = add_weight(gm, f"{name}.t", recipe, fake(weight).t().contiguous())
    return insert_call(gm.graph, node, LINEAR, x, transposed, *bias)


def _unflatten_linear(gm: GraphModule, node: Node) -> Node | None:
    """A linear layer takes any rank: flattening around it is not needed (Conv1D)."""
    if not is_call(node, *RESHAPES) or not is_call(node.args[0], LINEAR):
        return None
    linear = node.args[0]
    assert isinstance(linear, Node)
    x, *rest = linear.args
    if len(linear.users) > 1 or not is_call(x, *RESHAPES):
        return None
    source = x.args[0]
    assert isinstance(source, Node)
    wanted, given = fake(node), fake(source)
    if not same_shape(wanted[..., 0], given[..., 0]) or fake(linear).shape[-1] != wanted.shape[-1]:
        return None
    return insert_call(gm.graph, node, LINEAR, source, *rest)


def _name_activation(gm: GraphModule, node: Node) -> Node | None:
    """x * sigmoid(x), 0.5 * x * (1 + tanh(...)) and the like: rounded once, not at each step."""
    found = activation_of(node) if is_call(node, aten.mul.Tensor) else None
    if found is None or found[0] not in NAMED_ACTIVATIONS:
        return None
    target, options = NAMED_ACTIVATIONS[found[0]]
    return insert_call(gm.graph, node, target, found[1], **options)


RULES: tuple[Callable[[GraphModule, Node], Node | None], ...] = (
    _use_one_name,
    _drop_dropout,
    _simplify_cast,
    _drop_identity,
    _drop_unit_scale,
    _drop_empty_operands,
    _unflatten_linear,
    _fix_shape,
    _name_linear,
    _matmul_to_linear,
    _name_activation,
)
"""Each gives the node to use instead, or None where it does not apply; the first one wins."""


def _merge_common_subexpressions(gm: GraphModule, written: Collection[Node]) -> int:
    """Equal calls of pure ops with equal arguments: the first serves all.

    written: tensors that some op writes into, which are equal at times only.
    """
    count = 0
    seen: dict[tuple[object, str, str], Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not _is_pure(node.target):
            continue
        if node in written or any(arg in written for arg in node.all_input_nodes):
            continue
        # Written out, so that 1, 1.0 and True stay different.
        key = (node.target, repr(node.args), repr(sorted(node.kwargs.items())))
        if key in seen:
            replace(node, seen[key])
            count += 1
        else:
            seen[key] = node
    return count


def _is_pure(target: object) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return not target._schema.is_mutable and (
            torch.Tag.nondeterministic_seeded not in target.tags
        )
    return target in PURE_PYTHON
