"""The quantization pass: linear layers, experts and embeddings over narrow weights."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from inlay.passes.expect import is_router
from inlay.passes.gather_last_logits import is_encoder, output_chain
from inlay.passes.graph import (
    bind,
    calls,
    fake,
    insert_call,
    is_call,
    module_of,
    refuse,
    replace,
)
from inlay.passes.quantize.config import Scheme
from inlay.passes.quantize.parts import Parts
from inlay.passes.quantize.plan import Plan
from inlay.passes.weights import leaves

aten = torch.ops.aten
ops = torch.ops.inlay
LINEAR = ops.linear.default
EXPERTS = ops.experts.default
EMBEDDING = aten.embedding.default
MULTIPLE = 16
"""In- and out-features of a quantized layer are multiples of it, as kernels want them."""


def quantize(gm: GraphModule, plan: Plan) -> int:
    """Round weights, and where the scheme says so activations.

        y = inlay.linear(x, W, bias)
    ->  weights alone:
        y = inlay.weight_only_linear(x, W.values, W.scales, W.zeros, bias)
    ->  int8 activations (fp8 alike; static ones by quantize_static):
        q, scale = inlay.quantize_int8(x)
        y = inlay.int8_linear(q, scale, None, W.values, W.scales, bias, dtype)

    Experts become quantized_experts, an embedding quantized_embedding. Where calibration smoothed
    a layer, x is divided by W.smooth first: the norm before it or the quantizer takes that in.
    Routers and layers that the configuration ignores stay as they are. The new node's
    meta["quantized"] is (the old one's name, scheme). Returns the number of calls.
    """
    count = 0
    for node, scheme in targets(gm, plan):
        if reason := _disagreement(gm, node, plan) or _refusal(node, scheme, plan):
            refuse(gm, node, reason)
            continue
        rewrite = {LINEAR: _linear, EXPERTS: _experts, EMBEDDING: _embedding}[node.target]
        new = rewrite(gm, node, scheme, plan)
        new.meta["quantized"] = node.name, scheme
        replace(node, new)
        count += 1
    return count


def targets(gm: GraphModule, plan: Plan) -> list[tuple[Node, Scheme]]:
    """The calls to quantize, in graph order, each with its scheme."""
    head, found = head_of(gm), []
    for node in calls(gm, LINEAR, EXPERTS, EMBEDDING):
        weights = [w for w in weights_of(node) if "weight" in w.meta]
        if len(weights) != len(weights_of(node)) or any(fake(w).dim() < 2 for w in weights):
            continue
        scheme = _scheme(gm, node, weights, plan, node is head)
        if scheme is not None:
            found.append((node, scheme))
    return found


def accepted(gm: GraphModule, plan: Plan) -> list[tuple[Node, Scheme]]:
    """Of the targets, those whose sizes allow it."""
    found = targets(gm, plan)
    return [(node, scheme) for node, scheme in found if not _refusal(node, scheme, plan)]


def head_of(gm: GraphModule) -> Node | None:
    """The LM head's linear layer; None where there is none."""
    chain = [] if is_encoder(gm) else output_chain(gm)
    return chain[0] if chain else None


def weights_of(node: Node) -> list[Any]:
    """The weights that a call multiplies with or looks up."""
    if is_call(node, EXPERTS):
        bound = bind(node)
        return [bound["up"], bound["down"]]
    return [node.args[0 if is_call(node, EMBEDDING) else 1]]


def _scheme(
    gm: GraphModule, node: Node, weights: list[Node], plan: Plan, is_head: bool
) -> Scheme | None:
    names = [leaf for w in weights for leaf in leaves(w.meta["weight"], gm.meta["recipes"])]
    if plan.schemes:
        scheme = next((plan.schemes[name] for name in names if name in plan.schemes), None)
        # An embedding may be tied to an LM head, whose scheme it is; rows are looked up in int8.
        return scheme if is_call(node, LINEAR, EXPERTS) or scheme == Scheme("int8") else None
    config = plan.config
    if config is None or config.ignores(names):
        return None
    if is_call(node, EMBEDDING):
        return Scheme("int8") if config.embeddings == "int8" and _is_vocabulary(node) else None
    if is_head:
        return config.head
    return None if is_call(node, LINEAR) and is_router(gm, node) else config.layers


def _is_vocabulary(node: Node) -> bool:
    """Not a table of positions or token types."""
    return node.args[1].meta.get("input") == "input_ids"


def _refusal(node: Node, scheme: Scheme, plan: Plan) -> str:
    """Why a layer cannot be quantized so; "" where it can."""
    for weight in weights_of(node):
        shape = [int(size) for size in fake(weight).shape[-2:]]
        if is_call(node, EXPERTS) and bind(node)["transposed"]:
            shape.reverse()
        if is_call(node, EMBEDDING):
            continue
        if any(size % MULTIPLE for size in shape):
            return f"its sizes {shape} are not multiples of {MULTIPLE}"
        if not plan.schemes and scheme.group_size and shape[1] % scheme.group_size:
            return f"its {shape[1]} inputs are not a multiple of group_size {scheme.group_size}"
    return ""


def _disagreement(gm: GraphModule, node: Node, plan: Plan) -> str:
    """Why the given parts of weights that go together do not fit each other; "" where they do."""
    fused = [leaves(weight.meta["weight"], gm.meta["recipes"]) for weight in weights_of(node)]
    together = ", ".join(name for names in fused for name in names)
    if plan.schemes:
        schemes = [{plan.schemes.get(name) for name in names} for names in fused]
        activations = {one.activation if one else "" for some in schemes for one in some}
        if len(activations) > 1 or any(len(some) > 1 for some in schemes):
            return f"its parts are quantized unlike each other: {together}"
    for names in fused:
        shared = ["order", "input_zero"]
        if any(f"{name}.input_zero" in plan.given for name in names):
            shared.append("input_scale")
        for part in shared:
            first, *rest = [plan.given.get(f"{name}.{part}") for name in names]
            if any(not _equal(first, other) for other in rest):
                return f"its parts want inputs of unlike {part}: {together}"
    return ""


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _linear(gm: GraphModule, node: Node, scheme: Scheme, plan: Plan) -> Node:
    bound = bind(node)
    x, dtype = bound["x"], fake(node).dtype
    parts = Parts(gm, bound["weight"], scheme, plan)
    if smooth := parts.optional("smooth"):
        x = insert_call(gm.graph, node, aten.div.Tensor, x, smooth)
    if order := parts.optional("order"):
        x = insert_call(gm.graph, node, aten.index_select.default, x, -1, order)
    weight = parts.values, parts.scales
    if scheme.activation == "none":
        if fake(x).dtype != dtype:
            x = insert_call(gm.graph, node, aten.to.dtype, x, dtype)
        arguments = x, *weight, parts.zeros, bound["bias"]
        return insert_call(gm.graph, node, ops.weight_only_linear.default, *arguments)
    q, *scales = _quantize_input(gm, node, x, scheme, parts)
    target = ops.fp8_linear.default
    if scheme.activation == "int8":
        target, scales = ops.int8_linear.default, [*scales, None][:2]
    return insert_call(gm.graph, node, target, q, *scales, *weight, bound["bias"], dtype)


def _quantize_input(
    gm: GraphModule, node: Node, x: Node, scheme: Scheme, parts: Parts
) -> tuple[Node, ...]:
    """The quantized input, its scale, and its zero point where it has one."""
    if scheme.static:
        scale, zero = parts.required("input_scale"), parts.optional("input_zero")
        arguments = x, scale, zero, scheme.activation
        q = insert_call(gm.graph, node, ops.quantize_static.default, *arguments)
        return (q, scale) if zero is None else (q, scale, zero)
    if scheme.activation == "fp8":
        call = insert_call(gm.graph, node, ops.quantize_fp8.default, x, scheme.group_size)
    elif scheme.activation_symmetric:
        call = insert_call(gm.graph, node, ops.quantize_int8.default, x)
    else:
        call = insert_call(gm.graph, node, ops.quantize_int8_asymmetric.default, x)
    count = len(call.meta["val"])
    return tuple(insert_call(gm.graph, node, operator.getitem, call, i) for i in range(count))


def _experts(gm: GraphModule, node: Node, scheme: Scheme, plan: Plan) -> Node:
    """Rows are quantized inside, by a scale each, also where the layers' scales are static."""
    bound = bind(node)
    transposed = bound.pop("transposed")
    arguments = [bound.pop(name) for name in ("x", "top_k_index", "top_k_weights")]
    for name in ("up", "down"):
        parts = Parts(gm, bound.pop(name), scheme, plan, transposed)
        arguments += [parts.values, parts.scales, parts.zeros]
    target = ops.quantized_experts.default
    return insert_call(gm.graph, node, target, *arguments, scheme.activation, **bound)


def _embedding(gm: GraphModule, node: Node, scheme: Scheme, plan: Plan) -> Node:
    table, ids = node.args[:2]
    parts = Parts(gm, table, scheme, plan, suffix=".rows")
    arguments = ids, parts.values, parts.scales, fake(node).dtype
    return insert_call(gm.graph, node, ops.quantized_embedding.default, *arguments)


def expected(gm: GraphModule, plan: Plan) -> list[str]:
    """The module of every call that is to be quantized."""
    return [module_of(node) for node, _ in targets(gm, plan)]
