// The torch side of quantized linear layers: checks, arguments, threads.
#pragma once

#include "quantized_packed.h"

namespace inlay {
namespace {

// Arguments in the form that kernels read, and what keeps them alive.
struct QuantizedCall {
  const char* op;
  const PackedCodes& w;
  const Tensor& x;
  QuantizedProduct product{};
  std::vector<Tensor> owners{};

  const void* keep(const Tensor& t) {
    owners.push_back(t.contiguous());
    return owners.back().const_data_ptr();
  }
};

QuantizedCall start_call(const char* op, const PackedCodes& w, const Tensor& x,
                         int64_t out_features) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == w.in_features && out_features == w.out_features,
              "inlay_cpu::", op, ": the packed weight is [", w.out_features, ", ", w.in_features,
              "], got x ", x.sizes(), " and out_features ", out_features);
  QuantizedCall call{op, w, x};
  QuantizedProduct& p = call.product;
  p.format = w.format;
  p.codes = w.codes.const_data_ptr<uint8_t>();
  if (w.column_sums.defined()) p.column_sums = w.column_sums.const_data_ptr<int32_t>();
  p.rows = x.numel() / w.in_features;
  p.in_features = w.in_features;
  p.out_features = w.out_features;
  return call;
}

void set_scale(QuantizedCall& call, const Tensor& scale, const OptionalTensor& zero) {
  QuantizedProduct& p = call.product;
  const bool flat = scale.dim() == 1 && p.format == Format::kIntegers;
  const int64_t groups = flat ? 1 : scale.dim() == 2 ? scale.size(0) : 0;
  TORCH_CHECK(groups > 0 && scale.size(-1) == p.out_features && p.in_features % groups == 0,
              "inlay_cpu::", call.op, ": scale must be [groups, ", p.out_features, "] with groups "
              "dividing ", p.in_features, " inputs, got ", scale.sizes());
  TORCH_CHECK(groups == 1 || p.format != Format::kIntegers, "inlay_cpu::", call.op,
              ": w_scale must be [1, ", p.out_features, "], got ", scale.sizes());
  TORCH_CHECK(scale.is_floating_point(), "inlay_cpu::", call.op, ": scale must be float32, "
              "bfloat16 or float16, got ", scale.scalar_type());
  p.group_size = p.in_features / groups;
  p.scale_dtype = dtype_of(call.op, "scale", scale.scalar_type());
  p.scale = call.keep(scale);
  if (!zero) return;
  const auto wanted = p.format == Format::kInt4 ? at::kByte : at::kChar;
  TORCH_CHECK(p.format != Format::kFloat8 && zero->scalar_type() == wanted &&
              zero->sizes() == scale.sizes(), "inlay_cpu::", call.op, ": zero must be ", wanted,
              " and like scale ", scale.sizes(), " (None for float8 weights), got ",
              zero->scalar_type(), " ", zero->sizes());
  p.zero = static_cast<const uint8_t*>(call.keep(*zero));
}

// x's scales [..., 1 or groups] or [1], and zeros like them.
void set_row_scale(QuantizedCall& call, const Tensor& scale, const OptionalTensor& zero) {
  QuantizedProduct& p = call.product;
  const int64_t groups = p.in_features / p.group_size, rows = p.rows;
  const bool one = scale.numel() == 1, grouped = groups > 1 && scale.numel() == rows * groups;
  TORCH_CHECK(scale.scalar_type() == at::kFloat && (one || grouped || scale.numel() == rows),
              "inlay_cpu::", call.op, ": x_scale must be float32 and [1], or a number for each of ",
              rows, " rows, or for each of their ", groups, " groups, got ", scale.scalar_type(),
              " ", scale.sizes());
  p.x_scale = static_cast<const float*>(call.keep(scale));
  p.x_scale_row = grouped ? groups : one ? 0 : 1;
  p.x_scale_group = grouped ? 1 : 0;
  if (!zero) return;
  TORCH_CHECK(zero->scalar_type() == at::kInt && zero->sizes() == scale.sizes(), "inlay_cpu::",
              call.op, ": x_zero must be int32 and like x_scale ", scale.sizes(), ", got ",
              zero->scalar_type(), " ", zero->sizes());
  p.x_zero = static_cast<const int32_t*>(call.keep(*zero));
  p.x_zero_row = p.x_scale_row;
}

