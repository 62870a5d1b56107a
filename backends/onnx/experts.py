"""`inlay::experts` and `inlay::quantized_experts` as functions in ONNX's own text form.

For ONNX Runtime a loop over the experts that some token chose, each over its tokens alone, as the
reference has it. TensorRT has no such loop: there every expert runs for every token, which costs
num_experts / top_k times the arithmetic, and what was not chosen is weighted with zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inlay.backends.onnx.quantized_product import dequantized, prepared, quantized_product

if TYPE_CHECKING:
    import onnx

FLOAT = 1
"""ONNX's number of float32."""


@dataclass(frozen=True)
class Mixture:
    """One call of either op. The function is (x, index, weights, *matrices, *beside) -> y.

    matrices: shapes of up and down, and of their scales and zeros, as they come, by name. beside:
    which of up_bias, down_bias and norm_weight are given. dtype: ONNX's number of x's. options:
    the op's other arguments.
    """

    matrices: Mapping[str, Sequence[int]]
    beside: Sequence[str]
    hidden: int
    dtype: int
    options: Mapping[str, Any]
    narrow: int = 0  # ONNX's number of a quantized weight's type

    @property
    def num_experts(self) -> int:
        return self.matrices["up"][0]


def experts_function(name: str, target: str, mixture: Mixture) -> onnx.FunctionProto:
    """A function of domain "inlay", of one output."""
    import onnx.parser

    inputs = ", ".join(["x", "index", "weights", *mixture.matrices, *mixture.beside])
    body = (_loop if target == "onnxruntime" else _dense)(mixture)
    text = f"""
<domain: "inlay", opset_import: ["" : 23, "inlay" : 1]>
{name} ({inputs}) => (y)
{{
{body}
}}"""
    function = onnx.parser.parse_function(text)
    for node in function.node:
        node.doc_string = "inlay.experts"
    return function


def _loop(mixture: Mixture) -> str:
    """Rows of `before` and `after`: one for each token and slot."""
    num_experts, hidden, dtype = mixture.num_experts, mixture.hidden, mixture.dtype
    before = "\n    ".join(prepared(mixture))
    expert = "\n        ".join(_expert(mixture, "Gather <axis = 0> ({}, expert)"))
    return f"""
    {before}
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


def _dense(mixture: Mixture) -> str:
    """[experts, tokens, ...] throughout; `share` is what a token gives to each expert."""
    dtype = mixture.dtype
    matrices = "\n    ".join(dequantized(mixture))
    expert = "\n    ".join(_expert(mixture, "Unsqueeze ({}, one)", "Identity ({})"))
    numbers = ", ".join(str(number) for number in range(mixture.num_experts))
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
    {matrices}
    {expert}
    weighted = Mul (out, share)
    summed = ReduceSum <keepdims = 0> (weighted, zero)
    y = Cast <to = {dtype}> (summed)
"""


def _expert(mixture: Mixture, take: str, take_matrix: str = "") -> list[str]:
    """Lines from `rows` to `out`, in float32; take makes of a bias, take_matrix of a matrix, what
    belongs to the expert or experts at hand."""
    dtype, present, options = mixture.dtype, mixture.beside, mixture.options
    wide = f"Cast <to = {FLOAT}>"

    def product(rows: str, name: str) -> list[str]:
        if mixture.narrow and not take_matrix:
            return quantized_product(mixture, rows, name, take)
        return _product(mixture, rows, name, take_matrix or take, 3 if take_matrix else 2)

    def biased(name: str) -> list[str]:
        if f"{name}_bias" not in present:
            return [f"{name}_biased = Identity ({name}_sum)"]
        return [
            f"{name}_bias_stored = {take.format(f'{name}_bias')}",
            f"{name}_bias_wide = {wide} ({name}_bias_stored)",
            f"{name}_biased = Add ({name}_sum, {name}_bias_wide)",
        ]

    lines = [
        *product("rows", "up"),
        f"up_sum = {wide} (up_product)",
        *biased("up"),
        *_activated("up_biased", options),
        f"narrow = Cast <to = {dtype}> (active)",
        *product("narrow", "down"),
        f"down_sum = {wide} (down_product)",
        *biased("down"),
    ]
    if "norm_weight" not in present:
        return [*lines, "out = Identity (down_biased)"]
    return [
        *lines,
        f"gain = {wide} (norm_weight)",
        "one_float = Constant <value_float = 1.0> ()",
        "whole_gain = Add (gain, one_float)",
        "gained = Mul (down_biased, whole_gain)",
        "squares = Mul (gained, gained)",
        "last_axis = Constant <value_ints = [-1]> ()",
        "mean = ReduceMean (squares, last_axis)",
        f"eps = Constant <value_float = {options['norm_eps']!r}> ()",
        "mean_eps = Add (mean, eps)",
        "root = Sqrt (mean_eps)",
        "out = Div (gained, root)",
    ]


def _product(mixture: Mixture, rows: str, name: str, take: str, rank: int) -> list[str]:
    perm = ", ".join(map(str, [*range(rank - 2), rank - 1, rank - 2]))
    is_turned = mixture.options.get("transposed", False)  # those that are quantized never are
    turned = "Identity" if is_turned else f"Transpose <perm = [{perm}]>"
    source = f"{name}_dequantized" if mixture.narrow else name
    return [
        f"{name}_stored = {take.format(source)}",
        f"{name}_matrix = {turned} ({name}_stored)",
        f"{name}_product = MatMul ({rows}, {name}_matrix)",
    ]


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
