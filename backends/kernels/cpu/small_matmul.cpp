#include "small_matmul.h"

#if defined(__AVX512BF16__)
#include "dot_rows.h"

#include <cpuid.h>

namespace inlay {
namespace {

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

}  // namespace

bool small_matmul_supported() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}

bool has_bfloat16_tiles() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & 1u << 22);
}

void small_matmul(const SmallMatmul& m, int64_t first_row, int64_t last_row, int64_t first,
                  int64_t last) {
  using Multiply = void (*)(const SmallMatmul&, int64_t, int64_t);
  static constexpr Multiply by_rows[kDotRows] = INLAY_BY_ROWS(multiply_block);
  for (int64_t block = first; block < last; block++)
    over_rows<kDotRows>(first_row, last_row, [&](int64_t row, int count) {
      by_rows[count - 1](m, row, block);
    });
}

}  // namespace inlay

#else  // another instruction set: oneDNN serves all sizes

namespace inlay {
bool small_matmul_supported() { return false; }
bool has_bfloat16_tiles() { return false; }
void small_matmul(const SmallMatmul&, int64_t, int64_t, int64_t, int64_t) {}
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
