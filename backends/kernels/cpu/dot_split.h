// Weights of 8 and 4 bits times bfloat16 or float16 by integer products (VNNI).
//
// In segments of at most 128 inputs x becomes 16-bit numbers times a power of two, and these two
// signed bytes each, 256 high + low; weights are unsigned bytes. Numbers of bfloat16 that are not
// below 1/128 of the segment's largest are exact in that, others are off by 2^-15 of it at most,
// which is less than that largest number is rounded by. A segment's sum is exact; zero points come
// off by the sum of x. Both parts of x cost two products where a bfloat16 product costs one, of
// half as many: as fast, with nothing to widen.
#pragma once

#include "dot_rows.h"
#include "quantized_vec.h"

namespace {

constexpr int64_t kSplitInputs = 128;  // of a segment: sums times 256 stay below 2^31
constexpr int kSplitRows = 6;          // 4 sums each

struct SplitSegment {
  float unit;
  int32_t sum, start;  // of x; minus it times the zero point that weights have without zeros
};

INLAY_INLINE int64_t split_inputs(int64_t group_size) {
  return group_size < kSplitInputs ? group_size : kSplitInputs;
}

INLAY_INLINE int64_t num_split_segments(int64_t in_features, int64_t group_size) {
  const int64_t size = split_inputs(group_size);
  return in_features / group_size * ((group_size + size - 1) / size);
}

// A row: high bytes, low bytes, each padded to whole tiles; then its segments.
INLAY_INLINE int64_t split_plane(int64_t in_features) { return (in_features + 63) / 64 * 64; }

INLAY_INLINE int64_t split_row_bytes(int64_t in_features, int64_t group_size) {
  return 2 * split_plane(in_features) +
         num_split_segments(in_features, group_size) * int64_t{sizeof(SplitSegment)};
}

INLAY_INLINE float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// x [count] in units of a power of two; the largest has 15 bits, or 14.
static SplitSegment split_segment(const Rows& rows, int64_t at, int64_t count, int middle,
                                  char* high, char* low) {
  VecF most = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const VecF v = load_any(rows.dtype, rows.from, at + i, count - i);
    const VecF size = (VecF)((VecU)v & 0x7fffffff);
    most = ((size > most) | (size != size)) ? size : most;
  }
  // As integers, magnitudes have the same order; NaN is above all.
  const uint32_t largest = _mm512_reduce_max_epu32((__m512i)most);
  // Two signed bytes hold 127 * 256 + 127 at most: from 1.992 on a mantissa counts as 2.
  const uint32_t exponent = (largest + 0x10000) >> 23;
  const bool finite = exponent < 255, tiny = exponent < 16;
  const float unit = !finite ? from_bits(largest) : tiny ? 0.f : from_bits((exponent - 14) << 23);
  const float inverse = !finite || tiny ? 0.f : from_bits((254 + 14 - exponent) << 23);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += kLanes) {
    const VecF v = load_any(rows.dtype, rows.from, at + i, count - i) * inverse;
    const __m512i n = _mm512_cvtps_epi32((__m512)v);
    sum = _mm512_add_epi32(sum, n);
    const __m512i top = _mm512_srai_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(128)), 8);
    const __m128i h = _mm512_cvtepi32_epi8(top), l = _mm512_cvtepi32_epi8(n);
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    memcpy(high + i, &h, left);
    memcpy(low + i, &l, left);
  }
  const int32_t total = _mm512_reduce_add_epi32(sum);
  return {unit, total, -middle * total};
}

// The zero point that makes packed numbers signed.
INLAY_INLINE int middle_of(Format format) { return format == Format::kInt4 ? 8 : 128; }

static void split_row(Format format, const Rows& rows, int64_t row, char* to) {
  const int64_t width = rows.in_features, plane = split_plane(width);
  memset(to + width, 0, plane - width);
  memset(to + plane + width, 0, plane - width);
  auto* segment = reinterpret_cast<SplitSegment*>(to + 2 * plane);
  const int64_t size = split_inputs(rows.group_size);
  for (int64_t group = 0; group < width; group += rows.group_size)
    for (int64_t k = 0; k < rows.group_size; k += size) {
      const int64_t left = rows.group_size - k, count = left < size ? left : size, at = group + k;
      *segment++ = split_segment(rows, row * width + at, count, middle_of(format), to + at,
                                 to + plane + at);
    }
}

// A group's factors of a block's outputs.
struct SplitFactors {
  VecF scale[2];
  __m512i zero[2];  // of the unsigned numbers
};

INLAY_INLINE SplitFactors load_split_factors(const QuantizedProduct& p, int64_t group,
                                             int64_t block) {
  SplitFactors f;
  for (int i = 0; i < 2; ++i) {
    const int64_t column = block * kCodeBlock + i * kLanes, count = p.out_features - column;
    const int64_t at = group * p.out_features + column;
    f.scale[i] = load_any(p.scale_dtype, p.scale, at, count);
    if (!p.zero) continue;
    f.zero[i] = _mm512_cvtps_epi32((__m512)load_any(DType::kInt8, p.zero, at, count));
    if (p.format == Format::kInt8)
      f.zero[i] = _mm512_add_epi32(f.zero[i], _mm512_set1_epi32(middle_of(Format::kInt8)));
  }
  return f;
}

