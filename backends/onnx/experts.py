"""`inlay::experts` as a function in ONNX's own text form.

For ONNX Runtime a loop over the experts that some token chose, each over its tokens alone, as the
reference has it. TensorRT has no such loop: there every expert runs for every token, which costs
num_experts / top_k times the arithmetic, and what was not chosen is weighted with zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

FLOAT = 1
NAMES = {1: "float", 10: "float16", 16: "bfloat16"}
"""ONNX's numbers of element types."""


def experts_function(
    name: str,
    target: str,
    sizes: tuple[int, int],
    dtype: int,
    present: Sequence[str],
    options: Mapping[str, Any],
) -> onnx.FunctionProto:
    """A function (x, index, weights, up, down, *present) -> y of domain "inlay".

    sizes: experts, and hidden columns. dtype: ONNX's number of x's. present: which of up_bias,
    down_bias and norm_weight are given. options: the other arguments of `inlay::experts`.
    """
    import onnx.parser

    inputs = ", ".join(["x", "index", "weights", "up", "down", *present])
    body = (_loop if target == "onnxruntime" else _dense)(sizes, dtype, present, options)
    text = f"""
<domain: "inlay", opset_import: ["" : 23]>
{name} ({inputs}) => (y)
{{
{body}
}}"""
    return onnx.parser.parse_function(text)


def _loop(
    sizes: tuple[int, int], dtype: int, present: Sequence[str], options: Mapping[str, Any]
) -> str:
    """Rows of `before` and `after`: one for each token and slot."""
    num_experts, hidden = sizes
    expert = _expert(dtype, present, options, "Gather <axis = 0> ({}, expert)")
    return f"""
    zero = Constant <value_int = 0> ()
    one = Constant <value_ints = [1]> ()
    number = Constant <value_int = {num_experts}> ()
    all = Constant <value_ints = [-1]> ()
    top_k = Shape <start = 1, end = 2> (index)
    flat = Reshape (index, all)
    wide_weights = Cast <to = {FLOAT}> (weights)
    column = Constant <value_ints = [-1, 1]> ()
    flat_weights = Reshape (wide_weights, column)
    is_from = GreaterOrEqual (flat, zero)
    is_below = Less (flat, number)
    is_expert = And (is_from, is_below)
    chosen = Compress <axis = 0> (flat, is_expert)
    experts = Unique <sorted = 1> (chosen)
    count = Size (experts)
    true = Constant <value = bool {{1}}> ()
    slots = Shape (flat)
    columns = Constant <value_ints = [{hidden}]> ()
    shape = Concat <axis = 0> (slots, columns)
    nothing = Constant <value_float = 0.0> ()
    empty = Expand (nothing, shape)
    parts = Loop (count, true, empty) <body = one_expert
        (int64 turn, bool going, float[S, {hidden}] before)
        => (bool still_going, float[S, {hidden}] after)
    {{
        still_going = Identity (going)
        expert = Gather <axis = 0> (experts, turn)
        is_its = Equal (flat, expert)
        its = NonZero (is_its)
        slot = Reshape (its, all)
        token = Div (slot, top_k)
        rows = Gather <axis = 0> (x, token)
        {expert}
        slot_weight = Gather <axis = 0> (flat_weights, slot)
        weighted = Mul (out, slot_weight)
        place = Unsqueeze (slot, one)
        after = ScatterND (before, place, weighted)
    }}>
    by_token = Constant <value_ints = [-1, 0, {hidden}]> ()
    token_shape = Concat <axis = 0> (all, top_k, columns)
    grouped = Reshape (parts, token_shape)
    summed = ReduceSum <keepdims = 0> (grouped, one)
    y = Cast <to = {dtype}> (summed)
"""


def _dense(
    sizes: tuple[int, int], dtype: int, present: Sequence[str], options: Mapping[str, Any]
) -> str:
    """[experts, tokens, ...] throughout; `share` is what a token gives to each expert."""
    num_experts, _ = sizes
    expert = _expert(dtype, present, options, "Unsqueeze ({}, one)", "Identity ({})")
    numbers = ", ".join(str(number) for number in range(num_experts))
    return f"""
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    numbers = Constant <value_ints = [{numbers}]> ()
    last = Constant <value_ints = [-1]> ()
    slots = Unsqueeze (index, last)
    is_its = Equal (slots, numbers)
    wide_weights = Cast <to = {FLOAT}> (weights)
    slot_weights = Unsqueeze (wide_weights, last)
    nothing = Constant <value_float = 0.0> ()
    shares = Where (is_its, slot_weights, nothing)
    by_token = ReduceSum <keepdims = 0> (shares, one)
    by_expert = Transpose <perm = [1, 0]> (by_token)
    share = Unsqueeze (by_expert, last)
    rows = Unsqueeze (x, zero)
    {expert}
    weighted = Mul (out, share)
    summed = ReduceSum <keepdims = 0> (weighted, zero)
    y = Cast <to = {dtype}> (summed)
"""


