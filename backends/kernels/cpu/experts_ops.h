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

// Of the packed weights.
struct ExpertsSizes {
  int64_t num_up, up_out, up_in, num_down, down_out, down_in;
};

void check_experts(const Tensor& x, const Tensor& index, const Tensor& weights,
                   const ExpertsSizes& s, bool gated) {
  TORCH_CHECK(x.dim() == 2 && index.dim() == 2 && index.scalar_type() == at::kLong &&
              index.size(0) == x.size(0) && index.sizes() == weights.sizes(),
              "inlay_cpu::experts: x must be [tokens, hidden], top_k_index int64 [tokens, k] and "
              "top_k_weights like it, got ", x.sizes(), ", ", index.scalar_type(), " ",
              index.sizes(), ", ", weights.sizes());
  TORCH_CHECK(s.num_up == s.num_down && x.size(1) == s.up_in &&
              s.up_out == (gated ? 2 : 1) * s.down_in, "inlay_cpu::experts: the packed weights are ",
              s.num_up, " x [", s.up_out, ", ", s.up_in, "] and ", s.num_down, " x [", s.down_out,
              ", ", s.down_in, "], which do not fit each other or x ", x.sizes());
}

// The memory of a bias or norm weight; kept alive in `owners`.
const void* vector_data(const char* name, const OptionalTensor& v, at::IntArrayRef shape,
                        const Tensor& x, std::vector<Tensor>& owners) {
  if (!v) return nullptr;
  TORCH_CHECK(v->sizes() == shape && v->scalar_type() == x.scalar_type(), "inlay_cpu::experts: ",
              name, " must be ", x.scalar_type(), " ", shape, ", got ", v->scalar_type(), " ",
              v->sizes());
  owners.push_back(v->contiguous());
  return owners.back().const_data_ptr();
}

struct ExpertsOptions {
  const OptionalTensor &up_bias, &down_bias, &norm_weight;
  std::string activation;
  bool gated;
  double alpha, gate_limit, up_limit;
  bool limit_activated;
  double up_offset, gate_softcap, up_softcap, norm_eps;
};

ExpertsArgs make_args(at::ScalarType dtype, const ExpertsOptions& o) {
  const auto f = [](double value) { return static_cast<float>(value); };
  const auto limit = [&](double value) {
    return value > 0 ? f(value) : std::numeric_limits<float>::infinity();
  };
  ExpertsArgs args{};
  args.dtype = dtype == at::kFloat      ? DType::kFloat32
               : dtype == at::kBFloat16 ? DType::kBFloat16
                                        : DType::kFloat16;
  args.activation = parse_activation(o.activation);
  args.gated = o.gated;
  args.limit_activated = o.limit_activated;
  args.alpha = f(o.alpha);
  args.gate_limit = limit(o.gate_limit);
  args.up_limit = limit(o.up_limit);
  args.up_offset = f(o.up_offset);
  args.gate_softcap = f(o.gate_softcap);
  args.up_softcap = f(o.up_softcap);
  args.norm_eps = f(o.norm_eps);
  return args;
}

// As distinct_rows, of tokens that are described by several tensors.
int64_t distinct_tokens(std::initializer_list<Tensor> all) {
  int64_t most = 0;
  for (const Tensor& t : all) {
    const int64_t count = t.size(0), row_bytes = t.numel() / std::max<int64_t>(1, count) * t.element_size();
    const bool taken = count > 0 && t.is_contiguous();
    most = std::max(most, taken ? distinct_rows(t.const_data_ptr(), count, row_bytes, row_bytes) : count);
  }
  return most;
}

