"""A whole program as one standard ONNX model, for any runtime that takes opset 23.

One request at a time, its keys and values going in and out:

    input_ids, position_ids [1, T], logits_indices [R] int64, past.N.key [1, Hk, P, D],
    past.N.value [1, Hk, P, Dv]
    -> logits [1, R, vocab], present.N.key [1, Hk, P + T, D], present.N.value

N counts the layers that have a cache of their own. Positions are those of the T new tokens, which
follow the P cached ones, from 0 on; logits_indices are rows of the T whose logits are wanted. P may
be 0. Weights are external data in the artifact's own safetensors files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.backends.onnx.convert import OPSET
from inlay.backends.program import AttentionStep, Program
from inlay.errors import UnsupportedModelError

if TYPE_CHECKING:
    import onnx

FILE = "model.onnx"
"""In the artifact's directory; it needs weights/ beside it, nothing else."""

ELEMENTS = {"float32": 1, "float16": 10, "bfloat16": 16}
BFLOAT16 = 16


def check_whole(program: Program) -> None:
    """Raises UnsupportedModelError for an encoder, which has no cache."""
    if program.is_encoder:
        raise UnsupportedModelError(
            "whole=True is for decoders: an encoder has no cache of keys and values; leave it out"
        )


def write_whole(program: Program, segments: Mapping[str, bytes], directory: Path) -> None:
    """The model, checked, into an artifact's directory, which has its weights."""
    import onnx

    models = {key: onnx.load_from_string(data) for key, data in segments.items()}
    path = directory / FILE
    path.write_bytes(whole_model(program, models, directory).SerializeToString())
    onnx.checker.check_model(str(path))


def whole_model(
    program: Program, segments: Mapping[str, onnx.ModelProto], directory: Path
) -> onnx.ModelProto:
    """The model over an artifact's directory; segments by key, as `convert.py` makes them."""
    import onnx.inliner

    whole = onnx.ModelProto(ir_version=next(iter(segments.values())).ir_version)
    domains = {o.domain: o.version for m in segments.values() for o in m.opset_import}
    for domain, version in {**domains, "": OPSET}.items():
        whole.opset_import.append(onnx.helper.make_opsetid(domain, version))
    whole.graph.name = "inlay"
    weights = ExternalWeights(directory)
    _add_inputs(whole, program)
    for index, step in enumerate(program.steps):
        if isinstance(step, AttentionStep):
            _add_attention(whole, step, program.dtype, weights)
            continue
        segment = segments[step.segment]
        given = zip(_weight_names(segment), step.weights, strict=True)
        names = {name: weights.add(whole, weight) for name, weight in given}
        names |= dict(zip((v.name for v in segment.graph.input), step.inputs, strict=True))
        names |= dict(zip((v.name for v in segment.graph.output), step.outputs, strict=True))
        _add_segment(whole, segment, names, f"step{index}")
    _add_outputs(whole, program)
    return onnx.inliner.inline_local_functions(whole)


class ExternalWeights:
    """Initializers whose data lies in the artifact's weights/, by the weights' names."""

    def __init__(self, directory: Path) -> None:
        self._folder = directory / "weights"
        self._index = json.loads((self._folder / "index.json").read_text())
        self._headers: dict[str, tuple[int, Any]] = {}
        self._added: set[str] = set()

    def add(self, model: onnx.ModelProto, weight: str) -> str:
        """The initializer's name in this model; it is added once."""
        import onnx

        place = self._index[weight]
        name = place["tensor"]
        if name not in self._added:
            self._added.add(name)
            start, header = self._header(place["file"])
            entry = header[name]
            begin, end = entry["data_offsets"]
            tensor = model.graph.initializer.add(
                name=name,
                data_type=SAFETENSORS[entry["dtype"]],
                dims=entry["shape"],
                data_location=onnx.TensorProto.EXTERNAL,
            )
            for key, value in {
                "location": f"weights/{place['file']}",
                "offset": start + begin,
                "length": end - begin,
            }.items():
                tensor.external_data.add(key=key, value=str(value))
        return name

    def _header(self, file: str) -> tuple[int, Any]:
        """Where a file's tensors begin, and its JSON: https://github.com/huggingface/safetensors"""
        if file not in self._headers:
            with (self._folder / file).open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                self._headers[file] = 8 + size, json.loads(opened.read(size))
        return self._headers[file]


