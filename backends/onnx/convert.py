"""One segment -> one ONNX model: torch.onnx, with `translations.py` for our ops.

What comes out, whichever backend asks:

- Names are those of the segment's placeholders, in the segment's order: weights `w0`, `w1` ...,
  then inputs `i5`, `i6` ...; outputs are `o0`, `o1` ....
- Weights are initializers with external data that no file holds: whoever runs the model gives each
  one by name. ONNX Runtime takes them by `add_external_initializers`, TensorRT's parser wants them
  written in: `fill_weights` does so, and makes INT4 of what we store as 0..15.
- Dynamic sizes keep the letters of the segment's graph ("T", "R", ...).
- A node's name begins with that of the segment's node it was made of, and its doc_string says
  which op that was and the line of the model's source that made it.

Targets: "onnxruntime" may use what only that runtime has (MatMulNBits, a loop over the experts that
were chosen) and computes what our references compute, to the last rounding where sums are exact;
"tensorrt" is standard ONNX without loops, and quantization is Q/DQ around plain products.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.fx.traceback
from torch.fx import GraphModule, Interpreter, Node

from inlay.backends.graph_json import graph_from_json, graph_to_json
from inlay.backends.onnx.packages import require
from inlay.backends.onnx.quantized_product import UNPACK
from inlay.backends.segment_arguments import example_arguments
from inlay.errors import UnsupportedModelError
from inlay.passes.graph import last_source_line
from inlay.passes.ops import REFERENCES

if TYPE_CHECKING:
    import onnx

OPSET = 23
"""RMSNormalization and RotaryEmbedding are in it; TensorRT's parser knows no later one."""

TARGETS = ("onnxruntime", "tensorrt")
_STACK = "pkg.torch.onnx.stack_trace"
_NODE = re.compile(r"^inlay node (\S+) \((\S+)\)(.*)$", re.MULTILINE)
_FAILED = re.compile(r"target=torch\.ops\.([\w.]+)")
_EXECUTING = re.compile(r"While executing %(\w+)")


def segment_to_onnx(gm: GraphModule, target: str) -> onnx.ModelProto:
    """The ONNX model of a segment, as partition gives it or graph_from_json.

    target: one of TARGETS. The model passed `onnx.checker` and strict shape inference.

    Raises:
        UnsupportedModelError: an op or a type that cannot be converted; names the op, the node
            and the source line, where the graph still knows it.
        BuildError: onnx or onnxscript is not installed.
    """
    from inlay.backends.onnx.translations import Translations

    assert target in TARGETS, f"target {target!r}"
    onnx, *_ = require("onnx", "onnx.inliner", "onnxscript", extra=target)
    gm = _with_sources(gm)
    translations = Translations(target)
    model = _export(gm, translations)
    model.functions.extend(translations.functions)
    for function in translations.functions:
        model.opset_import.append(onnx.helper.make_opsetid(function.domain, 1))
    model = onnx.inliner.inline_local_functions(model)
    _unpack_int4(model)
    _name_nodes(model)
    _name_sizes(model, gm)
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    _externalise(model, gm)
    return model


def _with_sources(gm: GraphModule) -> GraphModule:
    """The graph in graph_from_json's form, each node's stack trace naming it."""
    copy = gm
    if any("spec" not in n.meta for n in gm.graph.find_nodes(op="placeholder")):
        copy = graph_from_json(graph_to_json(gm))
    for original, node in zip(gm.graph.nodes, copy.graph.nodes, strict=True):
        if node.op == "call_function":
            line = last_source_line(original)
            node.meta["stack_trace"] = f"inlay node {node.name} ({node.target}){line}"
    return copy


class _Traced(Interpreter):
    """Runs a segment so that export sees aten ops, and of ours those that are translated."""

    def __init__(self, gm: GraphModule, kept: dict[Any, Any], composed: dict[Any, Any]) -> None:
        super().__init__(gm)
        self._kept, self._replaced = kept, {**REFERENCES, **composed}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target not in self._kept:
            target = self._replaced.get(target, target)
        return target(*args, **kwargs)


