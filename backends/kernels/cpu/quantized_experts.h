// Mixtures of experts whose weights have 8 or 4 bits: the products of quantized_ops.h, of rows that
// are grouped by expert, all experts' blocks in one parallel loop. Only chosen experts are read.
#pragma once

#include "experts_ops.h"
#include "quantized_ops.h"

namespace inlay {
namespace {

constexpr int64_t kQuantizedExpertsMagic = 0x3130584551504C49;  // "ILPQEX01"

struct alignas(64) CodedExperts {
  int64_t magic = kQuantizedExpertsMagic;
  int64_t address = reinterpret_cast<int64_t>(this);
  int64_t out_features, in_features;
  std::vector<std::unique_ptr<PackedCodes>> experts;
};

const CodedExperts& resolve_coded_experts(const char* name, const Tensor& handle) {
  const int64_t* head = handle.scalar_type() == at::kLong && handle.numel() == kHandleLength
                            ? handle.const_data_ptr<int64_t>()
                            : nullptr;
  TORCH_CHECK(head && head[0] == kQuantizedExpertsMagic &&
              head[1] == reinterpret_cast<int64_t>(head), "inlay_cpu::quantized_experts: ", name,
              " must be the very tensor that inlay_cpu::pack_quantized_experts returned, got ",
              handle.scalar_type(), " ", handle.sizes());
  return *reinterpret_cast<const CodedExperts*>(head);
}

Format experts_format(at::ScalarType dtype, const std::string& activations) {
  const char* op = "pack_quantized_experts";
  if (activations == "none") return weight_only_format(op, dtype);
  TORCH_CHECK(activations == "int8" || activations == "fp8", "inlay_cpu::", op,
              ": activations must be none, int8 or fp8, got '", activations, "'");
  const auto wanted = activations == "int8" ? at::kChar : at::kFloat8_e4m3fn;
  TORCH_CHECK(dtype == wanted, "inlay_cpu::", op, ": activations '", activations,
              "' need weights of ", wanted, ", got ", dtype);
  return activations == "int8" ? Format::kIntegers : Format::kFloat8;
}

Tensor pack_quantized_experts(const Tensor& weight, std::string activations, bool interleaved) {
  check_weight("pack_quantized_experts", weight, 3);
  const Format format = experts_format(weight.scalar_type(), activations);
  auto packed = std::make_unique<CodedExperts>();
  for (int64_t expert = 0; expert < weight.size(0); expert++) {
    Tensor one = weight.select(0, expert);
    if (interleaved) {
      const auto every_second = [&](int64_t first) { return one.slice(0, first, std::nullopt, 2); };
      one = at::cat({every_second(0), every_second(1)});
    }
    packed->experts.push_back(make_codes(format, one));
  }
  packed->out_features = packed->experts[0]->out_features;
  packed->in_features = packed->experts[0]->in_features;
  return make_handle(std::move(packed));
}

// One side's products: the weights, and what goes with them.
struct CodedSide {
  const char* name;
  const CodedExperts& w;
  const Tensor& scale;
  const OptionalTensor& zero;
  bool quantizes;  // its rows, each by itself
};

void check_side(const CodedSide& side) {
  const auto shape = side.scale.sizes();
  TORCH_CHECK(side.scale.dim() == 3 && shape[0] == static_cast<int64_t>(side.w.experts.size()),
              "inlay_cpu::quantized_experts: ", side.name, "_scale must be [",
              side.w.experts.size(), ", groups, ", side.w.out_features, "], got ", shape);
  TORCH_CHECK(shape[1] > 0 && side.w.in_features % shape[1] == 0, "inlay_cpu::quantized_experts: ",
              side.name, "_scale ", shape, " must have groups that divide ", side.w.in_features,
              " inputs");
  TORCH_CHECK(!side.quantizes || shape[1] == 1, "inlay_cpu::quantized_experts: ", side.name,
              "_scale must have one group where activations are quantized, got ", shape);
}

struct GroupedRows {
  PreparedRows rows;
  Tensor scales;  // float32 [rows], where they were quantized
};

// x [rows, K], quantized where this side wants it, in the form that the kernels read.
GroupedRows prepare_side(const CodedSide& side, const Tensor& x) {
  const PackedCodes& w = *side.w.experts[0];
  const Tensor source = x.contiguous();
  const DType dtype = dtype_of("quantized_experts", "x", x.scalar_type());
  const int64_t rows = x.size(0), width = w.in_features;
  QuantizedProduct p{};
  p.format = w.format;
  p.in_features = width;
  p.group_size = width / side.scale.size(1);
  if (!side.quantizes) return {prepare_rows(p, dtype, source.const_data_ptr(), rows), {}};
  const DType to = w.format == Format::kIntegers ? DType::kInt8 : DType::kFloat8;
  const Tensor q = at::empty({rows, width}, at::TensorOptions(at::kByte));
  Tensor scales = at::empty({rows}, at::TensorOptions(at::kFloat));
  const Rows job{dtype, static_cast<const char*>(source.const_data_ptr()),
                 static_cast<char*>(q.mutable_data_ptr()), width, width, 0};
  auto* s = scales.mutable_data_ptr<float>();
  at::parallel_for(0, rows, std::max<int64_t>(1, kBytesPerTask / width / 2),
                   [&](int64_t first, int64_t last) {
    isa()->quantized->quantize(to, job, s, first, last);
  });
  return {prepare_rows(p, to, q.const_data_ptr(), rows), scales};
}

// Row i of the result is row index[i] of the given ones.
GroupedRows pick_rows(const GroupedRows& from, const std::vector<int64_t>& index) {
  const auto count = static_cast<int64_t>(index.size());
  const int64_t stride = from.rows.stride;
  GroupedRows result{from.rows, {}};
  result.rows.memory = at::empty({count * stride}, at::TensorOptions(at::kByte));
  const auto* x = static_cast<const char*>(from.rows.memory.const_data_ptr());
  auto* to = static_cast<char*>(result.rows.memory.mutable_data_ptr());
  for (int64_t row = 0; row < count; row++)
    std::memcpy(to + row * stride, x + index[row] * stride, stride);
  if (!from.scales.defined()) return result;
  result.scales = at::empty({count}, from.scales.options());
  auto* scales = result.scales.mutable_data_ptr<float>();
  for (int64_t row = 0; row < count; row++)
    scales[row] = from.scales.const_data_ptr<float>()[index[row]];
  return result;
}

QuantizedCall group_call(const CodedSide& side, const Group& g, const GroupedRows& x,
                         const Tensor& y) {
  const PackedCodes& w = *side.w.experts[g.expert];
  const auto of_expert = [&](const Tensor& t) { return t.select(0, g.expert); };
  const OptionalTensor zero =
      side.zero ? OptionalTensor(of_expert(*side.zero)) : std::nullopt;
  QuantizedCall call =
      start_call("quantized_experts", w, y.new_empty({g.rows, w.in_features}), w.out_features);
  set_scale(call, of_expert(side.scale), zero);
  QuantizedProduct& p = call.product;
  p.x = static_cast<const char*>(x.rows.memory.const_data_ptr()) + g.begin * x.rows.stride;
  p.x_stride = x.rows.stride;
  if (x.scales.defined()) {
    p.x_scale = x.scales.const_data_ptr<float>() + g.begin;
    p.x_scale_row = 1;
  }
  p.y_dtype = dtype_of("quantized_experts", "x", y.scalar_type());
  p.y = static_cast<char*>(y.mutable_data_ptr()) + g.begin * w.out_features * y.element_size();
  return call;
}

// Rows that only pad a group have no result: what lies there is activated and never read.
Products multiply_coded(const Grouping& grouping, const CodedSide& side, const GroupedRows& x,
                        at::ScalarType dtype) {
  const int64_t width = side.w.out_features;
  const Tensor y = at::empty({grouping.rows(), width}, at::TensorOptions(dtype));
  std::vector<QuantizedCall> calls;
  std::vector<QuantizedProduct> products;
  for (const Group& g : grouping.groups) {
    calls.push_back(group_call(side, g, x, y));
    products.push_back(calls.back().product);
  }
  multiply_all(products, *x.rows.kernels);
  Products result{{}, {y}};
  const auto* memory = static_cast<const char*>(y.const_data_ptr());
  for (int64_t row = 0; row < grouping.rows(); row++)
    result.rows.push_back(memory + row * width * y.element_size());
  return result;
}

Tensor quantized_experts(
    const Tensor& x, const Tensor& top_k_index, const Tensor& top_k_weights,
    const Tensor& up_handle, const Tensor& up_scale, const OptionalTensor& up_zero,
    const Tensor& down_handle, const Tensor& down_scale, const OptionalTensor& down_zero,
    std::string activations, const OptionalTensor& up_bias, const OptionalTensor& down_bias,
    const OptionalTensor& norm_weight, std::string activation, bool gated, double alpha,
    double gate_limit, double up_limit, bool limit_activated, double up_offset,
    double gate_softcap, double up_softcap, double norm_eps) {
  const bool quantizes = activations != "none";
  const CodedSide up{"up", resolve_coded_experts("up", up_handle), up_scale, up_zero, quantizes};
  const CodedSide down{"down", resolve_coded_experts("down", down_handle), down_scale, down_zero,
                       quantizes};
  const auto dtype = x.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
              "inlay_cpu::quantized_experts: x must be float32, bfloat16 or float16, got ", dtype);
  for (const CodedSide* side : {&up, &down}) {
    check_side(*side);
    const Format format = side->w.experts[0]->format;
    TORCH_CHECK((format == Format::kIntegers) == (activations == "int8") &&
                (activations != "fp8" || format == Format::kFloat8),
                "inlay_cpu::quantized_experts: ", side->name, " was packed as ",
                format_name(format), ", for other activations than '", activations, "'");
  }
  const auto count = [](const CodedExperts& w) { return static_cast<int64_t>(w.experts.size()); };
  return mix_experts(
      x, top_k_index, top_k_weights,
      {count(up.w), up.w.out_features, up.w.in_features, count(down.w), down.w.out_features,
       down.w.in_features},
      {up_bias, down_bias, norm_weight, activation, gated, alpha, gate_limit, up_limit,
       limit_activated, up_offset, gate_softcap, up_softcap, norm_eps},
      [&](const Grouping& g, const Tensor& tokens) {
        return multiply_coded(g, up, pick_rows(prepare_side(up, tokens), g.token_of_row), dtype);
      },
      [&](const Grouping& g, const Tensor& rows) {
        return multiply_coded(g, down, prepare_side(down, rows), dtype);
      });
}

}  // namespace
}  // namespace inlay
