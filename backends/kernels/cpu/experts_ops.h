// The torch side of the mixture of experts: checks, arguments, the steps in order.
#pragma once

#include "experts.h"
#include "experts_packed.h"
#include "paged_attention.h"

#include <limits>

namespace inlay {
namespace {

Activation parse_activation(const std::string& name) {
  static const char* const names[] = {"silu",  "gelu",    "gelu_tanh", "relu",
                                      "relu2", "sigmoid", "tanh",      "linear"};
  for (int i = 0; i < 8; i++)
    if (name == names[i]) return static_cast<Activation>(i);
  TORCH_CHECK(false, "inlay_cpu::experts: activation must be silu, gelu, gelu_tanh, relu, relu2, "
              "sigmoid, tanh or linear, got '", name, "'");
}

void check_experts(const Tensor& x, const Tensor& index, const Tensor& weights,
                   const PackedExperts& up, const PackedExperts& down, bool gated) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK(dtype == up.dtype() && dtype == down.dtype(), "inlay_cpu::experts: x must have the "
              "weights' dtype ", up.dtype(), ", got ", dtype);
  TORCH_CHECK(x.dim() == 2 && index.dim() == 2 && index.scalar_type() == at::kLong &&
              index.size(0) == x.size(0) && index.sizes() == weights.sizes(),
              "inlay_cpu::experts: x must be [tokens, hidden], top_k_index int64 [tokens, k] and "
              "top_k_weights like it, got ", x.sizes(), ", ", index.scalar_type(), " ",
              index.sizes(), ", ", weights.sizes());
  TORCH_CHECK(up.experts.size() == down.experts.size() && x.size(1) == up.in_features &&
              up.out_features == (gated ? 2 : 1) * down.in_features,
              "inlay_cpu::experts: the packed weights are ", up.experts.size(), " x [",
              up.out_features, ", ", up.in_features, "] and ", down.experts.size(), " x [",
              down.out_features, ", ", down.in_features, "], which do not fit each other or x ",
              x.sizes());
}

// The memory of a bias or norm weight; kept alive in `owners`.
const void* vector_data(const char* name, const std::optional<Tensor>& v, at::IntArrayRef shape,
                        const Tensor& x, std::vector<Tensor>& owners) {
  if (!v) return nullptr;
  TORCH_CHECK(v->sizes() == shape && v->scalar_type() == x.scalar_type(), "inlay_cpu::experts: ",
              name, " must be ", x.scalar_type(), " ", shape, ", got ", v->scalar_type(), " ",
              v->sizes());
  owners.push_back(v->contiguous());
  return owners.back().const_data_ptr();
}

struct Bounds {
  double alpha, gate_limit, up_limit, up_offset, gate_softcap, up_softcap, norm_eps;
};

ExpertsArgs make_args(at::ScalarType dtype, const std::string& activation, bool gated,
                      bool limit_activated, const Bounds& bounds) {
  const auto f = [](double value) { return static_cast<float>(value); };
  const auto limit = [&](double value) {
    return value > 0 ? f(value) : std::numeric_limits<float>::infinity();
  };
  ExpertsArgs args{};
  args.dtype = dtype == at::kFloat      ? DType::kFloat32
               : dtype == at::kBFloat16 ? DType::kBFloat16
                                        : DType::kFloat16;
  args.activation = parse_activation(activation);
  args.gated = gated;
  args.limit_activated = limit_activated;
  args.alpha = f(bounds.alpha);
  args.gate_limit = limit(bounds.gate_limit);
  args.up_limit = limit(bounds.up_limit);
  args.up_offset = f(bounds.up_offset);
  args.gate_softcap = f(bounds.gate_softcap);
  args.up_softcap = f(bounds.up_softcap);
  args.norm_eps = f(bounds.norm_eps);
  return args;
}

Tensor experts(const Tensor& x, const Tensor& top_k_index, const Tensor& top_k_weights,
               const Tensor& up_handle, const Tensor& down_handle,
               const std::optional<Tensor>& up_bias, const std::optional<Tensor>& down_bias,
               const std::optional<Tensor>& norm_weight, std::string activation, bool gated,
               double alpha, double gate_limit, double up_limit, bool limit_activated,
               double up_offset, double gate_softcap, double up_softcap, double norm_eps) {
  const PackedExperts& up = resolve_experts("up", up_handle);
  const PackedExperts& down = resolve_experts("down", down_handle);
  check_experts(x, top_k_index, top_k_weights, up, down, gated);
  const auto num_experts = static_cast<int64_t>(up.experts.size());
  const Grouping grouping = group_by_expert(top_k_index, num_experts);
  const Tensor weights = top_k_weights.to(at::kFloat).contiguous();
  const Tensor active = at::empty({grouping.rows(), down.in_features}, x.options());
  Tensor out = at::empty({x.size(0), down.out_features}, x.options());
  std::vector<Tensor> owners;
  ExpertsArgs args = make_args(
      x.scalar_type(), activation, gated, limit_activated,
      {alpha, gate_limit, up_limit, up_offset, gate_softcap, up_softcap, norm_eps});
  args.inner = down.in_features;
  args.hidden = down.out_features;
  args.top_k = top_k_index.size(1);
  args.expert_of_row = grouping.expert_of_row.data();
  args.up_bias = vector_data("up_bias", up_bias, {num_experts, up.out_features}, x, owners);
  args.down_bias = vector_data("down_bias", down_bias, {num_experts, args.hidden}, x, owners);
  args.norm_weight = vector_data("norm_weight", norm_weight, {args.hidden}, x, owners);
  args.row_of_pair = grouping.row_of_pair.data();
  args.pair_weights = weights.const_data_ptr<float>();
  args.active = active.mutable_data_ptr();
  args.out = out.mutable_data_ptr();

  const ExpertsKernels& kernels = *isa()->experts;
  const auto grain = [](int64_t width) { return std::max<int64_t>(1, (1 << 13) / width); };
  const Products ups = multiply_groups(grouping, up, gather_rows(grouping, x));
  args.up_rows = ups.rows.data();
  at::parallel_for(0, grouping.rows(), grain(args.inner), [&](int64_t first, int64_t last) {
    kernels.activate(args, first, last);
  });
  const Products downs = multiply_groups(grouping, down, active);
  args.down_rows = downs.rows.data();
  at::parallel_for(0, x.size(0), grain(args.hidden * args.top_k), [&](int64_t first, int64_t last) {
    std::vector<float> scratch(2 * (args.hidden + kMaxLanes));
    kernels.combine(args, first, last, scratch.data());
  });
  return out;
}

}  // namespace
}  // namespace inlay
