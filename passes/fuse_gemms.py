"""Linear layers of the same input in one matrix product: QKV, gate and up."""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch.fx import GraphModule, Node

from inlay.passes.graph import add_weight, calls, fake, insert_call, refuse, replace

aten = torch.ops.aten
LINEAR = torch.ops.inlay.linear.default


def fuse_gemms(gm: GraphModule) -> int:
    """Concatenate the weights of sibling layers, and split their common output.

        q = inlay.linear(x, attn.q.weight, attn.q.bias)
        k = inlay.linear(x, attn.k.weight)
    ->
        qk = inlay.linear(x, attn.q+k.weight, attn.q+k.bias)
        q, k = split_with_sizes(qk, [Nq, Nk], -1)

    Missing biases are zeros. Siblings are plain layers that one module calls: routers, which
    compute more than a product, stay by themselves. So do layers of different modules: where
    attention and feed-forward layer read the same norm (phi, gpt_neox, cohere), the wide gate and
    up would have to be kept across the attention op, to save reading a narrow input once more.
    Left alone too: weights that anything else reads (tied ones). The LM head never has a sibling:
    its input is read by the output alone. Returns the number of groups.
    """
    count = 0
    for group in _groups(gm):
        if len(group) > 1:
            _fuse(gm, group)
            count += 1
    return count


def _groups(gm: GraphModule) -> list[list[Node]]:
    """Linear layers with equal input, dtype and parent module."""
    groups: dict[tuple[object, ...], list[Node]] = {}
    sizes = _call_sizes(gm)
    for node in calls(gm, LINEAR):
        x, weight = node.args[:2]
        bias = _bias(node)
        if "weight" not in weight.meta:
            continue
        if len(weight.users) > 1:
            refuse(gm, node, f"weight {weight.meta['weight']!r} has other users too")
            continue
        if bias is not None and "weight" not in bias.meta:
            refuse(gm, node, "the bias is not a weight")
            continue
        *_, (parent, parent_name), (layer, name) = [("", ""), *_stack(node)]
        if sizes.get(layer) != 1 or parent_name != name.rpartition(".")[0]:
            continue
        groups.setdefault((x, fake(weight).dtype, parent), []).append(node)
    return list(groups.values())


def _stack(node: Node) -> list[tuple[str, str]]:
    """(call, module's name) from the outermost module to the innermost."""
    return [(key, name) for key, (name, _) in node.meta.get("nn_module_stack", {}).items()]


def _call_sizes(gm: GraphModule) -> Counter[str]:
    """How many nodes each call of an innermost module has."""
    return Counter(_stack(node)[-1][0] for node in gm.graph.nodes if _stack(node))


def _bias(node: Node) -> Node | None:
    return node.args[2] if len(node.args) > 2 else None


def _fuse(gm: GraphModule, group: list[Node]) -> None:
    first = group[0]
    weights: list[Node] = [node.args[1] for node in group]
    names = [weight.meta["weight"] for weight in weights]
    name = fused_name(names)
    fused_weight = _concatenate(gm, name, names, [fake(weight) for weight in weights])
    arguments = [first.args[0], fused_weight]
    if any(_bias(node) is not None for node in group):
        arguments.append(_fuse_biases(gm, group, names, name))
    fused = insert_call(gm.graph, first, LINEAR, *arguments)
    sizes = [int(fake(weight).shape[0]) for weight in weights]
    split = insert_call(gm.graph, first, aten.split_with_sizes.default, fused, sizes, -1)
    parts = [insert_call(gm.graph, first, operator.getitem, split, i) for i in range(len(group))]
    for node, part in zip(group, parts, strict=True):
        replace(node, part)


def _fuse_biases(gm: GraphModule, group: list[Node], names: list[str], name: str) -> Node:
    parts = []
    for node, weight in zip(group, names, strict=True):
        bias = _bias(node)
        if bias is not None:
            parts.append(bias.meta["weight"])
            continue
        parts.append(f"{weight}.zeros")
        gm.meta["recipes"][parts[-1]] = {"op": "zeros", "inputs": [weight]}
    vals = [fake(node.args[1])[:, 0] for node in group]
    head, found, tail = name.rpartition("weight")
    return _concatenate(gm, f"{head}bias{tail}" if found else f"{name}.bias", parts, vals)


def _concatenate(gm: GraphModule, name: str, parts: list[str], vals: list[torch.Tensor]) -> Node:
    rows = [int(val.shape[0]) for val in vals]
    recipe = {"op": "cat", "inputs": parts, "dim": 0, "sizes": rows}
    return add_weight(gm, name, recipe, torch.cat(vals))


def fused_name(names: list[str]) -> str:
    """`attn.q.weight`, `attn.k.weight` -> `attn.q+k.weight`: the parts stay readable."""
    parts = [name.split(".") for name in names]
    shortest = min(len(part) for part in parts)
    start = 0
    while start < shortest and len({part[start] for part in parts}) == 1:
        start += 1
    end = 0
    while end < shortest - start and len({part[-1 - end] for part in parts}) == 1:
        end += 1
    middle = "+".join(".".join(part[start : len(part) - end]) for part in parts)
    return ".".join([*parts[0][:start], middle, *parts[0][len(parts[0]) - end :]])
