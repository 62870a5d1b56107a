// Products with weights of 8 or 4 bits by AVX-512's dot instructions (VNNI, BF16; VBMI to widen).
#include "dot_float8.h"
#include "dot_split.h"

namespace {

bool takes(Format format, DType x, int64_t group_size, int64_t in_features) {
  const bool groups = group_size == in_features || group_size % kMinGroup == 0;
  switch (format) {
    case Format::kIntegers: return x == DType::kInt8;
    case Format::kFloat8: return groups && (x == DType::kBFloat16 || x == DType::kFloat8);
    default: return groups && (x == DType::kBFloat16 || x == DType::kFloat16);
  }
}

// An odd number of cache lines: rows of a power of two would compete for a few places in L1.
int64_t row_bytes(Format format, int64_t in_features, int64_t group_size) {
  const int64_t padded = (in_features + 3) / 4 * 4;
  const int64_t bytes = format == Format::kIntegers ? padded
                        : format == Format::kFloat8 ? 2 * padded
                                                    : split_row_bytes(in_features, group_size);
  return ((bytes + 63) / 64 | 1) * 64;
}

void prepare(Format format, const Rows& rows, int64_t first, int64_t last) {
  const int64_t width = rows.in_features, padding = (width + 3) / 4 * 4 - width;
  for (int64_t row = first; row < last; ++row) {
    char* to = rows.to + row * rows.to_stride;
    const char* from = rows.from + row * width;
    if (format == Format::kIntegers) {  // unsigned: 128 more
      for (int64_t k = 0; k < width; ++k) to[k] = static_cast<char>(from[k] ^ 0x80);
      memset(to + width, 0, padding);
    } else if (format != Format::kFloat8) {
      split_row(format, rows, row, to);
    } else {
      for (int64_t k = 0; k < width; k += kLanes)
        store_some<BFloat16>(to, load_any(rows.dtype, rows.from, row * width + k, width - k), k,
                             width - k);
      memset(to + 2 * width, 0, 2 * padding);
    }
  }
}

// 128 times the columns' sums come off for what made x unsigned.
template <int Count>
INLAY_NOINLINE void multiply_integers(const QuantizedProduct& p, int64_t row, int64_t block) {
  const int64_t steps = (p.in_features + 3) / 4;
  __m512i sums[Count][2];
  for (int i = 0; i < 2; ++i) {
    const __m512i columns = _mm512_loadu_si512(p.column_sums + block * kCodeBlock + i * kLanes);
    for (auto& sum : sums) sum[i] = _mm512_sub_epi32(__m512i{}, _mm512_slli_epi32(columns, 7));
  }
  const auto* w = reinterpret_cast<const char*>(p.codes) + block * steps * kTileBytes;
  add_steps<IntegerDot, Count>(sums, p.x + row * p.x_stride, p.x_stride, w, steps);
  for (int i = 0; i < 2; ++i) {
    const int64_t at = block * kCodeBlock + i * kLanes, count = p.out_features - at;
    const __m512i columns = _mm512_loadu_si512(p.column_sums + at);
    const VecF scale = load_any(p.scale_dtype, p.scale, at, count);
    const VecF bias = p.bias ? load_any(p.bias_dtype, p.bias, at, count) : VecF{};
    for (int r = 0; r < Count; ++r) {
      __m512i total = sums[r][i];
      if (p.x_zero) {
        const __m512i zero = _mm512_set1_epi32(p.x_zero[(row + r) * p.x_zero_row]);
        total = _mm512_sub_epi32(total, _mm512_mullo_epi32(zero, columns));
      }
      VecF v = (VecF)_mm512_cvtepi32_ps(total) * p.x_scale[(row + r) * p.x_scale_row] * scale;
      asm("" : "+v"(v));  // rounded before the bias is added
      if (p.bias) v += bias;
      store_any(p.y_dtype, p.y, v, (row + r) * p.out_features + at, count);
    }
  }
}

void multiply_integers_part(const QuantizedProduct& p, const Part& part) {
  static constexpr void (*by_rows[kDotRows])(const QuantizedProduct&, int64_t, int64_t) =
      INLAY_BY_ROWS(multiply_integers);
  for (int64_t block = part.first_block; block < part.last_block; ++block)
    over_rows<kDotRows>(part.first_row, part.last_row, [&](int64_t row, int count) {
      by_rows[count - 1](p, row, block);
    });
}

void multiply(const QuantizedProduct& p, const Part& part) {
  switch (p.format) {
    case Format::kIntegers: return multiply_integers_part(p, part);
    case Format::kInt8: return multiply_split_part<Format::kInt8>(p, part);
    case Format::kInt4: return multiply_split_part<Format::kInt4>(p, part);
    case Format::kFloat8: return multiply_float8_part(p, part);
  }
}

}  // namespace

namespace inlay::INLAY_ISA {
extern const ProductKernels product_kernels = {takes, row_bytes, prepare, multiply};
}
