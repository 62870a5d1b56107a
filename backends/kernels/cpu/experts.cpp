// What lies between and after the matrix products of a mixture of experts, in float32: bias,
// bounds, activation, gate; then the weighted sum of a token's experts. See passes/experts_op.py.
#include "experts.h"
#include "vec.h"

namespace {

using inlay::Activation;
using inlay::DType;
using inlay::ExpertsArgs;

INLAY_INLINE VecF magnitude(VecF x) { return x < 0.f ? -x : x; }

INLAY_INLINE VecF sigmoid(VecF x) {
  const VecF e = exp_nonpositive(-magnitude(x));
  return (x < 0.f ? e : splat(1.f)) / (1.f + e);
}

INLAY_INLINE VecF erf_of(VecF x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_erff(x[i]);
  return x;
}

INLAY_INLINE VecF softcapped(VecF x, float cap) { return cap > 0.f ? tanh_of(x / cap) * cap : x; }

// A NaN stays one: bounds replace what compares as beyond them, and NaN compares as nothing.
INLAY_INLINE VecF at_most(VecF x, float limit) { return x > limit ? splat(limit) : x; }
INLAY_INLINE VecF at_least(VecF x, float limit) { return x < limit ? splat(limit) : x; }

template <Activation kind>
INLAY_INLINE VecF activated(const ExpertsArgs& a, VecF x) {
  switch (kind) {
    case Activation::kSilu: return softcapped(x, a.gate_softcap) * sigmoid(x * a.alpha);
    case Activation::kGelu: return 0.5f * x * (1.f + erf_of(x * 0.70710678118654752f));
    case Activation::kGeluTanh: {
      const VecF inside = 0.79788456080286536f * (x + 0.044715f * x * x * x);
      return 0.5f * x * (1.f + tanh_of(inside));
    }
    case Activation::kRelu: return at_least(x, 0.f);
    case Activation::kRelu2: return at_least(x, 0.f) * at_least(x, 0.f);
    case Activation::kSigmoid: return sigmoid(x);
    case Activation::kTanh: return tanh_of(x);
    case Activation::kLinear: return x;
  }
}

template <Activation kind>
INLAY_INLINE VecF gated(const ExpertsArgs& a, VecF gate, VecF up) {
  if (!a.limit_activated) gate = at_most(gate, a.gate_limit);
  VecF active = activated<kind>(a, gate);
  if (a.limit_activated) active = at_most(active, a.gate_limit);
  if (!a.gated) return active;
  up = at_least(at_most(up, a.up_limit), -a.up_limit);
  return active * (softcapped(up, a.up_softcap) + a.up_offset);
}

template <class T>
INLAY_INLINE VecF load_up_to(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : load_first(p, static_cast<int>(count));
}

template <class T>
INLAY_INLINE void store_up_to(T* p, VecF v, int64_t count) {
  if (count >= kLanes) store(p, v);
  else store_first(p, v, static_cast<int>(count));
}

template <class T, Activation kind>
static void activate_rows(const ExpertsArgs& a, int64_t first, int64_t last) {
  const int64_t width = a.gated ? 2 * a.inner : a.inner;
  for (int64_t row = first; row < last; ++row) {
    const T* gate = static_cast<const T*>(a.up_rows[row]);
    const T* bias = a.up_bias ? (const T*)a.up_bias + a.expert_of_row[row] * width : nullptr;
    const int64_t up = a.gated ? a.inner : 0;
    T* out = (T*)a.active + row * a.inner;
    for (int64_t i = 0; i < a.inner; i += kLanes) {
      const int64_t count = a.inner - i;
      VecF g = load_up_to(gate + i, count), u = load_up_to(gate + up + i, count);
      if (bias) {
        g += load_up_to(bias + i, count);
        u += load_up_to(bias + up + i, count);
      }
      store_up_to(out + i, gated<kind>(a, g, u), count);
    }
  }
}

template <class T>
static void activate_typed(const ExpertsArgs& a, int64_t first, int64_t last) {
  switch (a.activation) {
    case Activation::kSilu: return activate_rows<T, Activation::kSilu>(a, first, last);
    case Activation::kGelu: return activate_rows<T, Activation::kGelu>(a, first, last);
    case Activation::kGeluTanh: return activate_rows<T, Activation::kGeluTanh>(a, first, last);
    case Activation::kRelu: return activate_rows<T, Activation::kRelu>(a, first, last);
    case Activation::kRelu2: return activate_rows<T, Activation::kRelu2>(a, first, last);
    case Activation::kSigmoid: return activate_rows<T, Activation::kSigmoid>(a, first, last);
    case Activation::kTanh: return activate_rows<T, Activation::kTanh>(a, first, last);
    case Activation::kLinear: return activate_rows<T, Activation::kLinear>(a, first, last);
  }
}

// An expert's output, its bias added and normed where there is a norm, into y; returns the factor
// that is still missing.
template <class T>
static float finish_row(const ExpertsArgs& a, int32_t row, float* y) {
  const T* from = static_cast<const T*>(a.down_rows[row]);
  const T* bias = a.down_bias ? (const T*)a.down_bias + a.expert_of_row[row] * a.hidden : nullptr;
  const T* norm = static_cast<const T*>(a.norm_weight);
  VecF squares = {};
  for (int64_t i = 0; i < a.hidden; i += kLanes) {
    const int64_t count = a.hidden - i;
    VecF v = load_up_to(from + i, count);
    if (bias) v += load_up_to(bias + i, count);
    if (norm) v *= 1.f + load_up_to(norm + i, count);
    squares += v * v;
    store(y + i, v);
  }
  if (!norm) return 1.f;
  float sum = 0.f;
  for (int i = 0; i < kLanes; ++i) sum += squares[i];
  return 1.f / __builtin_sqrtf(sum / static_cast<float>(a.hidden) + a.norm_eps);
}

template <class T>
static void combine_typed(const ExpertsArgs& a, int64_t first, int64_t last, float* scratch) {
  float* total = scratch + (a.hidden + kLanes - 1) / kLanes * kLanes;
  for (int64_t token = first; token < last; ++token) {
    for (int64_t i = 0; i < a.hidden; i += kLanes) store(total + i, VecF{});
    for (int64_t k = 0; k < a.top_k; ++k) {
      const int32_t row = a.row_of_pair[token * a.top_k + k];
      if (row < 0) continue;
      const float weight = finish_row<T>(a, row, scratch) * a.pair_weights[token * a.top_k + k];
      for (int64_t i = 0; i < a.hidden; i += kLanes)
        store(total + i, load(total + i) + load(scratch + i) * weight);
    }
    T* out = (T*)a.out + token * a.hidden;
    for (int64_t i = 0; i < a.hidden; i += kLanes)
      store_up_to(out + i, load(total + i), a.hidden - i);
  }
}

void activate(const ExpertsArgs& a, int64_t first, int64_t last) {
  switch (a.dtype) {
    case DType::kFloat32: return activate_typed<float>(a, first, last);
    case DType::kBFloat16: return activate_typed<BFloat16>(a, first, last);
    case DType::kFloat16: return activate_typed<Float16>(a, first, last);
  }
}

void combine(const ExpertsArgs& a, int64_t first, int64_t last, float* scratch) {
  switch (a.dtype) {
    case DType::kFloat32: return combine_typed<float>(a, first, last, scratch);
    case DType::kBFloat16: return combine_typed<BFloat16>(a, first, last, scratch);
    case DType::kFloat16: return combine_typed<Float16>(a, first, last, scratch);
  }
}

}  // namespace

namespace inlay::INLAY_ISA {
extern const ExpertsKernels experts_kernels = {activate, combine};
}
