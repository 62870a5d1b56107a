"""Our ops in ONNX: what torch.onnx is told of them.

An op that is not here is exported as its reference in `passes/ops.py`. Those that are here have a
standard ONNX op of the same meaning, or none that export could trace through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inlay.backends.onnx.experts import Mixture, experts_function
from inlay.backends.onnx.quantized import Quantized

ops = torch.ops.inlay
DOMAIN = "inlay"
BESIDE = ("up_bias", "down_bias", "norm_weight")
TYPES = ("float", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "int4", "float8e4m3fn")


class Translations:
    """For one segment: `table` for torch.onnx, and the ONNX functions that its calls need.

    composed: ops that are exported as a few others, of which some are in the table.
    """

    def __init__(self, target: str) -> None:
        import onnxscript

        self.target = target
        self.functions: list[Any] = []
        self._onnx: Any = onnxscript.opset23
        quantized = Quantized(target, self._onnx, self.call_op)
        methods: dict[Any, Callable[..., Any]] = {
            ops.linear.default: self.linear,
            ops.rms_norm.default: self.rms_norm,
            ops.rope.default: self.rope,
            ops.experts.default: self.experts,
            ops.quantized_experts.default: self.quantized_experts,
            ops.int8_linear.default: quantized.int8_linear,
            ops.weight_only_linear.default: quantized.weight_only_linear,
        }
        if target == "tensorrt":
            methods |= {
                ops.quantize_static.default: quantized.quantize_static,
                ops.fp8_linear.default: quantized.fp8_linear,
            }
        # torch.onnx notes things on what it calls, which a method does not let it.
        self.table: dict[Any, Callable[..., Any]] = {op: partial(f) for op, f in methods.items()}
        self.composed: dict[Any, Callable[..., Any]] = {
            ops.add_rms_norm.default: add_rms_norm,
        }

    def linear(self, x: Any, weight: Any, bias: Any = None) -> Any:
        """MatMul over a weight that a session transposes once: Gemm, which would take it as it
        lies, is 1 to 6 times as slow in ONNX Runtime for 4 to 64 rows."""
        op = self._onnx
        y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        return y if bias is None else op.Add(y, bias)

    def rms_norm(
        self,
        x: Any,
        weight: Any,
        eps: float,
        weight_offset: float = 0.0,
        scale_in_float: bool = False,
    ) -> Any:
        """RMSNormalization computes in float32 and casts to its scale's dtype before it scales."""
        op, narrow = self._onnx, x.dtype
        if weight is None:
            weight = op.CastLike(op.Constant(value_floats=[1.0] * x.shape[-1]), x)
        elif scale_in_float:
            x, weight = op.Cast(x, to=1), op.Cast(weight, to=1)
        if weight_offset:
            weight = op.Add(weight, op.CastLike(op.Constant(value_float=weight_offset), weight))
        y = op.RMSNormalization(x, weight, axis=-1, epsilon=eps, stash_type=1)
        return op.Cast(y, to=narrow) if scale_in_float else y

    def rope(self, x: Any, cos: Any, sin: Any, interleaved: bool = False) -> Any:
        op = self._onnx
        if x.dtype == cos.dtype and _is_one_row(x.shape) and _is_one_row(cos.shape, heads=1):
            axis = op.Constant(value_ints=[1])
            caches = op.Squeeze(cos, axis), op.Squeeze(sin, axis)
            return op.RotaryEmbedding(x, *caches, interleaved=int(interleaved))
        size = int(x.shape[-1])
        if interleaved:
            first, second = self._every_second(x, 0), self._every_second(x, 1)
        else:
            first, second = op.Split(x, axis=-1, num_outputs=2)
        if x.dtype != cos.dtype:
            first, second, cos, sin = self._promoted(first, second, cos, sin)
        turned = (
            op.Sub(op.Mul(first, cos), op.Mul(second, sin)),
            op.Add(op.Mul(second, cos), op.Mul(first, sin)),
        )
        if not interleaved:
            return op.Concat(*turned, axis=-1)
        last = op.Constant(value_ints=[-1])
        pairs = op.Concat(*(op.Unsqueeze(one, last) for one in turned), axis=-1)
        shape = op.Concat(op.Shape(x, start=0, end=-1), op.Constant(value_ints=[size]), axis=0)
        return op.Reshape(pairs, shape)

    def _every_second(self, x: Any, begin: int) -> Any:
        op = self._onnx
        numbers = [op.Constant(value_ints=[n]) for n in (begin, int(x.shape[-1]), -1, 2)]
        return op.Slice(x, *numbers)

    def _promoted(self, *values: Any) -> tuple[Any, ...]:
        """float32, where one of two float dtypes is wider: halves and bfloat16 promote to it."""
        return tuple(self._onnx.Cast(value, to=1) for value in values)

    def experts(self, *args: Any, **kwargs: Any) -> Any:
        return self._mixture(ops.experts.default, ("up", "down"), args, kwargs)

    def quantized_experts(self, *args: Any, **kwargs: Any) -> Any:
        names = [f"{name}{part}" for name in ("up", "down") for part in ("", "_scale", "_zero")]
        return self._mixture(ops.quantized_experts.default, names, args, kwargs)

    def _mixture(
        self, target: Any, matrices: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        schema = target._schema.arguments
        given = {argument.name: argument.default_value for argument in schema}
        given |= dict(zip(given, args, strict=False)) | kwargs
        leading = [given.pop(name) for name in ("x", "top_k_index", "top_k_weights")]
        tensors = {name: given.pop(name) for name in (*matrices, *BESIDE)}
        tensors = {name: value for name, value in tensors.items() if value is not None}
        mixture = Mixture(
            {n: [int(d) for d in v.shape] for n, v in tensors.items() if n in matrices},
            [name for name in tensors if name in BESIDE],
            int(leading[0].shape[-1]),
            int(leading[0].dtype),
            given,
            0 if target == ops.experts.default else int(tensors["up"].dtype),
        )
        function = experts_function(f"Experts{len(self.functions)}", self.target, mixture)
        return self._call(function, *leading, *tensors.values())

    def _call(self, function: Any, *args: Any) -> Any:
        """Call a function of ours, which joins the model's."""
        self.functions.append(function)
        return self.call_op(DOMAIN, function.name, *args)

    def call_op(self, domain: str, name: str, *args: Any, **attributes: Any) -> Any:
        """An op that onnxscript has no schema of; its inputs may have any type."""
        from onnx.defs import OpSchema
        from onnxscript.values import Op, Opset

        anything = [f"tensor({one})" for one in TYPES]
        types = [f"T{index}" for index in range(len(args) + 1)]
        schema = OpSchema(
            name,
            domain,
            1,
            inputs=[OpSchema.FormalParameter(f"in_{one}", one) for one in types[1:]],
            outputs=[OpSchema.FormalParameter("out", types[0])],
            type_constraints=[(one, anything, "") for one in types],
            attributes=[OpSchema.Attribute(key, OpSchema.AttrType.INT, "") for key in attributes],
        )
        return Op(Opset(domain, 1), name, schema)(*args, **attributes)


def _is_one_row(shape: Any, heads: int | None = None) -> bool:
    """[1, heads, T, D]: the layout of RotaryEmbedding, with one batch."""
    return len(shape) == 4 and shape[0] == 1 and (heads is None or shape[1] == heads)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    scale_in_float: bool = False,
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return ops.rms_norm(total, weight, eps, weight_offset, scale_in_float), total
