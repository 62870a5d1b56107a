// The torch side of the sampler: checks, rows to threads.
#pragma once

#include "paged_attention.h"
#include "sampler.h"

#include <tuple>

namespace inlay {
namespace {

// noise.py's key of a seed and a position.
uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}
uint64_t row_key(int64_t seed, int64_t position) {
  return splitmix64(splitmix64(static_cast<uint64_t>(seed)) +
                    static_cast<uint64_t>(position) * 0x9E3779B97F4A7C15u);
}

// logits [N, V]; slots and positions int64 [N]; of all slots integers int64 [3, S]: seed, top_k,
// is_greedy, and floats float64 [4, S]: temperature, top_p, log(min_p), one that is not used.
// -> tokens int64 [N], the rows' largest logits float32 [N].
std::tuple<Tensor, Tensor> draw_tokens(const Tensor& logits, const Tensor& slots,
                                       const Tensor& positions, const Tensor& integers,
                                       const Tensor& floats) {
  const auto dtype = logits.scalar_type();
  TORCH_CHECK(logits.dim() == 2 && logits.stride(1) == 1 && logits.size(1) > 0 &&
                  (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf),
              "draw_tokens: logits must be [rows, vocab] of float32, bfloat16 or float16, rows "
              "contiguous; got ", logits.sizes(), " of ", dtype, ", strides ", logits.strides());
  const int64_t rows = logits.size(0), size = logits.size(1);
  const auto check = [&](const char* name, const Tensor& x, at::ScalarType wanted, int64_t first,
                         int64_t last) {
    TORCH_CHECK(x.scalar_type() == wanted && x.is_contiguous() && x.numel() > 0 &&
                    x.size(-1) == last && x.numel() == first * last,
                "draw_tokens: ", name, " must be ", wanted, " [", first, ", ", last,
                "], contiguous; got ", x.scalar_type(), " ", x.sizes());
  };
  if (rows == 0) return {at::empty({0}, slots.options()), at::empty({0}, at::kFloat)};
  const int64_t num_slots = integers.size(-1);
  check("slots", slots, at::kLong, 1, rows);
  check("positions", positions, at::kLong, 1, rows);
  check("integers", integers, at::kLong, 3, num_slots);
  check("floats", floats, at::kDouble, 4, num_slots);
  const auto* slot_of = slots.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < rows; ++r)
    TORCH_CHECK(0 <= slot_of[r] && slot_of[r] < num_slots, "draw_tokens: slots[", r, "] is ",
                slot_of[r], ", there are ", num_slots);
  Tensor tokens = at::empty({rows}, slots.options()), peaks = at::empty({rows}, at::kFloat);
  const auto* position = positions.const_data_ptr<int64_t>();
  const auto* whole = integers.const_data_ptr<int64_t>();
  const auto* values = floats.const_data_ptr<double>();
  const auto* bytes = static_cast<const char*>(logits.const_data_ptr());
  const SamplerKernels& kernels = *isa()->sampler;
  const int64_t stride = logits.stride(0) * logits.element_size();
  // A row of a small vocabulary takes less than waking a thread.
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / size);
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    float* scratch = thread_scratch(kernels.scratch_floats(size));
    for (int64_t r = begin; r < end; ++r) {
      const int64_t slot = slot_of[r];
      const auto key = static_cast<int64_t>(row_key(whole[slot], position[r]));
      const DrawArgs args{bytes + r * stride, size, dtype == at::kFloat, dtype == at::kHalf,
                          whole[2 * num_slots + slot] != 0, key, whole[num_slots + slot],
                          static_cast<float>(values[slot]),
                          static_cast<float>(values[2 * num_slots + slot]),
                          values[num_slots + slot]};
      const Drawn drawn = kernels.draw(args, scratch);
      tokens.mutable_data_ptr<int64_t>()[r] = drawn.token;
      peaks.mutable_data_ptr<float>()[r] = drawn.peak;
    }
  });
  return {tokens, peaks};
}

}  // namespace
}  // namespace inlay
