// What the quantized kernels of all instruction sets share: vectors of any dtype, and a row's end.
#pragma once

#include "quantized.h"
#include "vec.h"

namespace {

using inlay::DType;
using inlay::Format;
using inlay::kCodeBlock;
using inlay::kTileBytes;
using inlay::Part;
using inlay::QuantizedProduct;
using inlay::Rows;

constexpr int kBlockVecs = kCodeBlock / kLanes;

template <class T>
INLAY_INLINE VecF load_some(const void* p, int64_t at, int64_t count) {
  const T* from = static_cast<const T*>(p) + at;
  return count >= kLanes ? load(from) : count <= 0 ? VecF{} : load_first(from, (int)count);
}

// Elements [at, at + kLanes) of p as float32; zeros for those from count on.
INLAY_INLINE VecF load_any(DType dtype, const void* p, int64_t at, int64_t count) {
  switch (dtype) {
    case DType::kFloat32: return load_some<float>(p, at, count);
    case DType::kBFloat16: return load_some<BFloat16>(p, at, count);
    case DType::kFloat16: return load_some<Float16>(p, at, count);
    case DType::kFloat8: return load_some<Float8>(p, at, count);
    default: return load_some<Int8>(p, at, count);
  }
}

template <class T>
INLAY_INLINE void store_some(void* p, VecF v, int64_t at, int64_t count) {
  T* to = static_cast<T*>(p) + at;
  if (count >= kLanes) store(to, v);
  else if (count > 0) store_first(to, v, (int)count);
}

INLAY_INLINE void store_any(DType dtype, void* p, VecF v, int64_t at, int64_t count) {
  switch (dtype) {
    case DType::kFloat32: return store_some<float>(p, v, at, count);
    case DType::kBFloat16: return store_some<BFloat16>(p, v, at, count);
    default: return store_some<Float16>(p, v, at, count);
  }
}

// A value that the compiler must have in memory here: no multiplication before it and addition
// after it become one operation, which would not round between them.
INLAY_INLINE VecF rounded(VecF v) {
  asm("" : "+m"(v));
  return v;
}

// Writes a row's outputs of a block: its sums, scaled where they are integers, plus the bias.
INLAY_NOINLINE static void finish_row(const QuantizedProduct& p, int64_t row, int64_t block,
                                      const VecF* sums) {
  const int64_t begin = block * kCodeBlock;
  for (int i = 0; i < kBlockVecs; ++i) {
    const int64_t at = begin + i * kLanes, count = p.out_features - at;
    VecF v = sums[i];
    if (p.format == Format::kIntegers) {
      VecI total = (VecI)v;
      if (p.x_zero)
        total -= p.x_zero[row * p.x_zero_row] * load_as<VecI>(p.column_sums + at);
      v = __builtin_convertvector(total, VecF) * p.x_scale[row * p.x_scale_row];
      v = rounded(v * load_any(p.scale_dtype, p.scale, at, count));
    }
    if (p.bias) v += load_any(p.bias_dtype, p.bias, at, count);
    store_any(p.y_dtype, p.y, v, row * p.out_features + at, count);
  }
}

}  // namespace
