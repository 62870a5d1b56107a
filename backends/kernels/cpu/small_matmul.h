// Matrix products of a few bfloat16 rows, bound by the reading of weights: batch-1 decode.
//
// oneDNN packs a bfloat16 weight [N, K] into blocks of 32 outputs, within a block pairs of inputs:
// [N / 32][K / 2][32][2]. Where a packed weight has this layout it is read here as it lies, in one
// stream; oneDNN serves the larger batches from the same memory.
#pragma once

#include <cstdint>

namespace inlay {

constexpr int64_t kSmallMatmulRows = 64;   // beyond it oneDNN wins
constexpr int64_t kSmallMatmulBlock = 32;  // outputs in a block

struct SmallMatmul {
  const uint16_t* x;     // [rows, in_features], contiguous
  const uint16_t* w;     // packed as above
  const uint16_t* bias;  // [out_features] or null
  uint16_t* y;           // [rows, out_features], contiguous
  int64_t rows, in_features, out_features;
};

// Whether this CPU has the instructions (AVX512_BF16).
bool small_matmul_supported();

// Whether packed holds weight [out_features, in_features] in the layout above, for blocks
// [first, last): every element is compared.
bool small_matmul_layout(const uint16_t* packed, const uint16_t* weight, int64_t in_features,
                         int64_t first, int64_t last);

// Outputs of the blocks [first, last) of all rows; float32 sums in the order of the inputs.
void small_matmul(const SmallMatmul& m, int64_t first, int64_t last);

}  // namespace inlay
