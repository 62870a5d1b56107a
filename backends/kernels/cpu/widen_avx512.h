// Numbers of 8 and 4 bits to bfloat16, which holds them exactly, 64 bytes at a time. Tables in
// registers are looked up by a byte permutation (AVX512_VBMI), for either half of a bfloat16.
#pragma once

#include "quantized.h"

#include <immintrin.h>

namespace {

struct ByteTable {
  alignas(64) uint8_t low[128], high[128];
};

// bfloat16 of magnitudes, by their 7 bits.
constexpr ByteTable make_byte_table(bool float8) {
  ByteTable table{};
  for (int i = 0; i < 128; ++i) {
    int exponent = float8 ? i >> 3 : 7, mantissa = float8 ? i & 7 : i;
    const int width = float8 ? 3 : 7;  // of the mantissa
    if (!float8 || exponent == 0) {    // 0.mantissa: shift its first one to the front
      exponent = exponent ? exponent : 1;
      const int one = 1 << width;
      for (; mantissa && !(mantissa & one); mantissa *= 2) --exponent;
      mantissa &= one - 1;
      if (i == 0) exponent = -120;
    }
    const int bias = float8 ? 127 - 7 : 127;
    int bits = (exponent + bias) << 7 | mantissa << (7 - width);
    if (i == 0) bits = 0;
    if (float8 && i == 127) bits = 0x7fc0;
    table.low[i] = static_cast<uint8_t>(bits);
    table.high[i] = static_cast<uint8_t>(bits >> 8);
  }
  return table;
}

constexpr ByteTable kIntTable = make_byte_table(false), kFloat8Table = make_byte_table(true);

// Half a tile (see quantized.h) as pairs of inputs of 16 outputs.
template <inlay::Format format>
struct Widen {
  static constexpr int kPairs = 2;
  __m512i low[2], high[2];

  Widen() {
    const ByteTable& table = format == inlay::Format::kFloat8 ? kFloat8Table : kIntTable;
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(table.low + 64 * i);
      high[i] = _mm512_load_si512(table.high + 64 * i);
    }
  }

  inline __attribute__((always_inline)) void operator()(__m512i codes, __m512i (&out)[2]) const {
    constexpr bool kIntegers = format == inlay::Format::kInt8;
    const __m512i index = kIntegers ? _mm512_abs_epi8(codes) : codes;
    const __m512i l = _mm512_permutex2var_epi8(low[0], index, low[1]);
    __m512i h = _mm512_permutex2var_epi8(high[0], index, high[1]);
    if (kIntegers)  // 128, the one magnitude of 8 bits, is 0x4300; its 7 bits found the 0 of 0
      h = _mm512_mask_mov_epi8(h, _mm512_movepi8_mask(index), _mm512_set1_epi8(0x43));
    h = _mm512_ternarylogic_epi32(h, codes, _mm512_set1_epi8(-128), 0xf8);  // h | sign
    out[0] = _mm512_unpacklo_epi8(l, h);
    out[1] = _mm512_unpackhi_epi8(l, h);
  }
};

// Numbers 0..15 less 8. A word's four are looked up by shifting it: what lies above the lowest
// four bits of an index picks one of two equal halves of the table.
template <>
struct Widen<inlay::Format::kInt4> {
  static constexpr int kPairs = 4;
  __m512i table;

  Widen() {
    alignas(64) static constexpr uint16_t kValues[32] = {
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0,      0x3f80, 0x4000,
        0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
        0xc000, 0xbf80, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    table = _mm512_load_si512(kValues);
  }

  inline __attribute__((always_inline)) void operator()(__m512i codes, __m512i (&out)[4]) const {
    out[0] = _mm512_permutexvar_epi16(codes, table);
    out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
    out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
    out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table);
  }
};

}  // namespace