SAFETENSORS = {
    "F32": 1,
    "F16": 10,
    "BF16": 16,
    "I64": 7,
    "I32": 6,
    "I8": 3,
    "U8": 2,
    "F8_E4M3": 17,
    "BOOL": 9,
}
"""Names of types in safetensors -> ONNX's numbers."""


def _weight_names(segment: onnx.ModelProto) -> list[str]:
    return [tensor.name for tensor in segment.graph.initializer if tensor.external_data]


def _add_segment(
    whole: onnx.ModelProto, segment: onnx.ModelProto, names: dict[str, str], prefix: str
) -> None:
    """Its nodes and constants, what is within it under names of its own."""

    def renamed(name: str) -> str:
        return names.get(name, f"{prefix}/{name}") if name else ""

    for tensor in segment.graph.initializer:
        if not tensor.external_data:
            copy = whole.graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = renamed(tensor.name)
    for node in segment.graph.node:
        copy = whole.graph.node.add()
        copy.CopyFrom(node)
        copy.name = f"{prefix}/{node.name}"
        _rename(copy, renamed)


def _rename(node: onnx.NodeProto, renamed: Callable[[str], str]) -> None:
    node.input[:] = [renamed(name) for name in node.input]
    node.output[:] = [renamed(name) for name in node.output]
    for attribute in node.attribute:
        if attribute.HasField("g"):  # a loop's body, which reads names around it
            graph = attribute.g
            for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
                value.name = renamed(value.name)
            for inner in graph.node:
                _rename(inner, renamed)


def _caches(program: Program) -> list[AttentionStep]:
    """The first step of each cache."""
    first: dict[int, AttentionStep] = {}
    for step in program.attention_steps:
        first.setdefault(step.cache, step)
    return list(first.values())


def _add_inputs(whole: onnx.ModelProto, program: Program) -> None:
    import onnx

    make, kind = onnx.helper.make_tensor_value_info, ELEMENTS[program.dtype]
    used = {name for step in program.segment_steps for name in step.inputs}
    for name, shape in (
        ("input_ids", [1, "T"]),
        ("position_ids", [1, "T"]),
        ("logits_indices", ["R"]),
    ):
        if name in used or name == "position_ids":  # which masks need
            whole.graph.input.append(make(name, 7, shape))
    for number, step in enumerate(_caches(program)):
        for part, size in (("key", step.head_dim), ("value", step.v_head_dim)):
            shape = [1, step.num_kv_heads, "P", size]
            whole.graph.input.append(make(f"past.{number}.{part}", kind, shape))


def _add_outputs(whole: onnx.ModelProto, program: Program) -> None:
    import onnx

    make, kind = onnx.helper.make_tensor_value_info, ELEMENTS[program.dtype]
    node = onnx.helper.make_node("Identity", [program.logits], ["logits"], name="logits")
    whole.graph.node.append(node)
    whole.graph.output.append(make("logits", kind, [1, "R", program.vocab_size]))
    for number, step in enumerate(_caches(program)):
        for part, size in (("key", step.head_dim), ("value", step.v_head_dim)):
            shape = [1, step.num_kv_heads, "P + T", size]
            whole.graph.output.append(make(f"present.{number}.{part}", kind, shape))
            name = f"cache.{step.cache}.{part}"
            node = onnx.helper.make_node("Identity", [name], [f"present.{number}.{part}"])
            whole.graph.node.append(node)