def _expert(
    dtype: int,
    present: Sequence[str],
    options: Mapping[str, Any],
    take: str,
    take_matrix: str = "",
) -> str:
    """Lines from `rows` to `out`, in float32; take makes of a bias, take_matrix of a matrix, what
    belongs to the expert or experts at hand."""
    matrix, wide = take_matrix or take, f"Cast <to = {FLOAT}>"
    rank = 3 if take_matrix else 2
    perm = ", ".join(map(str, [*range(rank - 2), rank - 1, rank - 2]))
    lines = []
    for name in ("up", "down"):
        lines.append(f"{name}_stored = {matrix.format(name)}")
        turned = "Identity" if options["transposed"] else f"Transpose <perm = [{perm}]>"
        lines.append(f"{name}_matrix = {turned} ({name}_stored)")
    for name in ("up_bias", "down_bias"):
        if name in present:
            lines += [
                f"{name}_stored = {take.format(name)}",
                f"{name}_wide = {wide} ({name}_stored)",
            ]
    lines += ["up_product = MatMul (rows, up_matrix)", f"up_sum = {wide} (up_product)"]
    hidden = "up_sum"
    if "up_bias" in present:
        lines.append("up_biased = Add (up_sum, up_bias_wide)")
        hidden = "up_biased"
    lines += _activated(hidden, options)
    lines += [
        f"narrow = Cast <to = {dtype}> (active)",
        "down_product = MatMul (narrow, down_matrix)",
        f"down_sum = {wide} (down_product)",
    ]
    out = "down_sum"
    if "down_bias" in present:
        lines.append("down_biased = Add (down_sum, down_bias_wide)")
        out = "down_biased"
    if "norm_weight" in present:
        lines += [
            f"gain = {wide} (norm_weight)",
            "one_float = Constant <value_float = 1.0> ()",
            "whole_gain = Add (gain, one_float)",
            f"gained = Mul ({out}, whole_gain)",
            "squares = Mul (gained, gained)",
            "last_axis = Constant <value_ints = [-1]> ()",
            "mean = ReduceMean (squares, last_axis)",
            f"eps = Constant <value_float = {options['norm_eps']!r}> ()",
            "mean_eps = Add (mean, eps)",
            "root = Sqrt (mean_eps)",
            "normed = Div (gained, root)",
        ]
        out = "normed"
    lines.append(f"out = Identity ({out})")
    return "\n        ".join(lines)


def _activated(hidden: str, options: Mapping[str, Any]) -> list[str]:
    """Lines from the first product to `active`: see `activate` and `bound_up`."""
    lines = []
    gate, up = hidden, ""
    if options["gated"] and options["interleaved"]:
        lines += [
            "columns_axis = Constant <value_ints = [-1]> ()",
            "every_second = Constant <value_ints = [2]> ()",
            "to_end = Constant <value_ints = [9223372036854775807]> ()",
            "even = Constant <value_ints = [0]> ()",
            "odd = Constant <value_ints = [1]> ()",
            f"gate = Slice ({hidden}, even, to_end, columns_axis, every_second)",
            f"factor = Slice ({hidden}, odd, to_end, columns_axis, every_second)",
        ]
        gate, up = "gate", "factor"
    elif options["gated"]:
        lines.append(f"gate, factor = Split <axis = -1, num_outputs = 2> ({hidden})")
        gate, up = "gate", "factor"
    limit, late = options["gate_limit"], options["limit_activated"]
    if limit > 0 and not late:
        lines += _clipped("gate_bounded", gate, None, limit)
        gate = "gate_bounded"
    lines += _activation(gate, options)
    active = "activated"
    if limit > 0 and late:
        lines += _clipped("activated_bounded", active, None, limit)
        active = "activated_bounded"
    if not up:
        return [*lines, f"active = Identity ({active})"]
    if options["up_limit"] > 0:
        lines += _clipped("factor_bounded", up, -options["up_limit"], options["up_limit"])
        up = "factor_bounded"
    if options["up_softcap"] > 0:
        lines += _softcapped("factor_capped", up, options["up_softcap"])
        up = "factor_capped"
    if options["up_offset"]:
        lines += [
            f"offset = Constant <value_float = {float(options['up_offset'])!r}> ()",
            f"factor_offset = Add ({up}, offset)",
        ]
        up = "factor_offset"
    return [*lines, f"active = Mul ({active}, {up})"]


def _activation(gate: str, options: Mapping[str, Any]) -> list[str]:
    name, alpha = options["activation"], options["alpha"]
    if name == "silu":
        linear, lines = gate, []
        if options["gate_softcap"] > 0:
            lines += _softcapped("gate_capped", gate, options["gate_softcap"])
            linear = "gate_capped"
        inner = gate
        if alpha != 1.0:
            lines += [
                f"alpha = Constant <value_float = {float(alpha)!r}> ()",
                f"gate_scaled = Mul ({gate}, alpha)",
            ]
            inner = "gate_scaled"
        return [
            *lines,
            f"opened = Sigmoid ({inner})",
            f"activated = Mul ({linear}, opened)",
        ]
    if name == "relu2":
        return [f"positive = Relu ({gate})", "activated = Mul (positive, positive)"]
    call = {
        "gelu": 'Gelu <approximate = "none">',
        "gelu_tanh": 'Gelu <approximate = "tanh">',
        "relu": "Relu",
        "sigmoid": "Sigmoid",
        "tanh": "Tanh",
        "linear": "Identity",
    }[name]
    return [f"activated = {call} ({gate})"]


def _clipped(result: str, value: str, low: float | None, high: float) -> list[str]:
    lines = [f"{result}_high = Constant <value_float = {float(high)!r}> ()"]
    if low is None:
        return [*lines, f"{result} = Min ({value}, {result}_high)"]
    lines.append(f"{result}_low = Constant <value_float = {float(low)!r}> ()")
    return [*lines, f"{result} = Clip ({value}, {result}_low, {result}_high)"]


def _softcapped(result: str, value: str, cap: float) -> list[str]:
    return [
        f"{result}_cap = Constant <value_float = {float(cap)!r}> ()",
        f"{result}_inner = Div ({value}, {result}_cap)",
        f"{result}_bent = Tanh ({result}_inner)",
        f"{result} = Mul ({result}_bent, {result}_cap)",
    ]
