// New tokens' keys and values into the cache: as they are, or converted as passes/kv_formats.py says.
#pragma once

#include "attention.h"

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

namespace inlay {
namespace {

using at::Tensor;

struct Inputs {
  const Tensor &q, &k, &v, &k_cache, &v_cache, &slots, &block_table, &seq_lens, &starts;
  // Of int8 [blocks, kv_heads, block_size], of fp8 [1], else undefined.
  Tensor k_scales, v_scales;
};

// K and V of the tokens [begin, end) of one head go into the cache.
// E: an unsigned integer of the dtype's size; nothing is computed here.
template <class E, int pair>
void copy_tokens(const Inputs& in, int64_t head, int64_t begin, int64_t end) {
  const int64_t heads = in.k.size(1), d = in.k.size(2), dv = in.v.size(2);
  const int64_t block_size = in.k_cache.size(3), k_token = in.k.stride(0), dk = in.k_cache.size(2);
  const int64_t* slots = in.slots.const_data_ptr<int64_t>();
  const E* k = static_cast<const E*>(in.k.const_data_ptr()) + head * in.k.stride(1);
  const E* v = static_cast<const E*>(in.v.const_data_ptr()) + head * in.v.stride(1);
  E* k_cache = static_cast<E*>(in.k_cache.mutable_data_ptr());
  E* v_cache = static_cast<E*>(in.v_cache.mutable_data_ptr());
  for (int64_t t = begin, run; t < end; t += run) {
    const int64_t slot = slots[t];
    // Neighbours of one block go together, since a lone token touches d/2 cache lines of K.
    run = 1;
    while (t + run < end && slots[t + run] == slot + run && (slot + run) % kGroup != 0) ++run;
    if (slot < 0) continue;
    const int64_t place = slot / block_size * heads + head, offset = slot % block_size;
    E* k_to = k_cache + (place * block_size + offset / kGroup * kGroup) * dk + offset % kGroup * pair;
    for (int64_t i = 0; i < dk; ++i)
      for (int64_t j = 0; j < run; ++j)
        k_to[i / pair * kGroup * pair + j * pair + i % pair] = i < d ? k[(t + j) * k_token + i] : 0;
    for (int64_t j = offset; j < offset + run; ++j) {
      E* v_to = v_cache + (place * block_size + j / pair * pair) * dv + j % pair;
      const E* from = v + (t + j - offset) * in.v.stride(0);
      for (int64_t i = 0; i < dv; ++i) v_to[i * pair] = from[i];
    }
  }
}

// x [n] in the cache's format; scale: written for int8, read for fp8.
template <class From, class To>
void convert_vector(const From* x, int64_t n, To* to, float* scale) {
  if constexpr (std::is_same_v<To, int8_t>) {
    int32_t top_bits = 0;  // magnitudes are ordered as their bits are, NaN above all
    for (int64_t i = 0; i < n; ++i)
      top_bits = std::max(top_bits, std::bit_cast<int32_t>(static_cast<float>(x[i])) & 0x7fffffff);
    *scale = std::bit_cast<float>(top_bits) / 127.f;
    const float whole = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
    for (int64_t i = 0; i < n; ++i) {
      const float steps = static_cast<float>(x[i]) / *scale + whole - whole;
      const float known = steps == steps ? steps : 0.f;
      to[i] = static_cast<int8_t>(std::clamp(known, -127.f, 127.f));
    }
  } else {
    const float largest = static_cast<float>(std::numeric_limits<To>::max());
    for (int64_t i = 0; i < n; ++i) {
      float value = static_cast<float>(x[i]);
      if constexpr (std::is_same_v<To, at::Float8_e4m3fn>) value /= *scale;
      to[i] = static_cast<To>(std::clamp(value, -largest, largest));  // NaN stays
    }
  }
}

template <class From, class To>
void convert_tokens(const Inputs& in, int64_t head, int64_t begin, int64_t end) {
  constexpr int pair = std::is_same_v<To, float> || std::is_same_v<To, at::Half> ? 1 : 2;
  const int64_t heads = in.k.size(1), d = in.k.size(2), dv = in.v.size(2);
  const int64_t block_size = in.k_cache.size(3), dk = in.k_cache.size(2);
  const int64_t* slots = in.slots.const_data_ptr<int64_t>();
  const From* k = in.k.const_data_ptr<From>() + head * in.k.stride(1);
  const From* v = in.v.const_data_ptr<From>() + head * in.v.stride(1);
  To* k_cache = in.k_cache.mutable_data_ptr<To>();
  To* v_cache = in.v_cache.mutable_data_ptr<To>();
  const bool scaled = in.k_scales.defined(), by_token = scaled && in.k_scales.dim() == 3;
  float* k_scales = scaled ? in.k_scales.mutable_data_ptr<float>() : nullptr;
  float* v_scales = scaled ? in.v_scales.mutable_data_ptr<float>() : nullptr;
  std::vector<To> row(std::max(dk, dv));
  for (int64_t t = begin; t < end; ++t) {
    if (slots[t] < 0) continue;
    const int64_t place = slots[t] / block_size * heads + head, offset = slots[t] % block_size;
    const int64_t token = place * block_size + offset, scale = by_token ? token : 0;
    convert_vector(k + t * in.k.stride(0), d, row.data(), k_scales + scale);
    if (dk > d) row[d] = static_cast<To>(0.f);
    To* k_to = k_cache + (token - offset % kGroup) * dk + offset % kGroup * pair;
    for (int64_t i = 0; i < dk; ++i) k_to[i / pair * kGroup * pair + i % pair] = row[i];
    convert_vector(v + t * in.v.stride(0), dv, row.data(), v_scales + scale);
    To* v_to = v_cache + (token - offset % pair) * dv + offset % pair;
    for (int64_t i = 0; i < dv; ++i) v_to[i * pair] = row[i];
  }
}

template <class From>
void convert_tokens(const Inputs& in, int64_t head, int64_t begin, int64_t end) {
  switch (in.k_cache.scalar_type()) {
    case at::kFloat: return convert_tokens<From, float>(in, head, begin, end);
    case at::kBFloat16: return convert_tokens<From, at::BFloat16>(in, head, begin, end);
    case at::kHalf: return convert_tokens<From, at::Half>(in, head, begin, end);
    case at::kFloat8_e4m3fn: return convert_tokens<From, at::Float8_e4m3fn>(in, head, begin, end);
    default: return convert_tokens<From, int8_t>(in, head, begin, end);
  }
}

void write_tokens(const Inputs& in, int64_t head, int64_t begin, int64_t end) {
  const auto dtype = in.k.scalar_type();
  if (dtype == in.k_cache.scalar_type()) {
    if (dtype == at::kFloat) copy_tokens<uint32_t, 1>(in, head, begin, end);
    else if (dtype == at::kHalf) copy_tokens<uint16_t, 1>(in, head, begin, end);
    else copy_tokens<uint16_t, 2>(in, head, begin, end);
  } else if (dtype == at::kFloat) {
    convert_tokens<float>(in, head, begin, end);
  } else if (dtype == at::kBFloat16) {
    convert_tokens<at::BFloat16>(in, head, begin, end);
  } else {
    convert_tokens<at::Half>(in, head, begin, end);
  }
}

}  // namespace
}  // namespace inlay