def _add_attention(
    whole: onnx.ModelProto, step: AttentionStep, dtype: str, weights: ExternalWeights
) -> None:
    """Layers that share keys and values read what the first of them has joined."""

    produced = {name for node in whole.graph.node for name in node.output}
    key, value = f"cache.{step.cache}.key", f"cache.{step.cache}.value"
    if key not in produced:
        number = sum(1 for name in produced if name.startswith("cache.") and name.endswith(".key"))
        for new, past, joined in (
            (step.key, f"past.{number}.key", key),
            (step.value, f"past.{number}.value", value),
        ):
            _call(whole, JOIN, [new, past], [joined], f"join.{joined}")
    beside = [(name, getattr(step, name)) for name in ("sinks", "slopes")]
    given = {name: weights.add(whole, weight) for name, weight in beside if weight is not None}
    kinds = {tensor.name: tensor.data_type for tensor in whole.graph.initializer}
    is_rounded = "slopes" in given and kinds[given["slopes"]] == BFLOAT16
    inputs = [step.query, key, value, "position_ids", *given.values()]
    text = attention_function(step, ELEMENTS[dtype], list(given), is_rounded)
    _call(whole, text, inputs, [step.output], f"attention.{step.layer}")


def _call(
    whole: onnx.ModelProto, text: str, inputs: list[str], outputs: list[str], name: str
) -> None:
    """A function of ours; equal ones are there once, and all are inlined in the end."""
    import onnx
    import onnx.parser

    function = onnx.parser.parse_function(text)
    function.name = f"F{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if not any(one.name == function.name for one in whole.functions):
        whole.functions.append(function)
        if not any(one.domain == function.domain for one in whole.opset_import):
            whole.opset_import.append(onnx.helper.make_opsetid(function.domain, 1))
    node = onnx.helper.make_node(function.name, inputs, outputs, name, domain=function.domain)
    whole.graph.node.append(node)


JOIN = f"""
<domain: "inlay", opset_import: ["" : {OPSET}]>
Join (new, past) => (joined)
{{
    zero = Constant <value_ints = [0]> ()
    by_head = Transpose <perm = [1, 0, 2]> (new)
    batch = Unsqueeze (by_head, zero)
    joined = Concat <axis = 2> (past, batch)
}}"""


def attention_function(step: AttentionStep, dtype: int, beside: list[str], is_rounded: bool) -> str:
    """(q [T, Hq, D], key and value [1, Hk, S, D], position_ids, sinks, slopes) -> [T, Hq, Dv].

    The mask says all that the standard op does not know: windows, chunks, ALiBi. A sink is one
    more key of zeros, which the mask gives the sink's score, and whose value is zero. Where slopes
    are bfloat16 what they add is rounded to it (Falcon).
    """
    lines = [*_mask(step), *(_slopes(is_rounded) if step.slopes else ["bias = Identity (mask)"])]
    key, value, bias = "key", "value", "bias"
    if step.sinks:
        lines += _sinks(step)
        key, value, bias = "key_and_sink", "value_and_sink", "bias_and_sink"
    softcap = f", softcap = {float(step.softcap)!r}" if step.softcap else ""
    body = "\n    ".join(
        [
            *lines,
            f"attn_mask = Cast <to = {dtype}> ({bias})",
            "query_by_head = Transpose <perm = [1, 0, 2]> (q)",
            "query = Unsqueeze (query_by_head, axis_0)",
            f"by_head = Attention <scale = {float(step.scale)!r}{softcap}> "
            f"(query, {key}, {value}, attn_mask)",
            "one_batch = Squeeze (by_head, axis_0)",
            "out = Transpose <perm = [1, 0, 2]> (one_batch)",
        ]
    )
    return f"""
<domain: "inlay", opset_import: ["" : {OPSET}]>
Attend ({", ".join(["q", "key", "value", "position_ids", *beside])}) => (out)
{{
    {body}
}}"""