// As distinct_rows of linear.h, of numbers that have scales and zero points.
int64_t distinct_rows(const QuantizedProduct& p, const void* x, int64_t row_bytes) {
  const auto distinct = [&](const void* rows, int64_t bytes) {
    return bytes ? distinct_rows(rows, p.rows, bytes, bytes) : 1;
  };
  const int64_t scale_bytes = p.x_scale ? p.x_scale_row * int64_t{sizeof(float)} : 0;
  const int64_t zero_bytes = p.x_zero ? p.x_zero_row * int64_t{sizeof(int32_t)} : 0;
  return std::max({distinct(x, row_bytes), distinct(p.x_scale, scale_bytes),
                   distinct(p.x_zero, zero_bytes)});
}

Tensor finish_call(QuantizedCall& call, const OptionalTensor& bias, at::ScalarType dtype) {
  QuantizedProduct& p = call.product;
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, "inlay_cpu::",
              call.op, ": dtype must be float32, bfloat16 or float16, got ", dtype);
  if (bias) {
    TORCH_CHECK(bias->is_floating_point() && bias->dim() == 1 && bias->size(0) == p.out_features,
                "inlay_cpu::", call.op, ": bias must be [", p.out_features, "] of floats, got ",
                bias->scalar_type(), " ", bias->sizes());
    p.bias_dtype = dtype_of(call.op, "bias", bias->scalar_type());
    p.bias = call.keep(*bias);
  }
  auto shape = call.x.sizes().vec();
  shape.back() = p.out_features;
  Tensor y = at::empty(shape, call.x.options().dtype(dtype));
  p.y = static_cast<char*>(y.mutable_data_ptr());
  p.y_dtype = dtype_of(call.op, "dtype", dtype);
  if (p.rows == 0) return y;
  const DType x_dtype = dtype_of(call.op, "x", call.x.scalar_type());
  const int64_t num_rows = p.rows;
  const void* x = call.keep(call.x);
  p.rows = distinct_rows(p, x, p.in_features * call.x.element_size());
  const PreparedRows rows = prepare_rows(p, x_dtype, x, p.rows);
  p.x = static_cast<const char*>(rows.memory.const_data_ptr());
  p.x_stride = rows.stride;
  multiply_all({p}, *rows.kernels);
  repeat_last_row(p.y, p.rows, num_rows, p.out_features * y.element_size());
  return y;
}

void check_input(const QuantizedCall& call, at::ScalarType x, Format format, const char* packing) {
  TORCH_CHECK(call.w.format == format && call.x.scalar_type() == x, "inlay_cpu::", call.op,
              ": q must be ", x, " and the weight packed by ", packing, ", got ",
              call.x.scalar_type(), " and a weight packed as ", format_name(call.w.format));
}

Tensor int8_linear(const Tensor& q, const Tensor& x_scale, const OptionalTensor& x_zero,
                   const Tensor& handle, const Tensor& w_scale, const OptionalTensor& bias,
                   int64_t out_features, at::ScalarType dtype) {
  auto call = start_call("int8_linear", resolve_codes("int8_linear", handle), q, out_features);
  check_input(call, at::kChar, Format::kIntegers, "pack_int8");
  set_scale(call, w_scale, std::nullopt);
  set_row_scale(call, x_scale, x_zero);
  return finish_call(call, bias, dtype);
}

Tensor fp8_linear(const Tensor& q, const Tensor& x_scale, const Tensor& handle,
                  const Tensor& w_scale, const OptionalTensor& bias, int64_t out_features,
                  at::ScalarType dtype) {
  auto call = start_call("fp8_linear", resolve_codes("fp8_linear", handle), q, out_features);
  check_input(call, at::kFloat8_e4m3fn, Format::kFloat8, "pack_weight_only from float8_e4m3fn");
  set_scale(call, w_scale, std::nullopt);
  set_row_scale(call, x_scale, std::nullopt);
  return finish_call(call, bias, dtype);
}

Tensor weight_only_linear(const Tensor& x, const Tensor& handle, const Tensor& scale,
                          const OptionalTensor& zero, const OptionalTensor& bias,
                          int64_t out_features) {
  const char* op = "weight_only_linear";
  auto call = start_call(op, resolve_codes(op, handle), x, out_features);
  TORCH_CHECK(call.w.format != Format::kIntegers && x.is_floating_point(), "inlay_cpu::", op,
              ": x must be float32, bfloat16 or float16 and the weight packed by "
              "pack_weight_only, got ", x.scalar_type(), " and a weight packed as ",
              format_name(call.w.format));
  set_scale(call, scale, zero);
  return finish_call(call, bias, x.scalar_type());
}

}  // namespace
}  // namespace inlay
