// By AVX-512's dot instructions.
#include "small_matmul.h"

#include "dot_rows.h"

namespace {

using inlay::kSmallMatmulBlock;
using inlay::SmallMatmul;

inline __m512 load_bias(const uint16_t* from) {
  const __m512i wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

template <int Count>
void multiply_block(const SmallMatmul& m, int64_t row, int64_t block) {
  const int64_t bytes = kSmallMatmulBlock * m.in_features * int64_t{sizeof(uint16_t)};
  __m512 sums[Count][2];
  for (auto& sum : sums) sum[0] = sum[1] = _mm512_setzero_ps();
  add_steps<BFloat16Dot, Count>(sums, m.x + row * m.x_stride, m.x_stride,
                                reinterpret_cast<const char*>(m.w) + block * bytes,
                                m.in_features / 2);
  for (int half = 0; half < 2; half++) {
    const int64_t column = block * kSmallMatmulBlock + half * 16;
    const __m512 bias = m.bias ? load_bias(m.bias + column) : _mm512_setzero_ps();
    for (int r = 0; r < Count; r++) {
      const __m256bh narrow = _mm512_cvtneps_pbh(_mm512_add_ps(sums[r][half], bias));
      std::memcpy(m.y + (row + r) * m.out_features + column, &narrow, sizeof narrow);
    }
  }
}

void multiply(const SmallMatmul& m, int64_t first_row, int64_t last_row, int64_t first,
              int64_t last) {
  using Multiply = void (*)(const SmallMatmul&, int64_t, int64_t);
  static constexpr Multiply by_rows[kDotRows] = INLAY_BY_ROWS(multiply_block);
  for (int64_t block = first; block < last; block++)
    over_rows<kDotRows>(first_row, last_row, [&](int64_t row, int count) {
      by_rows[count - 1](m, row, block);
    });
}

}  // namespace

namespace inlay::INLAY_ISA {
extern const MatmulKernel matmul_kernel = {false, multiply};
}