class _Segment(torch.nn.Module):
    def __init__(self, interpreter: Interpreter) -> None:
        super().__init__()
        self.interpreter = interpreter

    def forward(self, *args: torch.Tensor) -> Any:
        return self.interpreter.run(*args)


def _export(gm: GraphModule, translations: Any) -> onnx.ModelProto:
    from torch.onnx import OnnxExporterError

    arguments, dynamic = example_arguments(gm)
    interpreter = _Traced(gm, translations.table, translations.composed)
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    (output,) = gm.graph.find_nodes(op="output")
    program = None
    try:
        with torch.no_grad(), torch.fx.traceback.preserve_node_meta(), _quiet():
            program = torch.export.export(
                _Segment(interpreter),
                arguments,
                dynamic_shapes=(dynamic,),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            _keep_numbers_exact(program.graph_module)
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=[f"o{index}" for index in range(len(output.args[0]))],
                custom_translation_table=translations.table,
                verbose=False,
            )
    except (OnnxExporterError, torch._dynamo.exc.UserError, RuntimeError) as error:
        raise _unsupported(gm, program, error) from error
    return made.model_proto


def _keep_numbers_exact(gm: GraphModule) -> None:
    """Compute x * 0.7071 of narrow numbers in float32 and round once: torch.onnx would round 0.7071
    to the type of x first, be it a number or a tensor without dimensions. torch does not in
    products and quotients; of sums and differences this is the more exact, and what compiled code
    does, where torch on a CPU rounds first too."""
    aten = torch.ops.aten
    arithmetic = {aten.add, aten.sub, aten.mul, aten.div, aten.rsub}
    for node in list(gm.graph.nodes):
        if getattr(node.target, "overloadpacket", None) not in arithmetic:
            continue
        narrow = node.meta["val"]
        if narrow.dtype not in (torch.bfloat16, torch.float16) or not _rounds_a_number(node):
            continue
        with gm.graph.inserting_before(node):
            for arg in (n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)):
                wide = gm.graph.call_function(aten._to_copy.default, (arg,), {"dtype": torch.float})
                wide.meta = {**node.meta, "val": arg.meta["val"].float()}
                node.replace_input_with(arg, wide)
        node.meta = {**node.meta, "val": narrow.float()}
        with gm.graph.inserting_after(node):
            kwargs = {"dtype": narrow.dtype}
            result = gm.graph.call_function(aten._to_copy.default, (node,), kwargs)
            result.meta = {**node.meta, "val": narrow}
            node.replace_all_uses_with(result)
            result.args = (node, *result.args[1:])
    gm.recompile()


def _rounds_a_number(node: Node) -> bool:
    """Whether one of its numbers has no place in the type of what it gives."""
    dtype = node.meta["val"].dtype

    def is_rounded(value: Any) -> bool:
        if isinstance(value, Node):
            value = value.meta["val"]
        if isinstance(value, torch.Tensor):
            return value.dim() == 0 and value.dtype != dtype
        is_number = isinstance(value, (int, float))
        return is_number and torch.tensor(float(value), dtype=dtype).item() != value

    return any(map(is_rounded, (*node.args, *node.kwargs.values())))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.onnx says of packages that are not there and of its own progress."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _unsupported(
    gm: GraphModule, program: torch.export.ExportedProgram | None, error: Exception
) -> UnsupportedModelError:
    """Names the node: export says which it was running, torch.onnx which op it was at."""
    where = ""
    text = "\n".join(str(one) for one in _chain(error))
    if program is not None and (failed := _FAILED.search(text)):
        # torch.onnx takes ops apart before it looks them up: special_bessel_j0 to prims.bessel_j0.
        op = failed[1].split(".")[1]
        nodes = [*program.run_decompositions().graph.nodes, *program.graph.nodes]
        made_it = [n for n in nodes if str(n.target).split(".")[1:2] == [op]]
        made_it += [n for n in nodes if f"{op}." in str(n.target)]
        where = made_it[0].meta.get("stack_trace", "") if made_it else ""
    elif executing := _EXECUTING.search(text):
        node = next(node for node in gm.graph.nodes if node.name == executing[1])
        where = node.meta["stack_trace"]
    if found := _NODE.search(where):
        where = f"node {found[1]} ({found[2]}){found[3]}"
    reason = str(_chain(error)[-1]).strip().splitlines()[0]
    return UnsupportedModelError(
        f"{where or 'a node of this model'} cannot be converted to ONNX: {reason}; choose "
        "backend='inductor'"
    )


