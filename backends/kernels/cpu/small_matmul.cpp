#include "small_matmul.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>

#include <cstring>

namespace inlay {
namespace {

// Bytes ahead of the reads: the hardware's prefetcher alone leaves a third of the bandwidth unused.
constexpr int64_t kPrefetch = 2048;

template <int Rows>
void multiply_block(const SmallMatmul& m, int64_t block) {
  const uint16_t* w = m.w + block * kSmallMatmulBlock * m.in_features;
  __m512 sums[Rows][2];
  for (auto& sum : sums) sum[0] = sum[1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < m.in_features; k += 2, w += 2 * kSmallMatmulBlock) {
    const char* ahead = reinterpret_cast<const char*>(w) + kPrefetch;
    _mm_prefetch(ahead, _MM_HINT_T0);
    _mm_prefetch(ahead + 64, _MM_HINT_T0);
    const auto low = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w));
    const auto high = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + kSmallMatmulBlock));
    for (int row = 0; row < Rows; row++) {
      int32_t pair;
      std::memcpy(&pair, m.x + row * m.in_features + k, sizeof pair);
      const auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
      sums[row][0] = _mm512_dpbf16_ps(sums[row][0], low, x);
      sums[row][1] = _mm512_dpbf16_ps(sums[row][1], high, x);
    }
  }
  for (int half = 0; half < 2; half++) {
    const int64_t column = block * kSmallMatmulBlock + half * 16;
    __m512 bias = _mm512_setzero_ps();
    if (m.bias) {
      const auto* at = reinterpret_cast<const __m256i*>(m.bias + column);
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at));
      bias = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    for (int row = 0; row < Rows; row++) {
      const __m256bh narrow = _mm512_cvtneps_pbh(_mm512_add_ps(sums[row][half], bias));
      std::memcpy(m.y + row * m.out_features + column, &narrow, sizeof narrow);
    }
  }
}

template <int Rows>
void multiply(const SmallMatmul& m, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; block++) multiply_block<Rows>(m, block);
}

}  // namespace

bool small_matmul_supported() { return __builtin_cpu_supports("avx512bf16"); }

void small_matmul(const SmallMatmul& m, int64_t first, int64_t last) {
  using Multiply = void (*)(const SmallMatmul&, int64_t, int64_t);
  static constexpr Multiply by_rows[kSmallMatmulRows] = {multiply<1>, multiply<2>,
                                                              multiply<3>, multiply<4>};
  by_rows[m.rows - 1](m, first, last);
}

}  // namespace inlay

#else  // another instruction set: oneDNN serves all sizes

namespace inlay {
bool small_matmul_supported() { return false; }
void small_matmul(const SmallMatmul&, int64_t, int64_t) {}
}  // namespace inlay

#endif

namespace inlay {

bool small_matmul_layout(const uint16_t* packed, const uint16_t* weight, int64_t in_features,
                         int64_t first, int64_t last) {
  uint16_t differ = 0;
  const uint16_t* at = packed + first * kSmallMatmulBlock * in_features;
  for (int64_t block = first; block < last && !differ; block++)
    for (int64_t k = 0; k < in_features; k += 2)
      for (int64_t n = 0; n < kSmallMatmulBlock; n++, at += 2) {
        const uint16_t* row = weight + (block * kSmallMatmulBlock + n) * in_features + k;
        differ |= (at[0] ^ row[0]) | (at[1] ^ row[1]);
      }
  return !differ;
}

}  // namespace inlay
