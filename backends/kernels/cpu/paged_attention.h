// The torch side of paged attention: checks, the cache write, the plan of work items, threads.
#pragma once

#include "attention.h"
#include "isa.h"
#include "kept_memory.h"
#include "kv_write.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <string>
#include <vector>

namespace inlay {
namespace {

void check_shape(const char* name, const Tensor& x, at::IntArrayRef shape) {
  bool same = x.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = shape[i] < 0 || x.size(i) == shape[i];
  TORCH_CHECK(same, "paged_attention: ", name, " must have shape ", shape,
              " (-1: any size), got ", x.sizes());
}

void check_index(const char* name, const Tensor& x, at::ScalarType dtype, at::IntArrayRef shape) {
  TORCH_CHECK(x.scalar_type() == dtype, "paged_attention: ", name, " must be ", dtype, ", got ",
              x.scalar_type());
  check_shape(name, x, shape);
  TORCH_CHECK(x.is_contiguous(), "paged_attention: ", name, " must be contiguous, got strides ",
              x.strides());
}

DType kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return DType::kFloat32;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    case at::kFloat8_e4m3fn: return DType::kFloat8;
    case at::kChar: return DType::kInt8;
    default: TORCH_CHECK(false, "paged_attention: k_cache must be float32, bfloat16, float16, "
                         "float8_e4m3fn or int8, got ", dtype);
  }
}

void check_scales(const char* name, const Tensor& scales, const Tensor& cache, int64_t block_size) {
  const auto dtype = cache.scalar_type();
  const bool wanted = dtype == at::kChar || dtype == at::kFloat8_e4m3fn;
  TORCH_CHECK(scales.defined() == wanted, "paged_attention: a cache of ", dtype,
              wanted ? " needs " : " takes no ", name);
  if (dtype == at::kChar)
    check_index(name, scales, at::kFloat, {cache.size(0), cache.size(1), block_size});
  if (dtype == at::kFloat8_e4m3fn) check_index(name, scales, at::kFloat, {1});
}

void check_dtypes(const Inputs& in, bool any_cache) {
  const auto dtype = in.q.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
              "paged_attention: q must be float32, bfloat16 or float16, got ", dtype);
  const auto check = [](const char* name, const Tensor& x, const char* other, at::ScalarType its) {
    TORCH_CHECK(x.scalar_type() == its, "paged_attention: ", name, " must have ", other,
                "'s dtype ", its, ", got ", x.scalar_type());
  };
  check("k", in.k, "q", dtype);
  check("v", in.v, "q", dtype);
  if (any_cache) kernel_dtype(in.k_cache.scalar_type());
  else check("k_cache", in.k_cache, "q", dtype);
  check("v_cache", in.v_cache, "k_cache", in.k_cache.scalar_type());
}

void check_inputs(const Inputs& in) {
  check_shape("q", in.q, {-1, -1, -1});
  const int64_t tokens = in.q.size(0), heads = in.q.size(1), d = in.q.size(2);
  check_shape("k", in.k, {tokens, -1, d});
  const int64_t kv_heads = in.k.size(1);
  check_shape("v", in.v, {tokens, kv_heads, -1});
  const int64_t dv = in.v.size(2);
  TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0 && heads > 0 && d > 0 && dv > 0,
              "paged_attention: q's heads must be a multiple of k's, and no size 0; got q ",
              in.q.sizes(), ", k ", in.k.sizes(), ", v ", in.v.sizes());
  const int padded = padded_head(static_cast<int>(d), kernel_dtype(in.k_cache.scalar_type()));
  check_shape("k_cache", in.k_cache, {-1, kv_heads, padded, -1});
  const int64_t blocks = in.k_cache.size(0), block_size = in.k_cache.size(3);
  check_shape("v_cache", in.v_cache, {blocks, kv_heads, block_size, dv});
  TORCH_CHECK(block_size > 0 && block_size % kGroup == 0,
              "paged_attention: the block size must be a multiple of ", kGroup, ", got ",
              block_size);
  check_scales("k_scales", in.k_scales, in.k_cache, block_size);
  check_scales("v_scales", in.v_scales, in.v_cache, block_size);
  TORCH_CHECK(in.k_cache.is_contiguous() && in.v_cache.is_contiguous(),
              "paged_attention: k_cache and v_cache must be contiguous");
  for (const Tensor* x : {&in.q, &in.k, &in.v})
    TORCH_CHECK(x->stride(2) == 1 || x->size(2) == 1,
                "paged_attention: q, k and v must be contiguous in their last dimension, got "
                "strides ", x->strides());
  check_index("seq_lens", in.seq_lens, at::kInt, {-1});
  const int64_t requests = in.seq_lens.size(0);
  check_index("slot_mapping", in.slots, at::kLong, {tokens});
  check_index("block_table", in.block_table, at::kInt, {requests, -1});
  check_index("query_start_loc", in.starts, at::kInt, {requests + 1});

  const int64_t* slots = in.slots.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < tokens; ++t)
    TORCH_CHECK(slots[t] < blocks * block_size, "paged_attention: slot_mapping[", t, "] is ",
                slots[t], ", the cache has ", blocks * block_size, " slots");
}

