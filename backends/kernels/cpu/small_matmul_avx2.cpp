// By float32 multiply-adds (AVX2, FMA): bfloat16 weights are widened in registers, as they stream by.
#include "small_matmul.h"

#include "over_rows.h"
#include "vec.h"

namespace {

using inlay::kSmallMatmulBlock;
using inlay::SmallMatmul;

constexpr int kRows = 6;  // with 2 vectors of sums each
constexpr int kVecs = kSmallMatmulBlock / kLanes;

INLAY_INLINE void write_row(const SmallMatmul& m, int64_t row, int64_t column, VecF v) {
  const int64_t count = m.out_features - column;
  const auto* bias = reinterpret_cast<const BFloat16*>(m.bias) + column;
  auto* y = reinterpret_cast<BFloat16*>(m.y) + row * m.out_features + column;
  if (count >= kLanes) {
    store(y, m.bias ? v + load(bias) : v);
  } else if (count > 0) {
    const int left = static_cast<int>(count);
    store_first(y, m.bias ? v + load_first(bias, left) : v, left);
  }
}

// The first or second of 8 pairs of inputs.
INLAY_INLINE VecF widen(const uint16_t* pairs, int part) {
  const VecU both = load_as<VecU>(pairs);
  return (VecF)(part ? both & 0xffff0000u : both << 16);
}

// Vectors [first, first + Vecs) of a block's outputs.
template <int Count, int Vecs>
INLAY_NOINLINE void multiply_vectors(const SmallMatmul& m, int64_t row, int64_t block, int first) {
  const int64_t pairs = (m.in_features + 1) / 2;
  const uint16_t* w = m.w + block * kSmallMatmulBlock * 2 * pairs + first * 2 * kLanes;
  const char* x = m.x + row * m.x_stride;
  VecF sums[Count][Vecs] = {};
  for (int64_t pair = 0; pair < pairs; ++pair, x += 2 * sizeof(float), w += 2 * kSmallMatmulBlock) {
    if (Vecs < kVecs) prefetch_step(w);
#pragma GCC unroll 8
    for (int part = 0; part < 2; ++part) {
      VecF wide[Vecs];
#pragma GCC unroll 8
      for (int v = 0; v < Vecs; ++v) wide[v] = widen(w + v * 2 * kLanes, part);
#pragma GCC unroll 8
      for (int r = 0; r < Count; ++r) {
        const VecF both = splat(reinterpret_cast<const float*>(x + r * m.x_stride)[part]);
#pragma GCC unroll 8
        for (int v = 0; v < Vecs; ++v) add_product(sums[r][v], both, wide[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v)
      write_row(m, row + r, block * kSmallMatmulBlock + (first + v) * kLanes, sums[r][v]);
}

// Few rows take a block at once, so that enough sums are under way.
template <int Count>
void multiply_block(const SmallMatmul& m, int64_t row, int64_t block) {
  constexpr int step = Count <= 2 ? kVecs : kVecs / 2;
  for (int first = 0; first < kVecs; first += step)
    multiply_vectors<Count, step>(m, row, block, first);
}

void multiply(const SmallMatmul& m, int64_t first_row, int64_t last_row, int64_t first,
              int64_t last) {
  static constexpr void (*by_rows[kRows])(const SmallMatmul&, int64_t, int64_t) = {
      multiply_block<1>, multiply_block<2>, multiply_block<3>,
      multiply_block<4>, multiply_block<5>, multiply_block<6>};
  for (int64_t block = first; block < last; ++block)
    over_rows<kRows>(first_row, last_row, [&](int64_t row, int count) {
      by_rows[count - 1](m, row, block);
    });
}

}  // namespace

namespace inlay::INLAY_ISA {
extern const MatmulKernel matmul_kernel = {true, multiply};
}
