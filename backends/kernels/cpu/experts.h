// The contract between experts_ops.h (torch, grouping, matrix products) and experts.cpp (what lies
// between the products, no torch). Rows are (token, expert) pairs, those of an expert together.
#pragma once

#include "attention.h"

namespace inlay {

enum class Activation : int { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kSigmoid, kTanh, kLinear };

struct ExpertsArgs {
  DType dtype;
  Activation activation;
  bool gated, limit_activated;
  // Bounds are infinite, softcaps 0, where there is none.
  float alpha, gate_limit, up_limit, up_offset, gate_softcap, up_softcap, norm_eps;
  int64_t inner, hidden, top_k;
  const int32_t* expert_of_row;  // [rows]
  const void* const* up_rows;    // [rows] pointers to [2 inner], gate first, or [inner]
  const void* up_bias;           // [experts, 2 inner or inner] or null
  void* active;                  // [rows, inner]
  const void* const* down_rows;  // [rows] pointers to [hidden]
  const void* down_bias;         // [experts, hidden] or null
  const void* norm_weight;       // [hidden] or null
  const int32_t* row_of_pair;    // [tokens * top_k], -1 for none
  const float* pair_weights;     // [tokens * top_k]
  void* out;                     // [tokens, hidden]
};

struct ExpertsKernels {
  // Gates and activations of the rows [first, last).
  void (*activate)(const ExpertsArgs&, int64_t first, int64_t last);
  // Weighted sums of the tokens [first, last), over their experts in the router's order.
  // scratch: two times hidden floats, rounded up to whole vectors.
  void (*combine)(const ExpertsArgs&, int64_t first, int64_t last, float* scratch);
};

namespace portable {
extern const ExpertsKernels experts_kernels;
}
namespace avx2 {
extern const ExpertsKernels experts_kernels;
}
namespace avx512 {
extern const ExpertsKernels experts_kernels;
}

}  // namespace inlay