void check_request(const Inputs& in, const AttentionArgs& a, int64_t b, int seq_len, int begin,
                   int end) {
  const int64_t tokens = in.q.size(0), blocks = in.k_cache.size(0);
  TORCH_CHECK(0 <= begin && begin <= end && end <= tokens, "paged_attention: query_start_loc must "
              "ascend within 0 .. ", tokens, ", got ", begin, ", ", end, " for request ", b);
  TORCH_CHECK(seq_len == 0 || end - begin <= seq_len, "paged_attention: request ", b, " brings ",
              end - begin, " tokens, but seq_lens is only ", seq_len);
  const int64_t used = (int64_t{seq_len} + a.block_size - 1) / a.block_size;
  TORCH_CHECK(used <= a.max_blocks, "paged_attention: request ", b, " needs ", used,
              " blocks, block_table has ", a.max_blocks, " columns");
  if (begin == end) return;
  // Blocks that no new token sees may have been released: what stands there is never read.
  const int oldest = visible(a, seq_len - (end - begin), seq_len).lo;
  for (int64_t i = oldest / a.block_size; i < used; ++i) {
    const int block = a.block_table[b * a.max_blocks + i];
    TORCH_CHECK(0 <= block && block < blocks, "paged_attention: block_table[", b, ", ", i, "] is ",
                block, ", the cache has ", blocks, " blocks");
  }
}

c10::DataPtr allocate(int64_t floats) {
  return c10::GetCPUAllocator()->allocate(floats * sizeof(float));  // aligned to 64 bytes
}

struct Plan {
  std::vector<WorkItem> items;   // longest first
  std::vector<WorkItem> joined;  // rows whose splits were dealt to several items
  std::vector<int64_t> offsets;  // of each joined item's states in partials
  std::vector<std::pair<int, int>> early_writes;  // tokens that several items read
  c10::DataPtr partials;
  int64_t num_partials = 0;
  int64_t cost = 0;

  float* states(size_t i) const { return static_cast<float*>(partials.get()) + offsets[i]; }
};

constexpr int kWriteTokens = 64;      // of one task
constexpr int64_t kSerialCost = 1 << 20;  // below it waking a thread costs more than it saves

// What an item's rows see together.
Span visible(const AttentionArgs& a, const WorkItem& w) {
  const int first = w.first_position + w.row_begin / a.group();
  const int last = w.first_position + (w.row_end - 1) / a.group();
  return {visible(a, first, w.seq_len).lo, visible(a, last, w.seq_len).hi};
}

int64_t cost(const AttentionArgs& a, const WorkItem& w) {
  const Span seen = visible(a, w);
  const int64_t span = std::min<int64_t>(seen.hi, (int64_t{w.last_split} + 1) * kSplit) -
                       std::max<int64_t>(seen.lo, int64_t{w.first_split} * kSplit);
  return span * (w.row_end - w.row_begin + 4);
}

void write_early(Plan& plan, int begin, int end) {
  for (int t = begin; t < end; t += kWriteTokens)
    plan.early_writes.push_back({t, std::min(t + kWriteTokens, end)});
}

std::vector<WorkItem> find_items(const Inputs& in, const AttentionArgs& a, int threads,
                                 Plan& plan) {
  const int* seq_lens = in.seq_lens.const_data_ptr<int>();
  const int* starts = in.starts.const_data_ptr<int>();
  const int64_t requests = in.seq_lens.size(0), all_rows = in.q.size(0) * a.q_heads;
  const int max_rows =
      static_cast<int>(std::clamp<int64_t>(all_rows / (4 * threads), 24, kMaxRows));
  std::vector<WorkItem> items;
  for (int64_t b = 0; b < requests; ++b) {
    const int begin = starts[b], end = starts[b + 1], seq_len = seq_lens[b];
    check_request(in, a, b, seq_len, begin, end);
    if (seq_len == 0 || begin == end) continue;
    const int position = seq_len - (end - begin), rows = (end - begin) * a.group();
    const int pieces = (rows + max_rows - 1) / max_rows;
    // A lone item of a KV head writes what only it reads, which saves threads a meeting.
    if (pieces > 1) write_early(plan, begin, end);
    for (int p = 0; p < pieces; ++p)
      for (int head = 0; head < a.kv_heads; ++head) {
        WorkItem w{static_cast<int>(b), head, seq_len, begin, position,
                   static_cast<int>(int64_t{rows} * p / pieces),
                   static_cast<int>(int64_t{rows} * (p + 1) / pieces), 0, 0,
                   begin, pieces > 1 ? begin : end, nullptr};
        const Span seen = visible(a, w);
        w.first_split = seen.lo / kSplit;
        w.last_split = (seen.hi - 1) / kSplit;
        items.push_back(w);
      }
  }
  return items;
}

