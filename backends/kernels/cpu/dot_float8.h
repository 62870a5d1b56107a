// Weights of float8 (e4m3) times bfloat16, which holds them exactly: 64 at a time are widened by
// tables in registers, one for either byte of a bfloat16 (AVX512_VBMI). Those of few rows are widened
// as they stream by; for more rows a part of a block once, into the cache. Both add up in one order:
// segments of a group, each from its first input to its last, then scaled and added.
#pragma once

#include "dot_rows.h"
#include "quantized_vec.h"

namespace {

struct ByteTable {
  alignas(64) uint8_t low[128], high[128];
};

// The bfloat16 of each magnitude, by its 7 bits.
constexpr ByteTable make_byte_table() {
  ByteTable table{};
  for (int i = 1; i < 128; ++i) {
    int exponent = i >> 3, mantissa = i & 7;
    if (exponent == 0) {  // 0.mantissa: shift its first one to the front
      for (exponent = 1; !(mantissa & 8); mantissa *= 2) --exponent;
      mantissa &= 7;
    }
    const int bits = i == 127 ? 0x7fc0 : (exponent + 127 - 7) << 7 | mantissa << 4;
    table.low[i] = static_cast<uint8_t>(bits);
    table.high[i] = static_cast<uint8_t>(bits >> 8);
  }
  return table;
}

constexpr ByteTable kByteTable = make_byte_table();

// Half a tile (see quantized.h) as two pairs of inputs of 16 outputs.
struct Widen {
  __m512i low[2], high[2];

  Widen() {
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(kByteTable.low + 64 * i);
      high[i] = _mm512_load_si512(kByteTable.high + 64 * i);
    }
  }

  inline __attribute__((always_inline)) void operator()(__m512i codes, __m512i (&out)[2]) const {
    const __m512i l = _mm512_permutex2var_epi8(low[0], codes, low[1]);
    __m512i h = _mm512_permutex2var_epi8(high[0], codes, high[1]);
    h = _mm512_ternarylogic_epi32(h, codes, _mm512_set1_epi8(-128), 0xf8);  // h | sign
    out[0] = _mm512_unpacklo_epi8(l, h);
    out[1] = _mm512_unpackhi_epi8(l, h);
  }
};

constexpr int64_t kSegment = 1024;  // inputs, at most; what a widened part has
constexpr int64_t kMinGroup = 8;
constexpr int kDirectRows = 4;  // widened in registers, again for each so many rows
constexpr int kPanelRows = 6;   // their totals stay in registers too

struct Segment {
  int64_t k, inputs, group;
};

// The segment that begins at input k.
INLAY_INLINE Segment segment_at(const QuantizedProduct& p, int64_t k) {
  const int64_t group = k / p.group_size, left = (group + 1) * p.group_size - k;
  return {k, left < kSegment ? left : kSegment, group};
}

struct Scales {
  VecF at[2];
};

INLAY_INLINE Scales load_scales(const QuantizedProduct& p, int64_t group, int64_t block) {
  Scales scales;
  for (int i = 0; i < 2; ++i) {
    const int64_t column = block * kCodeBlock + i * kLanes, count = p.out_features - column;
    scales.at[i] = load_any(p.scale_dtype, p.scale, group * p.out_features + column, count);
  }
  return scales;
}

INLAY_INLINE void add_scaled(const QuantizedProduct& p, const Segment& s, const Scales& scales,
                             int64_t row, const __m512 (&sums)[2], VecF (&totals)[2]) {
  const float x_scale =
      p.x_scale ? p.x_scale[row * p.x_scale_row + s.group * p.x_scale_group] : 1.f;
  for (int i = 0; i < 2; ++i) totals[i] += (VecF)sums[i] * (scales.at[i] * x_scale);
}

