// The contract between ops.cpp (torch, planning, threads) and attention.cpp (kernels, no torch).
#pragma once

#include <cstdint>

namespace inlay {

// Tiles and splits begin at multiples of these, counted from a request's first token, and a row
// passes through them in order: its sum does not depend on its batch, its chunk or its thread.
constexpr int kTile = 64;
constexpr int kSplit = 512;
constexpr int kGroup = 16;    // tokens that lie in one cache block for certain
constexpr int kMaxRows = 96;  // of one work item
constexpr int kMaxLanes = 16;

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat8, kInt8 };

// Elements that lie side by side in a cache: two of a key, or those of two tokens' values, where
// bfloat16 dot products may read it (as it is, or widened).
static inline int pair_of(DType cache) {
  return cache == DType::kFloat32 || cache == DType::kFloat16 ? 1 : 2;
}
// A key's elements in a cache, the last one zero where it has no partner.
static inline int padded_head(int d, DType cache) {
  return (d + pair_of(cache) - 1) / pair_of(cache) * pair_of(cache);
}

struct AttentionArgs {
  DType dtype, cache_dtype;
  const void* q;        // [tokens, q_heads, d], strides below in elements
  const void* k_cache;  // [blocks, kv_heads, block_size / kGroup, dk / pair, kGroup, pair]
  const void* v_cache;  // [blocks, kv_heads, block_size / pair, dv, pair]
  const float *k_scales, *v_scales;  // int8: [blocks, kv_heads, block_size]; fp8: [1]; or null
  void* out;            // [tokens, q_heads, dv]
  const int32_t* block_table;  // [requests, max_blocks]
  const float* sinks;          // [q_heads] or null
  const float* slopes;         // [q_heads] or null
  bool bfloat16_bias;  // ALiBi as slope * key position in bfloat16, not by distance in float32
  int64_t q_token_stride, q_head_stride, max_blocks;
  int q_heads, kv_heads, d, dv, block_size, window, chunk;
  float scale, softcap;
  bool causal;

  int group() const { return q_heads / kv_heads; }
  int dk() const { return padded_head(d, cache_dtype); }
};

struct Span {
  int lo, hi;  // lo <= position < hi
};

// What a query sees. Neither end ever moves back from one position to the next, and the position
// itself is inside: rows in a row see one span together, from the first's lo to the last's hi.
static inline Span visible(const AttentionArgs& a, int position, int seq_len) {
  Span s{0, a.causal ? position + 1 : seq_len};
  if (a.window > 0) {
    s.lo = position < a.window ? 0 : position - a.window + 1;
    if (a.window < s.hi - position) s.hi = position + a.window;
  }
  if (a.chunk > 0) {
    const int begin = position - position % a.chunk;
    if (s.lo < begin) s.lo = begin;
    if (a.chunk < s.hi - begin) s.hi = begin + a.chunk;
  }
  return s;
}

// Rows of one request and one KV head: row r is query token r / group, head r % group.
struct WorkItem {
  int request, kv_head, seq_len;
  int first_token, first_position;  // of the request's first new token: its row in q, its position
  int row_begin, row_end;
  int first_split, last_split;  // inclusive
  int write_begin, write_end;   // tokens whose K and V go into the cache first, by the torch side
  float* partial;               // where the state of a single split goes; null: finish the rows
};

struct Kernels {
  int64_t (*state_floats)(const AttentionArgs&, int rows);
  int64_t (*scratch_floats)(const AttentionArgs&);
  void (*attend)(const AttentionArgs&, const WorkItem&, float* scratch);
  // Joins the partial states of splits [first_split, last_split], which lie one after another.
  void (*finish)(const AttentionArgs&, const WorkItem&, float* partials);
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}

}  // namespace inlay