// sum += x (signed) times w (unsigned); see IntegerDot.
INLAY_INLINE void add_unsigned(__m512i& sum, __m512i w, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
}

// sums[row][half of the block][high, low] += x[row] times the weights of a step.
template <int Count>
INLAY_INLINE void add_split(__m512i (&sums)[Count][2][2], const char* x, int64_t stride,
                            int64_t plane, __m512i first, __m512i second) {
  for (int r = 0; r < Count; ++r) {
    const __m512i high = broadcast4(x + r * stride), low = broadcast4(x + r * stride + plane);
    add_unsigned(sums[r][0][0], first, high);
    add_unsigned(sums[r][0][1], first, low);
    add_unsigned(sums[r][1][0], second, high);
    add_unsigned(sums[r][1][1], second, low);
  }
}

INLAY_INLINE SplitSegment load_segment(const char* p) {
  SplitSegment segment;
  memcpy(&segment, p, sizeof segment);
  return segment;
}

// A segment's sums begin at minus its zero points times the sum of x. Unrolled early, else GCC keeps
// the sums in memory.
template <bool Zeros, int Count>
INLAY_INLINE void start_sums(const SplitFactors& f, const char* segments, int64_t stride,
                             __m512i (&sums)[Count][2][2]) {
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r) {
    const SplitSegment segment = load_segment(segments + r * stride);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      sums[r][i][0] = _mm512_setzero_si512();
      sums[r][i][1] = _mm512_set1_epi32(segment.start);
      if (Zeros)
        sums[r][i][1] = _mm512_mullo_epi32(f.zero[i], _mm512_set1_epi32(-segment.sum));
    }
  }
}

// Adds a segment's sums, scaled, to the rows'.
template <int Count>
INLAY_INLINE void add_segment(const SplitFactors& f, const char* segments, int64_t stride,
                              const __m512i (&sums)[Count][2][2], VecF (&totals)[Count][2]) {
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r) {
    const float unit = load_segment(segments + r * stride).unit;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512i n = _mm512_add_epi32(_mm512_slli_epi32(sums[r][i][0], 8), sums[r][i][1]);
      totals[r][i] += (VecF)_mm512_cvtepi32_ps(n) * (f.scale[i] * unit);
    }
  }
}

template <Format format, bool Zeros, int Count>
INLAY_NOINLINE void multiply_split(const QuantizedProduct& p, int64_t row, int64_t block) {
  const int64_t plane = split_plane(p.in_features), stride = p.x_stride;
  const int64_t size = split_inputs(p.group_size);
  const char* x = p.x + row * stride;
  const char* segments = x + 2 * plane;
  const uint8_t* w = p.codes + block * inlay::block_bytes(format, p.in_features);
  VecF totals[Count][2] = {};
  for (int64_t group = 0, k = 0; k < p.in_features; ++group) {
    const SplitFactors f = load_split_factors(p, group, block);
    for (const int64_t group_end = k + p.group_size; k < group_end;) {
      __m512i sums[Count][2][2];
      start_sums<Zeros, Count>(f, segments, stride, sums);
      for (const int64_t end = k + size < group_end ? k + size : group_end; k < end; k += 4) {
        __m512i first = _mm512_loadu_si512(w), second = _mm512_loadu_si512(w + 64);
        w += kTileBytes;
        if (format == Format::kInt4) {
          const __m512i mask = _mm512_set1_epi8(15);
          add_split<Count>(sums, x + k, stride, plane, _mm512_and_si512(first, mask),
                           _mm512_and_si512(second, mask));
          first = _mm512_and_si512(_mm512_srli_epi16(first, 4), mask);
          second = _mm512_and_si512(_mm512_srli_epi16(second, 4), mask);
          k += 4;
        }
        add_split<Count>(sums, x + k, stride, plane, first, second);
      }
      add_segment<Count>(f, segments, stride, sums, totals);
      segments += sizeof(SplitSegment);
    }
  }
  for (int r = 0; r < Count; ++r) finish_row(p, row + r, block, totals[r]);
}

template <Format format, bool Zeros>
void multiply_split_blocks(const QuantizedProduct& p, const Part& part) {
  static constexpr void (*by_rows[kSplitRows])(const QuantizedProduct&, int64_t, int64_t) = {
      multiply_split<format, Zeros, 1>, multiply_split<format, Zeros, 2>,
      multiply_split<format, Zeros, 3>, multiply_split<format, Zeros, 4>,
      multiply_split<format, Zeros, 5>, multiply_split<format, Zeros, 6>};
  for (int64_t block = part.first_block; block < part.last_block; ++block)
    over_rows<kSplitRows>(part.first_row, part.last_row, [&](int64_t row, int count) {
      by_rows[count - 1](p, row, block);
    });
}

template <Format format>
void multiply_split_part(const QuantizedProduct& p, const Part& part) {
  if (p.zero) return multiply_split_blocks<format, true>(p, part);
  multiply_split_blocks<format, false>(p, part);
}

}  // namespace