template <int Count>
INLAY_NOINLINE void multiply_float8(const QuantizedProduct& p, int64_t row, int64_t block) {
  const Widen widen;
  const char* x = p.x + row * p.x_stride;
  const uint8_t* w = p.codes + block * inlay::block_bytes(Format::kFloat8, p.in_features);
  VecF totals[Count][2] = {};
  for (int64_t k = 0; k < p.in_features;) {
    const Segment s = segment_at(p, k);
    __m512 sums[Count][2] = {};
    for (const int64_t end = k + s.inputs; k < end; k += 4, w += kTileBytes)
      for (int i = 0; i < 2; ++i) {
        __m512i pairs[2];
        widen(_mm512_loadu_si512(w + i * 64), pairs);
        for (int j = 0; j < 2; ++j)
          for (int r = 0; r < Count; ++r) {
            const __m512i v = broadcast4(x + r * p.x_stride + k * 2 + j * 4);
            sums[r][i] = BFloat16Dot::add(sums[r][i], pairs[j], v);
          }
      }
    const Scales scales = load_scales(p, s.group, block);
    for (int r = 0; r < Count; ++r) add_scaled(p, s, scales, row + r, sums[r], totals[r]);
  }
  for (int r = 0; r < Count; ++r) finish_row(p, row + r, block, totals[r]);
}

// Some segments of a block, widened.
struct Panel {
  alignas(64) char weights[kSegment * kCodeBlock * 2];
  Segment segments[kSegment / kMinGroup];
  Scales scales[kSegment / kMinGroup];
  int num_segments;
};

// From input k on; returns the first input that is not in it.
INLAY_NOINLINE static int64_t fill_panel(const QuantizedProduct& p, int64_t block, int64_t k,
                                         Panel& to) {
  const Widen widen;
  const int64_t begin = k;
  to.num_segments = 0;
  while (k < p.in_features) {
    const Segment s = segment_at(p, k);
    if (k + s.inputs - begin > kSegment) break;
    to.scales[to.num_segments] = load_scales(p, s.group, block);
    to.segments[to.num_segments++] = s;
    k += s.inputs;
  }
  const uint8_t* w = p.codes + block * inlay::block_bytes(Format::kFloat8, p.in_features);
  w += begin / 4 * kTileBytes;
  char* out = to.weights;
  for (int64_t i = begin; i < k; i += 4, w += kTileBytes, out += 2 * kTileBytes)
    for (int half = 0; half < 2; ++half) {
      __m512i pairs[2];
      widen(_mm512_loadu_si512(w + half * 64), pairs);
      _mm512_store_si512(out + half * 64, pairs[0]);
      _mm512_store_si512(out + kTileBytes + half * 64, pairs[1]);
    }
  return k;
}

template <int Count>
INLAY_NOINLINE void multiply_panel(const QuantizedProduct& p, const Panel& panel, int64_t row,
                                   VecF (*to)[2]) {
  VecF totals[Count][2];
  memcpy(totals, to, sizeof totals);
  for (int i = 0; i < panel.num_segments; ++i) {
    const Segment& s = panel.segments[i];
    const int64_t offset = (s.k - panel.segments[0].k) / 2;
    __m512 sums[Count][2] = {};
    add_steps<BFloat16Dot, Count>(sums, p.x + row * p.x_stride + s.k * 2, p.x_stride,
                                  panel.weights + offset * kTileBytes, (s.inputs + 1) / 2);
    for (int r = 0; r < Count; ++r)
      add_scaled(p, s, panel.scales[i], row + r, sums[r], totals[r]);
  }
  memcpy(to, totals, sizeof totals);
}

static void multiply_float8_part(const QuantizedProduct& p, const Part& part) {
  static constexpr void (*few[kDirectRows])(const QuantizedProduct&, int64_t, int64_t) = {
      multiply_float8<1>, multiply_float8<2>, multiply_float8<3>, multiply_float8<4>};
  static constexpr void (*many[kPanelRows])(const QuantizedProduct&, const Panel&, int64_t,
                                            VecF(*)[2]) = {
      multiply_panel<1>, multiply_panel<2>, multiply_panel<3>,
      multiply_panel<4>, multiply_panel<5>, multiply_panel<6>};
  const int64_t first = part.first_row, rows = part.last_row - first;
  Panel panel;
  VecF totals[inlay::kMaxPartRows][2];
  for (int64_t block = part.first_block; block < part.last_block; ++block) {
    if (rows <= kDirectRows) {
      few[rows - 1](p, first, block);
      continue;
    }
    memset(totals, 0, rows * sizeof totals[0]);
    for (int64_t k = 0; k < p.in_features;) {
      k = fill_panel(p, block, k, panel);
      over_rows<kPanelRows>(first, part.last_row, [&](int64_t row, int count) {
        many[count - 1](p, panel, row, totals + (row - first));
      });
    }
    for (int64_t row = 0; row < rows; ++row) finish_row(p, first + row, block, totals[row]);
  }
}

}  // namespace