// One item for each split of rows, and the tokens of that split for it to write.
void deal_splits(const AttentionArgs& a, const Kernels& kernels, Plan& plan, const WorkItem& rows,
                 float* states) {
  WorkItem w = rows;
  w.partial = states;
  const auto token = [&](int split) {  // the first one at or behind a split's beginning
    const int64_t at = int64_t{rows.first_token} - rows.first_position + int64_t{split} * kSplit;
    return static_cast<int>(std::clamp<int64_t>(at, rows.write_begin, rows.write_end));
  };
  for (int split = rows.first_split; split <= rows.last_split; ++split) {
    w.first_split = w.last_split = split;
    w.write_begin = token(split);
    w.write_end = token(split + 1);
    plan.items.push_back(w);
    w.partial += kernels.state_floats(a, w.row_end - w.row_begin);
  }
}

Plan make_plan(const Inputs& in, const AttentionArgs& a, const Kernels& kernels, int threads) {
  Plan plan;
  const std::vector<WorkItem> items = find_items(in, a, threads, plan);
  for (const WorkItem& w : items) plan.cost += cost(a, w) * (a.d + a.dv);
  // Few items leave threads idle: deal their splits out. Merging in the same order as an item that
  // goes through all its splits, this changes no bit of the result.
  const bool deal = threads > 1 && plan.cost > kSerialCost &&
                    items.size() < static_cast<size_t>(4 * threads);
  for (const WorkItem& w : items) {
    if (!deal || w.first_split == w.last_split) {
      plan.items.push_back(w);
      continue;
    }
    plan.joined.push_back(w);
    plan.offsets.push_back(plan.num_partials);
    plan.num_partials +=
        (w.last_split - w.first_split + 1) * kernels.state_floats(a, w.row_end - w.row_begin);
  }
  if (plan.num_partials) plan.partials = allocate(plan.num_partials);
  for (size_t i = 0; i < plan.joined.size(); ++i)
    deal_splits(a, kernels, plan, plan.joined[i], plan.states(i));
  std::stable_sort(plan.items.begin(), plan.items.end(),
                   [&](const WorkItem& x, const WorkItem& y) { return cost(a, x) > cost(a, y); });
  return plan;
}

// Kept between calls: a large block would be given back to the system and faulted in every time.
float* thread_scratch(int64_t floats) {
  static thread_local c10::DataPtr memory;
  static thread_local int64_t size = 0;
  if (size < floats) {
    const LastingMemory lasting;
    memory = allocate(floats);
    size = floats;
  }
  return static_cast<float*>(memory.get());
}

void run_plan(const Inputs& in, const AttentionArgs& a, const Plan& plan, const Kernels& kernels,
              int threads) {
  const int64_t num_writes = static_cast<int64_t>(plan.early_writes.size());
  at::parallel_for(0, num_writes * a.kv_heads, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto& [first, last] = plan.early_writes[i % num_writes];
      write_tokens(in, i / num_writes, first, last);
    }
  });
  const int64_t num_items = static_cast<int64_t>(plan.items.size());
  const int64_t floats = kernels.scratch_floats(a);
  const int64_t workers = plan.cost > kSerialCost ? std::min<int64_t>(threads, num_items) : 1;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    float* scratch = thread_scratch(floats);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_items;) {
      const WorkItem& w = plan.items[i];
      write_tokens(in, w.kv_head, w.write_begin, w.write_end);
      kernels.attend(a, w, scratch);
    }
  });
  const int64_t num_joined = static_cast<int64_t>(plan.joined.size());
  const int64_t grain = plan.num_partials < kSerialCost / 16 ? num_joined : 1;
  at::parallel_for(0, num_joined, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.finish(a, plan.joined[i], plan.states(i));
  });
}