def _chain(error: BaseException) -> list[BaseException]:
    return [error] + (_chain(error.__cause__) if error.__cause__ else [])


def _unpack_int4(model: onnx.ModelProto) -> None:
    """Let weights of two numbers in a byte be INT4 tensors."""
    import onnx

    inputs = {value.name: value for value in model.graph.input}
    nodes = list(model.graph.node)
    unpacked = {n.output[0]: n.input[0] for n in nodes if (n.domain, n.op_type) == UNPACK}
    for name in unpacked.values():
        kind = inputs[name].type.tensor_type
        kind.elem_type = onnx.TensorProto.INT4
        kind.shape.dim[-1].dim_value *= 2
    del model.graph.node[:]
    for node in nodes:
        if node.output[0] not in unpacked:
            node.input[:] = [unpacked.get(name, name) for name in node.input]
            model.graph.node.append(node)


def _name_nodes(model: onnx.ModelProto) -> None:
    """Names and doc_strings that lead back to the segment's graph, in place of torch.onnx's."""
    for index, node in enumerate(model.graph.node):
        told = {entry.key: entry.value for entry in node.metadata_props}
        del node.metadata_props[:]
        found = _NODE.search(told.get(_STACK, ""))
        if found:
            node.doc_string = f"{found[2]}{found[3]}"
        origin = found[1] if found else node.doc_string or "constant"
        node.name = f"{origin}.{node.op_type}.{index}"


def _name_sizes(model: onnx.ModelProto, gm: GraphModule) -> None:
    """Give dynamic sizes the letters of the segment's graph, in what torch.onnx computes too."""
    letters: dict[str, str] = {}
    for value, node in zip(model.graph.input, gm.graph.find_nodes(op="placeholder"), strict=True):
        for dim, size in zip(value.type.tensor_type.shape.dim, node.meta["spec"][0], strict=True):
            if dim.dim_param:
                letters[dim.dim_param] = size
    pattern = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in letters) or r"(?!)")
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = pattern.sub(lambda name: letters[name[0]], dim.dim_param)
        del value.metadata_props[:]


def _externalise(model: onnx.ModelProto, gm: GraphModule) -> None:
    """Make the weights initializers, with data that comes from elsewhere."""
    import onnx

    kinds = {n.name: n.meta["kind"] for n in gm.graph.find_nodes(op="placeholder")}
    inputs = list(model.graph.input)
    del model.graph.input[:]
    for value in inputs:
        if kinds[value.name] == "input":
            model.graph.input.append(value)
            continue
        tensor = model.graph.initializer.add(
            name=value.name,
            data_type=value.type.tensor_type.elem_type,
            dims=[dim.dim_value for dim in value.type.tensor_type.shape.dim],
            data_location=onnx.TensorProto.EXTERNAL,
        )
        tensor.external_data.add(key="location", value="weights")


def fill_weights(
    model: onnx.ModelProto,
    weight: Callable[[str], torch.Tensor],
    only: Collection[str] | None = None,
) -> None:
    """Write the weights into a model, all or only some; weight gives one by its name in the
    segment."""
    import onnx

    for tensor in model.graph.initializer:
        if only is not None and tensor.name not in only:
            continue
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            data = weight(tensor.name).contiguous().flatten().view(torch.uint8)
            if tensor.data_type == onnx.TensorProto.INT4:
                data = data ^ 0x88  # ours are 0..15, 8 being nothing
            tensor.raw_data = data.numpy().tobytes()
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT
