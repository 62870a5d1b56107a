// The inner loop of all products with AVX-512's dot instructions: some rows times a block of 32
// outputs, whose weights lie in steps of 128 bytes, four of each output: two bfloat16 inputs, or
// four of 8 bits. Included by units that are compiled for these instructions only.
#pragma once

#include "over_rows.h"

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int kDotRows = 12;  // with 2 sums each, 2 vectors of weights and 1 of x: 27 registers

// Float32 sums of bfloat16 products, two to a lane.
struct BFloat16Dot {
  using Sum = __m512;
  static inline __attribute__((always_inline)) Sum add(Sum sum, __m512i w, __m512i x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
};

// Int32 sums of products of signed weights and unsigned x, four to a lane. In assembly, since GCC
// makes a copy of each sum for the intrinsic, runs out of registers and is twice as slow.
struct IntegerDot {
  using Sum = __m512i;
  static inline __attribute__((always_inline)) Sum add(Sum sum, __m512i w, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    return sum;
  }
};

static inline __attribute__((always_inline)) __m512i broadcast4(const char* p) {
  int32_t value;
  memcpy(&value, p, sizeof value);
  return _mm512_set1_epi32(value);
}

// sums[row] += x[row] times the weights of these steps; rows of x are stride bytes apart.
template <class Dot, int Count>
static inline __attribute__((always_inline)) void add_steps(typename Dot::Sum (&sums)[Count][2],
                                                            const char* x, int64_t stride,
                                                            const char* w, int64_t steps) {
  for (int64_t step = 0; step < steps; step++, x += 4, w += 128) {
    const __m512i low = _mm512_loadu_si512(w), high = _mm512_loadu_si512(w + 64);
    for (int row = 0; row < Count; row++) {
      const __m512i v = broadcast4(x + row * stride);
      sums[row][0] = Dot::add(sums[row][0], low, v);
      sums[row][1] = Dot::add(sums[row][1], high, v);
    }
  }
}

// A table of a template's instances for 1 ... kDotRows rows.
#define INLAY_BY_ROWS(name) \
  {name<1>, name<2>, name<3>, name<4>, name<5>, name<6>, \
   name<7>, name<8>, name<9>, name<10>, name<11>, name<12>}

}  // namespace