void zero_padding(const Inputs& in, const Tensor& out) {
  const int* starts = in.starts.const_data_ptr<int>();
  const int* seq_lens = in.seq_lens.const_data_ptr<int>();
  const int64_t requests = in.seq_lens.size(0);
  char* bytes = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row = out.size(1) * out.size(2) * out.element_size();
  std::fill(bytes, bytes + starts[0] * row, 0);
  for (int64_t b = 0; b < requests; ++b)
    if (seq_lens[b] == 0) std::fill(bytes + starts[b] * row, bytes + starts[b + 1] * row, 0);
  std::fill(bytes + starts[requests] * row, bytes + out.size(0) * row, 0);
}

// One float32 for each query head, or undefined.
Tensor per_head(const char* name, const std::optional<Tensor>& given, int64_t heads) {
  if (!given || !given->defined()) return {};
  check_shape(name, *given, {heads});
  return given->to(at::kFloat).contiguous();
}

Tensor attend(const Inputs& in, double scale, int64_t window, double softcap,
              const std::optional<Tensor>& sinks, bool causal, int64_t chunk,
              const std::optional<Tensor>& slopes) {
  check_inputs(in);
  TORCH_CHECK(window >= 0, "paged_attention: window must be 0 (all) or positive, got ", window);
  TORCH_CHECK(softcap >= 0, "paged_attention: softcap must be 0 (none) or positive, got ", softcap);
  TORCH_CHECK(chunk >= 0, "paged_attention: chunk must be 0 (none) or positive, got ", chunk);
  const Tensor sink_logits = per_head("sinks", sinks, in.q.size(1));
  const Tensor head_slopes = per_head("slopes", slopes, in.q.size(1));
  const auto floats = [](const Tensor& x) {
    return x.defined() ? x.const_data_ptr<float>() : nullptr;
  };
  Tensor out = at::empty({in.q.size(0), in.q.size(1), in.v.size(2)}, in.q.options());
  const AttentionArgs a{
      kernel_dtype(in.q.scalar_type()), kernel_dtype(in.k_cache.scalar_type()),
      in.q.const_data_ptr(), in.k_cache.const_data_ptr(), in.v_cache.const_data_ptr(),
      floats(in.k_scales), floats(in.v_scales), out.mutable_data_ptr(),
      in.block_table.const_data_ptr<int>(), floats(sink_logits), floats(head_slopes),
      head_slopes.defined() && slopes->scalar_type() == at::kBFloat16,
      in.q.stride(0), in.q.stride(1), in.block_table.size(1),
      static_cast<int>(in.q.size(1)), static_cast<int>(in.k.size(1)),
      static_cast<int>(in.q.size(2)), static_cast<int>(in.v.size(2)),
      static_cast<int>(in.k_cache.size(3)),
      static_cast<int>(std::min<int64_t>(window, INT32_MAX)),
      static_cast<int>(std::min<int64_t>(chunk, INT32_MAX)),
      static_cast<float>(scale), static_cast<float>(softcap), causal};
  const Kernels& kernels = *isa()->kernels;
  const int threads = at::get_num_threads();
  const Plan plan = make_plan(in, a, kernels, threads);  // all checks come before the first write
  zero_padding(in, out);
  run_plan(in, a, plan, kernels, threads);
  return out;
}

Tensor paged_attention(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& k_cache,
                       Tensor& v_cache, const Tensor& slot_mapping, const Tensor& block_table,
                       const Tensor& seq_lens, const Tensor& query_start_loc, double scale,
                       int64_t window, double softcap, const std::optional<Tensor>& sinks,
                       bool causal, int64_t chunk, const std::optional<Tensor>& slopes) {
  const Inputs in{q, k, v, k_cache, v_cache, slot_mapping, block_table, seq_lens, query_start_loc,
                  {}, {}};
  check_dtypes(in, false);
  return attend(in, scale, window, softcap, sinks, causal, chunk, slopes);
}

Tensor paged_attention_converted(
    const Tensor& q, const Tensor& k, const Tensor& v, Tensor& k_cache, Tensor& v_cache,
    std::optional<Tensor> k_scales, std::optional<Tensor> v_scales, const Tensor& slot_mapping,
    const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_start_loc, double scale,
    int64_t window, double softcap, const std::optional<Tensor>& sinks, bool causal, int64_t chunk,
    const std::optional<Tensor>& slopes) {
  const Inputs in{q, k, v, k_cache, v_cache, slot_mapping, block_table, seq_lens, query_start_loc,
                  k_scales.value_or(Tensor{}), v_scales.value_or(Tensor{})};
  check_dtypes(in, true);
  return attend(in, scale, window, softcap, sinks, causal, chunk, slopes);
}

}  // namespace
}  // namespace inlay