// The whole layer; up(grouping, x of tokens) and down(grouping, x of grouped rows) are the products.
template <class Up, class Down>
Tensor mix_experts(const Tensor& all_x, const Tensor& all_index, const Tensor& all_weights,
                   const ExpertsSizes& sizes, const ExpertsOptions& options, const Up& up,
                   const Down& down) {
  check_experts(all_x, all_index, all_weights, sizes, options.gated);
  const int64_t tokens = distinct_tokens({all_x, all_index, all_weights});
  const Tensor x = all_x.narrow(0, 0, tokens), top_k_index = all_index.narrow(0, 0, tokens),
               top_k_weights = all_weights.narrow(0, 0, tokens);
  const Grouping grouping = group_by_expert(top_k_index, sizes.num_up);
  const Tensor weights = top_k_weights.to(at::kFloat).contiguous();
  const Tensor active = at::empty({grouping.rows(), sizes.down_in}, x.options());
  Tensor out = at::empty({all_x.size(0), sizes.down_out}, x.options());
  std::vector<Tensor> owners;
  ExpertsArgs args = make_args(x.scalar_type(), options);
  args.inner = sizes.down_in;
  args.hidden = sizes.down_out;
  args.top_k = top_k_index.size(1);
  args.expert_of_row = grouping.expert_of_row.data();
  args.up_bias =
      vector_data("up_bias", options.up_bias, {sizes.num_up, sizes.up_out}, x, owners);
  args.down_bias =
      vector_data("down_bias", options.down_bias, {sizes.num_up, args.hidden}, x, owners);
  args.norm_weight = vector_data("norm_weight", options.norm_weight, {args.hidden}, x, owners);
  args.row_of_pair = grouping.row_of_pair.data();
  args.pair_weights = weights.const_data_ptr<float>();
  args.active = active.mutable_data_ptr();
  args.out = out.mutable_data_ptr();

  const ExpertsKernels& kernels = *isa()->experts;
  const auto grain = [](int64_t width) { return std::max<int64_t>(1, (1 << 13) / width); };
  const Products ups = up(grouping, x);
  args.up_rows = ups.rows.data();
  at::parallel_for(0, grouping.rows(), grain(args.inner), [&](int64_t first, int64_t last) {
    kernels.activate(args, first, last);
  });
  const Products downs = down(grouping, active);
  args.down_rows = downs.rows.data();
  at::parallel_for(0, x.size(0), grain(args.hidden * args.top_k), [&](int64_t first, int64_t last) {
    std::vector<float> scratch(2 * (args.hidden + kMaxLanes));
    kernels.combine(args, first, last, scratch.data());
  });
  if (tokens)
    repeat_last_row(args.out, tokens, all_x.size(0), sizes.down_out * out.element_size());
  return out;
}

Tensor experts(const Tensor& x, const Tensor& top_k_index, const Tensor& top_k_weights,
               const Tensor& up_handle, const Tensor& down_handle, const OptionalTensor& up_bias,
               const OptionalTensor& down_bias, const OptionalTensor& norm_weight,
               std::string activation, bool gated, double alpha, double gate_limit,
               double up_limit, bool limit_activated, double up_offset, double gate_softcap,
               double up_softcap, double norm_eps) {
  const PackedExperts& up = resolve_experts("up", up_handle);
  const PackedExperts& down = resolve_experts("down", down_handle);
  const auto dtype = x.scalar_type();
  TORCH_CHECK(dtype == up.dtype() && dtype == down.dtype(), "inlay_cpu::experts: x must have the "
              "weights' dtype ", up.dtype(), ", got ", dtype);
  const auto count = [](const PackedExperts& w) { return static_cast<int64_t>(w.experts.size()); };
  return mix_experts(
      x, top_k_index, top_k_weights,
      {count(up), up.out_features, up.in_features, count(down), down.out_features,
       down.in_features},
      {up_bias, down_bias, norm_weight, activation, gated, alpha, gate_limit, up_limit,
       limit_activated, up_offset, gate_softcap, up_softcap, norm_eps},
      [&](const Grouping& g, const Tensor& tokens) {
        return multiply_groups(g, up, gather_rows(g, tokens));
      },
      [&](const Grouping& g, const Tensor& rows) { return multiply_groups(g, down, rows); });
}

}  // namespace
}  // namespace inlay
