// Matrix products in bfloat16 by AVX-512's dot instructions.
//
// A weight [N, K] lies in blocks of 32 outputs, within a block in pairs of inputs:
// [N / 32][K / 2][32][2]. oneDNN packs like this too: on CPUs with AMX, where it serves all but the
// smallest batches, its memory is read here as it lies.
#pragma once

#include <cstdint>

namespace inlay {

constexpr int64_t kSmallMatmulBlock = 32;  // outputs in a block

struct SmallMatmul {
  const char* x;         // [rows, in_features]
  const uint16_t* w;     // packed as above
  const uint16_t* bias;  // [out_features] or null
  uint16_t* y;           // [rows, out_features], contiguous
  int64_t rows, in_features, out_features;
  int64_t x_stride;  // bytes from one row of x to the next
};

// Whether this CPU has the instructions (AVX512_BF16).
bool small_matmul_supported();

// Whether this CPU has AMX's bfloat16 products, which oneDNN uses and we do not.
bool has_bfloat16_tiles();

// Whether packed holds weight [out_features, in_features] in the layout above, for blocks
// [first, last): every element is compared.
bool small_matmul_layout(const uint16_t* packed, const uint16_t* weight, int64_t in_features,
                         int64_t first, int64_t last);

// Outputs of the blocks [first, last) of these rows; float32 sums in the order of the inputs.
void small_matmul(const SmallMatmul& m, int64_t first_row, int64_t last_row, int64_t first,
                  int64_t last);

}  // namespace inlay