def _mask(step: AttentionStep) -> list[str]:
    """`mask` float32 [1, 1, T, S], from positions: `queries` [1, 1, T, 1], `keys` [S]."""
    lines = [
        "axis_0 = Constant <value_ints = [0]> ()",
        "zero = Constant <value_int = 0> ()",
        "one = Constant <value_int = 1> ()",
        "sizes = Shape <start = 2, end = 3> (key)",
        "size = Squeeze (sizes, axis_0)",
        "keys = Range (zero, size, one)",
        "to_column = Constant <value_ints = [1, 1, -1, 1]> ()",
        "queries = Reshape (position_ids, to_column)",
        "distance = Sub (queries, keys)",
        "hidden_0 = Less (distance, zero)",
    ]
    hidden = "hidden_0"
    if step.window:
        lines += [
            f"window = Constant <value_int = {step.window}> ()",
            "is_before = GreaterOrEqual (distance, window)",
            "hidden_1 = Or (hidden_0, is_before)",
        ]
        hidden = "hidden_1"
    if step.chunk:
        lines += [
            f"chunk = Constant <value_int = {step.chunk}> ()",
            "query_chunk = Div (queries, chunk)",
            "key_chunk = Div (keys, chunk)",
            "is_same = Equal (query_chunk, key_chunk)",
            "is_other = Not (is_same)",
            f"hidden_2 = Or ({hidden}, is_other)",
        ]
        hidden = "hidden_2"
    return [
        *lines,
        "nothing = Constant <value_float = 0.0> ()",
        "never = Constant <value = float {-inf}> ()",
        f"mask = Where ({hidden}, never, nothing)",
    ]


def _slopes(is_rounded: bool) -> list[str]:
    """`bias` [1, Hq, T, S]."""
    factor = "key_positions" if is_rounded else "minus_distance"
    lines = [
        "slopes_wide = Cast <to = 1> (slopes)",
        "to_heads = Constant <value_ints = [1, -1, 1, 1]> ()",
        "by_head_slopes = Reshape (slopes_wide, to_heads)",
        "negative = Neg (distance)",
        "minus_distance = Cast <to = 1> (negative)",
        "key_positions = Cast <to = 1> (keys)",
        f"exact = Mul (by_head_slopes, {factor})",
    ]
    if is_rounded:
        lines += [f"narrow = Cast <to = {BFLOAT16}> (exact)", "added = Cast <to = 1> (narrow)"]
    else:
        lines.append("added = Identity (exact)")
    return [*lines, "bias = Add (mask, added)"]


def _sinks(step: AttentionStep) -> list[str]:
    lines = []
    for name, size in (("key", step.head_dim), ("value", step.v_head_dim)):
        shape = f"[1, {step.num_kv_heads}, 1, {size}]"
        lines += [
            f"{name}_shape = Constant <value_ints = {shape}> ()",
            f"{name}_none = CastLike (nothing, {name})",
            f"{name}_column = Expand ({name}_none, {name}_shape)",
            f"{name}_and_sink = Concat <axis = 2> ({name}, {name}_column)",
        ]
    return [
        *lines,
        "heads_first = Constant <value_ints = [1, -1, 1, 1]> ()",
        "sinks_wide = Cast <to = 1> (sinks)",
        "sink = Reshape (sinks_wide, heads_first)",
        "rows = Shape <start = 2, end = 3> (queries)",
        "ones = Constant <value_ints = [1]> ()",
        f"heads = Constant <value_ints = [{step.num_heads}]> ()",
        "sink_shape = Concat <axis = 0> (ones, heads, rows, ones)",
        "sink_column = Expand (sink, sink_shape)",
        "mask_shape = Concat <axis = 0> (ones, heads, rows, sizes)",
        "whole_bias = Expand (bias, mask_shape)",
        "bias_and_sink = Concat <axis = -1> (whole_bias, sink_column)",
    ]
